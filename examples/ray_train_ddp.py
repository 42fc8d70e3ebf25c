"""Ray Train with DDP: rank 0 reports a checkpoint, which a new trainer gets back."""

import os
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from ray import train as ray_train
from ray.train.torch import TorchTrainer, prepare_model
from torch.nn.parallel import DistributedDataParallel

import common
import sharded_optim as so


def train_worker(config: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    model = prepare_model(common.make_net())
    optimizer = so.StableAdamW(model.module.named_parameters(), lr=common.LR)
    start, losses, rank = 0, [], ray_train.get_context().get_world_rank()
    if config["checkpoint"]:
        with ray_train.Checkpoint(config["checkpoint"]).as_directory() as folder:
            saved = torch.load(Path(folder, "state.pt"))
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    for step, batch in enumerate(common.make_net_batches()[start : config["stop"]], start + 1):
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if step == common.STOP and rank == 0:
                state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, Path(folder, "state.pt"))
                checkpoint = ray_train.Checkpoint.from_directory(folder)
            ray_train.report({"loss": loss.item()}, checkpoint=checkpoint)
    params = common.whole_params(model, DistributedDataParallel)
    torch.save({"losses": losses, "params": params}, Path(config["results"], f"worker-{rank}.pt"))


def train(folder: Path, stop: int) -> dict[int, common.Run]:
    ray.init(num_cpus=common.RANKS + 1, include_dashboard=False, ignore_reinit_error=True)
    folder.mkdir(exist_ok=True)
    path = folder / "checkpoint_path.txt"
    config = {"checkpoint": path.read_text() if path.exists() else None, "stop": stop, "results": str(folder)}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=config,
        scaling_config=ray_train.ScalingConfig(num_workers=common.RANKS),
        run_config=ray_train.RunConfig(name=f"until-{stop}", storage_path=str(folder)),
    )
    result = trainer.fit()
    if result.checkpoint is not None:
        path.write_text(result.checkpoint.path)
    return {rank: common.Run(**torch.load(folder / f"worker-{rank}.pt")) for rank in range(common.RANKS)}


if __name__ == "__main__":
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    common.main(train, launcher=common.DRIVER)
