"""Start the training job: `python -m launch configs/fsdp2.yaml steps=50 optimizer.lr=1e-3`.

The config and the text are read here first, so that a mistake is reported once and before any process starts. Then this process becomes
torchrun, or for a single process the job itself.
"""

from __future__ import annotations

import os
import sys

from launch import corpus, deepspeed_extension, process_group
from launch.config import ConfigError, from_arguments
from launch.launchers import TORCHRUN_OPTIONS, RankInfo
from launch.run_folder import find_run
from launch.tracking import check_installed


def main(arguments: list[str]) -> None:
    try:
        config = from_arguments(arguments, "python -m launch")
        if config.processes == "auto":
            config = config.with_processes(max(1, process_group.gpus_here()) if config.device != "cpu" else 1)
        processes = config.processes
        assert processes != "auto"
        device = process_group.pick_device(RankInfo(local_world_size=processes), config.device)  # too few GPUs are reported once
        check_installed(config)
        corpus.load(config)  # writes the cache that the ranks then read
        if config.sharding == "deepspeed":
            deepspeed_extension.build(device.type)
        if done := find_run(config, is_restart=False)[1]:
            print(done)
            sys.exit(0)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    process_group.share_cores(processes, config.threads)
    command = [sys.executable, "-m"]
    if processes > 1 or config.max_restarts:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["--max-restarts", str(config.max_restarts), "-m"]
        for name, value in TORCHRUN_OPTIONS.items():
            os.environ.setdefault(name, value)
    os.execv(sys.executable, [*command, "launch.train", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
