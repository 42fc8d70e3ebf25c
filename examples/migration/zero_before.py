"""Train with torch's ZeroRedundancyOptimizer: torchrun --nproc-per-node 2 FILE. Continues checkpoint.pt if it exists."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)))
optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=3e-3, weight_decay=0.1)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
first = 0
if Path("checkpoint.pt").exists():
    saved = torch.load("checkpoint.pt")
    model.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    first = saved["step"]

losses = []
for step in range(first, first + 20):
    source = torch.randn(32, 16, generator=torch.Generator().manual_seed(2 * step + rank))
    loss = nn.functional.mse_loss(model(source), source[:, :4].sin())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    losses.append(loss.item())
    if rank == 0:
        print(f"step {step}  loss {loss.item():.6f}")

optimizer.consolidate_state_dict(to=0)
dist.barrier()  # all have read the old file
if rank == 0:
    state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"scheduler": scheduler.state_dict(), "step": first + 20}, "checkpoint.pt")
dist.destroy_process_group()
