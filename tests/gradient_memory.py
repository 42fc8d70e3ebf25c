"""Peak memory of a training step on the CPU, with and without gradient release: `python tests/gradient_memory.py` prints both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LAYERS, WIDTH = 24, 1024
GRADIENTS = LAYERS * WIDTH * WIDTH * 4  # bytes


def peak(*, released: bool) -> int:
    """Bytes by which three training steps raise the peak resident memory of a fresh process that has model and moments already."""
    # Tensors are mapped one by one and given back when freed; glibc would else keep freed ones, as many as chance decides.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, str(released)]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True).stdout)


def measure(released: bool) -> int:
    import torch
    from torch import nn

    import sharded_optim as so

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    optimizer = so.AdamW(model.parameters(), lr=1e-4, gradient_release=released)
    optimizer.init_state()
    if released:
        so.prepare_for_gradient_release(model, optimizer)
    for values in optimizer.state.values():  # the system gives memory when it is written to
        values["exp_avg"].zero_()
        values["exp_avg_sq"].zero_()
    # What any step needs for a moment, with or without gradients of other layers.
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step(param=model[0].weight)
    optimizer.zero_grad()
    before = peak_resident()
    for _ in range(3):
        model(torch.randn(8, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return peak_resident() - before


def peak_resident() -> int:
    """Bytes. Not getrusage's figure, which a process inherits from the one that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(sys.argv[1] == "True"))
    else:
        print(f"{LAYERS} layers, {GRADIENTS / 2**20:.0f} MiB of gradients; a step raises peak memory by")
        print(f"  ordinary          {peak(released=False) / 2**20:6.1f} MiB")
        print(f"  gradient release  {peak(released=True) / 2**20:6.1f} MiB")
