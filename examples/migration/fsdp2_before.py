"""Train with FSDP2 and AdamW of torch: torchrun --nproc-per-node 2 FILE. Continues checkpoint.pt, of whole tensors, if it exists."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
first = 0
if Path("checkpoint.pt").exists():
    saved = torch.load("checkpoint.pt")
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=WHOLE)
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

model_state, optimizer_state = get_state_dict(model, optimizer, options=WHOLE)
dist.barrier()  # all have read the old file
if rank == 0:
    state = {"model": model_state, "optimizer": optimizer_state, "scheduler": scheduler.state_dict(), "step": first + 20}
    torch.save(state, "checkpoint.pt")
dist.destroy_process_group()
