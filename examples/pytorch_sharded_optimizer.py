"""This library's ZeRO (ShardedOptimizer) around an unwrapped model: saved with so.checkpoint."""

from pathlib import Path

import torch.distributed as dist

import common
import sharded_optim as so


def train(folder: Path, stop: int) -> common.Run:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model = common.make_net()
    optimizer = so.ShardedOptimizer(model, so.StableAdamW, lr=common.LR)
    start, losses = 0, []
    if folder.exists():
        start = so.checkpoint.load(folder, model=model, optimizer=optimizer)["step"]
    for batch in common.make_net_batches()[start:stop]:
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if stop < common.STEPS:
        so.checkpoint.save(folder, stop, model=model, optimizer=optimizer, extra={"step": stop})
    return common.Run(losses, common.copy_of(model.state_dict()))


if __name__ == "__main__":
    common.main(train)
