"""docs/parts.png: the parts of a step as `optimizer.performance()` has them, on two ranks that hold replicas.

The least of many steps, so that other work on the machine shows little.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import sharded_optim as so
from style import BROWN, GREEN, OURS, VIOLET, label_bars, legend, new, save

LAYERS, WIDTH, STEPS = 4, 512, 30
PARTS = {"observe": GREEN, "agree": BROWN, "matrices": VIOLET, "update": OURS}
OPTIMIZERS = {
    "AdamW": lambda model: so.AdamW(model.named_parameters(), lr=1e-3),
    "StableAdamW": lambda model: so.StableAdamW(model.named_parameters(), lr=1e-3),
    "Muon": lambda model: so.Muon(so.muon_param_groups(model), lr=1e-3),
}


def block() -> nn.Module:
    sizes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    return nn.ModuleDict({name: nn.Linear(*each) for name, each in sizes.items()})


def measure(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    optimizers = {}
    for name, build in OPTIMIZERS.items():
        torch.manual_seed(0)
        optimizers[name] = build(nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(LAYERS))}))
    found = {name: {part: [] for part in PARTS} for name in optimizers}
    for _ in range(STEPS):
        for name, optimizer in optimizers.items():
            for param in (param for group in optimizer.param_groups for param in group["params"]):
                param.grad = torch.randn_like(param)
            dist.barrier()
            optimizer.step()
            for part, times in found[name].items():
                times.append(optimizer.performance().get(f"ms/{part}", 0.0))
    if rank == 0:
        results.update({name: {part: min(times[STEPS // 3 :]) for part, times in parts.items()} for name, parts in found.items()})
    dist.destroy_process_group()


def draw() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.dict()
        mp.spawn(partial(measure, store=f"{folder}/store", results=results), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
        times = {name: dict(results[name]) for name in OPTIMIZERS}
    count = LAYERS * (12 * WIDTH**2 + 9 * WIDTH)
    figure, axes = new(height=2.6)
    places = list(range(len(times)))[::-1]
    left = [0.0] * len(times)
    for part, color in PARTS.items():
        values = [100 * each[part] / sum(each.values()) for each in times.values()]
        axes.barh(places, values, left=left, height=0.7, color=color, label=part)
        left = [before + value for before, value in zip(left, values, strict=True)]
    label_bars(axes, places, left, [f"{sum(each.values()):.0f} ms" for each in times.values()])
    axes.set_yticks(places, list(times))
    axes.set(xlabel="percent of a step; beside it the sum of the least times of 20 steps", xlim=(0, 112))
    axes.set_title(f"{count / 1e6:.1f}M float32 elements on each of 2 ranks, one thread each", pad=26)
    legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(PARTS))
    print(times)
    save(figure, "parts")
