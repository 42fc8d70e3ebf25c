"""Train with StableAdamW of optimi. Continues checkpoint.pt if it exists."""

from pathlib import Path

import torch
from optimi import StableAdamW
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
optimizer = StableAdamW(model.parameters(), lr=3e-3, weight_decay=0.1, triton=False)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
first = 0
if Path("checkpoint.pt").exists():
    saved = torch.load("checkpoint.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    first = saved["step"]

losses = []
for step in range(first, first + 20):
    source = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
    loss = nn.functional.mse_loss(model(source), source[:, :4].sin())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    losses.append(loss.item())
    print(f"step {step}  loss {loss.item():.6f}")

state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "step": first + 20}
torch.save(state, "checkpoint.pt")
