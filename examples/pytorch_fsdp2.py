"""PyTorch FSDP2 (fully_shard): saved with torch.distributed.checkpoint."""

from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

import common
import sharded_optim as so


def train(folder: Path, stop: int) -> common.Run:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model = common.make_net()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = so.StableAdamW(model.named_parameters(), lr=common.LR)
    start, losses = 0, []
    if folder.exists():
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "step": 0}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        start = state["step"]
    for batch in common.make_net_batches()[start:stop]:
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if stop < common.STEPS:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state, "step": stop}, checkpoint_id=folder)
    return common.Run(losses, common.whole_params(model, FSDPModule))


if __name__ == "__main__":
    common.main(train)
