"""Accelerate with FSDP2: saved with save_state."""

from pathlib import Path

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

import common
import sharded_optim as so


def train(folder: Path, stop: int) -> common.Run:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Sequential"]
    )
    common.allow_fsdp_on_cpus()
    accelerator = Accelerator(fsdp_plugin=plugin)
    model = common.make_net()
    optimizer = so.StableAdamW(model.named_parameters(), lr=common.LR)
    model, optimizer = accelerator.prepare(model, optimizer)
    start, losses = 0, []
    if folder.exists():
        accelerator.load_state(str(folder))
        start = common.STOP
    for batch in common.make_net_batches()[start:stop]:
        loss = model(**batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if stop < common.STEPS:
        accelerator.save_state(str(folder))
    return common.Run(losses, common.whole_params(model, FSDPModule))


if __name__ == "__main__":
    common.main(train, single_use=True)  # an Accelerator with FSDP can be made once
