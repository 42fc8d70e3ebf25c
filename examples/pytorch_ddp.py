"""PyTorch DistributedDataParallel: rank 0 saves with torch.save, as usual."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import common
import sharded_optim as so


def train(folder: Path, stop: int) -> common.Run:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model = DistributedDataParallel(common.make_net())
    optimizer = so.StableAdamW(model.module.named_parameters(), lr=common.LR)
    path, start, losses = folder / "checkpoint.pt", 0, []
    if path.exists():
        saved = torch.load(path)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    for batch in common.make_net_batches()[start:stop]:
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if stop < common.STEPS and dist.get_rank() == 0:
        folder.mkdir()
        torch.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": stop}, path)
    return common.Run(losses, common.whole_params(model, DistributedDataParallel))


if __name__ == "__main__":
    common.main(train)
