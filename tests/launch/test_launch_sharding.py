"""The training job's loss curve does not depend on the wrapper: 50 steps in which each param group matters."""

from __future__ import annotations

import json
import os
import random
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist

from launch import corpus, deepspeed_extension
from launch.config import Config, load
from launch.launchers import RankInfo
from launch.run_folder import RunFolder
from launch.train import broadcast_path, run
from launch.watch import Watch

ROOT = Path(__file__).parents[2]
STEPS = 50
TINY = (
    f"steps={STEPS} warmup_steps=5 batch_size=4 sequence_length=32 log_every=1 validation_every=25 validation_batches=2 device=cpu "
    "model.layers=2 model.heads=2 model.d_model=32 optimizer.lr=1e-2"
).split()
# Strong enough that a gain which decays by mistake changes the curve.
TINY.append("optimizer.weight_decay=1.0")
WAYS = {
    "fsdp2": ["fsdp2.yaml"],
    "ddp": ["ddp.yaml"],
    "fsdp1": ["fsdp1.yaml"],
    "zero2": ["zero2.yaml"],
    "zero1": ["zero2.yaml", "sharding=zero1"],
    **{f"deepspeed_zero{stage}": ["deepspeed.yaml", f"deepspeed={ROOT}/configs/deepspeed_zero{stage}.json"] for stage in (1, 2, 3)},
}
# Measured: 0 for all but deepspeed_zero3, as a sum over two ranks does not depend on their order, and halving it rounds nothing; 1.1e-7 for
# deepspeed_zero3, which has linear layers of its own. With a single gain in the wrong param group it is 4e-3.
BOUND = 1e-5
NO_DEEPSPEED = "deepspeed is not installed; pip install 'deepspeed>=0.19,<0.20'"


def check_runs(configs: list[Config]) -> None:
    """The job, once for each config in the same processes: starting them takes longer than training does."""
    info = RankInfo(rank=dist.get_rank(), world_size=2, local_rank=dist.get_rank(), local_world_size=2)
    os.environ |= {"RANK": str(info.rank), "LOCAL_RANK": str(info.rank), "WORLD_SIZE": "2"}  # DeepSpeed reads them
    for config in configs:
        folder = RunFolder(config) if info.rank == 0 else None
        path = broadcast_path(folder)
        assert path is not None
        run(config, info, torch.device("cpu"), corpus.load(config), path, folder, time.perf_counter(), Watch())


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of training and validation, in the order they came."""
    folder = tmp_path_factory.mktemp("curves")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=5)) for _ in range(40)]
    (folder / "text").write_text(" ".join(generator.choices(words, k=6000)))
    configs = {}
    for way, (file, *overrides) in WAYS.items():
        if file != "deepspeed.yaml" or find_spec("deepspeed") is not None:
            own = [f"name={way}", f"data.path={folder / 'text'}", f"runs_folder={folder / way}"]
            configs[way] = load(ROOT / "configs" / file, [*overrides, *TINY, *own])
    if find_spec("deepspeed") is not None:
        deepspeed_extension.build()
    ranks.run(check_runs, 2, list(configs.values()))
    found = {}
    for way in configs:
        records = [json.loads(line) for line in (folder / way / "latest" / "metrics.jsonl").read_text().splitlines()]
        found[way] = [record.get("train_loss_bits", record.get("val_bits_per_byte")) for record in records]
    return found


@pytest.mark.timeout(400)  # of which building DeepSpeed's extension takes up to 300
@pytest.mark.parametrize("way", [way for way in WAYS if way != "fsdp2"])
def test_the_loss_curve_is_that_of_fsdp2(curves: dict[str, list[float]], way: str) -> None:
    if way not in curves:
        pytest.skip(NO_DEEPSPEED)
    assert len(curves[way]) == STEPS + 2
    assert curves[way] == pytest.approx(curves["fsdp2"], rel=BOUND)
