"""Train with DeepSpeed and AdamW of this library: torchrun --nproc-per-node 2 FILE. Continues the folder checkpoints if it exists."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import sharded_optim as so

CONFIG = {
    "train_micro_batch_size_per_gpu": 32,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "sharded_optim.AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 100, "warmup_num_steps": 10}},
}

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
engine, *_ = so.deepspeed.initialize(model=model, config=CONFIG)
if Path("checkpoints").exists():
    engine.load_checkpoint("checkpoints")

losses = []
first = engine.global_steps
for step in range(first, first + 20):
    source = torch.randn(32, 16, generator=torch.Generator().manual_seed(2 * step + rank))
    loss = nn.functional.mse_loss(engine(source), source[:, :4].sin())
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
    if rank == 0:
        print(f"step {step}  loss {loss.item():.6f}")

engine.save_checkpoint("checkpoints")
dist.destroy_process_group()
