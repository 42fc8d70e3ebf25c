"""Draws docs/decay.png: what 1000 steps of weight decay do to bfloat16 weights. `make figures` runs it."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import nn

import sharded_optim as so

STEPS, DECAY = 1000, 1e-3
RUNS = {
    "float32": (torch.float32, {}),
    "bfloat16, Kahan (default)": (torch.bfloat16, {}),
    "bfloat16, stochastic rounding": (torch.bfloat16, {"stochastic_rounding": True}),
    "bfloat16, kahan_sum=False": (torch.bfloat16, {"kahan_sum": False}),
}


def mean_weights(dtype: torch.dtype, options: dict) -> list[float]:
    """Mean of 4096 weights that begin at 1 and get zero gradients, after each step."""
    param = nn.Parameter(torch.ones(4096, dtype=dtype))
    optimizer = so.AdamW([param], lr=1e-2, weight_decay=DECAY / 1e-2, **options)
    means = [1.0]
    for _ in range(STEPS):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        means.append(float(param.detach().double().mean()))
    return means


if __name__ == "__main__":
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for (label, (dtype, options)), style in zip(RUNS.items(), ("-", "--", ":", "-"), strict=True):
        means = mean_weights(dtype, options)
        print(f"{label:30} {means[-1]:.4f}")
        axes.plot(means, style, label=f"{label}: {means[-1]:.3f}", linewidth=2)
    axes.set(xlabel="step", ylabel="mean weight", title=f"Zero gradients, a decay of {DECAY:g} per step", ylim=(0, 1.05))
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "decay.png", dpi=110)
