"""docs/decay.png: what 1000 steps of weight decay do to bfloat16 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import sharded_optim as so
from style import GRAY, GREEN, OURS, RED, legend, new, save

STEPS, DECAY = 1000, 1e-3
RUNS = {
    "float32": (torch.float32, {}, "-", GRAY),
    "bfloat16, Kahan (default)": (torch.bfloat16, {}, "--", OURS),
    "bfloat16, stochastic rounding": (torch.bfloat16, {"stochastic_rounding": True}, ":", GREEN),
    "bfloat16, kahan_sum=False": (torch.bfloat16, {"kahan_sum": False}, "-", RED),
}


def mean_weights(dtype: torch.dtype, options: dict[str, Any]) -> list[float]:
    """Mean of 4096 weights that begin at 1 and get zero gradients, after each step."""
    param = nn.Parameter(torch.ones(4096, dtype=dtype))
    optimizer = so.AdamW([param], lr=1e-2, weight_decay=DECAY / 1e-2, **options)
    means = [1.0]
    for _ in range(STEPS):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        means.append(float(param.detach().double().mean()))
    return means


def draw() -> None:
    figure, axes = new()
    for label, (dtype, options, line, color) in RUNS.items():
        means = mean_weights(dtype, options)
        print(f"{label:30} {means[-1]:.4f}")
        axes.plot(means, line, color=color, label=f"{label}: {means[-1]:.3f}")
    axes.set(xlabel="step", ylabel="mean weight", ylim=(0, 1.05))
    axes.set_title(f"Zero gradients, a decay of {DECAY:g} per step")
    legend(axes)
    save(figure, "decay")
