"""A user changes the import and nothing else: one training script, run with each library."""

from __future__ import annotations

from typing import Any

import pytest
import torch

# What a user of optimi or Composer has written; LIBRARY is the only thing that changes. Where triton is installed, optimi takes it on a CPU
# too and fails there, unless it is told not to.
SCRIPT = """
import torch
from torch import nn
from LIBRARY import NAME

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(31, 16), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 37), nn.GELU(), nn.Linear(37, 31))
decaying = [param for param in model.parameters() if param.ndim > 1]
others = [param for param in model.parameters() if param.ndim <= 1]
groups = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
optimizer = NAME(groups, ARGUMENTS)
scheduler = torch.optim.lr_scheduler.SequentialLR(
    optimizer,
    [
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=20),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=180),
    ],
    milestones=[20],
)
generator = torch.Generator().manual_seed(1)
losses = []
for step in range(200):
    tokens = torch.randint(31, (8, 4), generator=generator)
    loss = nn.functional.cross_entropy(model(tokens), tokens[:, 0])
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    scheduler.step()
    losses.append(loss.item())
"""


def run(library: str, name: str, arguments: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(SCRIPT.replace("LIBRARY", library).replace("NAME", name).replace("ARGUMENTS", arguments), namespace)
    return namespace


@pytest.mark.parametrize(
    ("library", "name", "arguments"),
    [
        ("optimi", "Adam", "lr=3e-3, triton=False"),
        ("optimi", "Adam", "3e-3, (0.9, 0.95), 1e-2, 1e-7, triton=False"),
        ("optimi", "AdamW", "lr=3e-3, weight_decay=0.1, triton=False"),
        ("optimi", "AdamW", "lr=3e-3, weight_decay=3e-4, decouple_lr=True, max_lr=3e-3, triton=False"),
        ("optimi", "StableAdamW", "lr=3e-3, weight_decay=0.1, kahan_sum=None, foreach=None, triton=False"),
        ("optimi", "StableAdamW", "lr=3e-3, weight_decay=3e-4, decouple_lr=True, triton=False"),
        ("composer_formulas", "DecoupledAdamW", "lr=3e-3, weight_decay=3e-4"),
        ("composer_formulas", "DecoupledAdamW", "3e-3, (0.9, 0.95), 1e-8, 1e-5, True"),
        ("composer_formulas", "DecoupledSGDW", "0.1, momentum=0.9, weight_decay=1e-4, nesterov=True"),
        ("composer_formulas", "DecoupledSGDW", "lr=0.1"),
    ],
)
@pytest.mark.filterwarnings("ignore:weight_decay", "ignore:.*potentially high")
def test_the_same_script_has_the_same_trajectory(library: str, name: str, arguments: str) -> None:
    """200 steps of a small language model: every loss to 1 in 1000, every final weight to 1 in 1000 of its tensor's norm."""
    theirs, ours = run(library, name, arguments), run("sharded_optim", name, arguments)
    torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(theirs["losses"]), rtol=1e-3, atol=1e-4)
    assert theirs["losses"][-1] < 0.9 * theirs["losses"][0]
    for a, e in zip(ours["model"].parameters(), theirs["model"].parameters(), strict=True):
        assert (a - e).norm() < 1e-3 * e.norm()
