"""Accelerate with DDP: saved with save_state."""

from pathlib import Path

from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

import common
import sharded_optim as so


def train(folder: Path, stop: int) -> common.Run:
    accelerator = Accelerator(cpu=True)
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
    return common.Run(losses, common.whole_params(model, DistributedDataParallel))


if __name__ == "__main__":
    common.main(train)
