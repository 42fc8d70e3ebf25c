"""How long the first step takes, in processes of its own: `python -m benchmarks.first_step`.

From after the import of torch and this library to the end of the first step: the optimizer is made, the backend is imported, its kernels
are compiled, state is allocated. Torch's own AdamW is beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.environment import describe, summary
from benchmarks.timing import quartiles

__all__ = ["main", "measure"]

RESULTS = Path(__file__).parent / "results"
REPETITIONS = 5
TIMEOUT = 300  # seconds of a process
# What a process runs: it prints seconds of the first step and of the second.
CODE = """
import time
import torch
import sharded_optim
params = [torch.nn.Parameter(torch.ones(size)) for size in (1000, 1_000_000)]
for param in params:
    param.grad = torch.full_like(param, 1e-2)
begin = time.perf_counter()
optimizer = {make}
optimizer.step()
first = time.perf_counter()
optimizer.step()
print(first - begin, time.perf_counter() - first)
"""
# A new optimizer is one new entry.
OPTIMIZERS: dict[str, str] = {
    "torch AdamW fused": "torch.optim.AdamW(params, fused=True)",
    "ours AdamW": "sharded_optim.AdamW(params, lr=1e-3, backend={backend!r})",
    "ours StableAdamW": "sharded_optim.StableAdamW(params, lr=1e-3, backend={backend!r})",
}


def measure(code: str) -> tuple[float, float]:
    """Seconds of the first step and of the second, in a fresh process.

    Raises:
        RuntimeError: it failed; says what it wrote.
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=TIMEOUT)
    if result.returncode:
        raise RuntimeError(f"the process failed:\n{result.stderr}")
    first, second = result.stdout.split()[-2:]
    return float(first), float(second)


def run(backend: str, repetitions: int) -> list[dict[str, Any]]:
    """Medians and quartiles for each optimizer, interleaved."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in OPTIMIZERS}
    for _ in range(repetitions):
        for name, make in OPTIMIZERS.items():
            samples[name].append(measure(CODE.format(make=make.format(backend=backend))))
            print(f"{name}: {samples[name][-1][0]:.3f} s", file=sys.stderr, flush=True)
    rows = []
    for name, pairs in samples.items():
        low, median, high = quartiles([first for first, _ in pairs])
        second = quartiles([second for _, second in pairs])[1]
        rows.append({"optimizer": name, "seconds": median, "quartiles": (low, high), "second_step_seconds": second})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_step", description="Times the first step of a process.")
    parser.add_argument("--backend", default="cpu", help="of this library's optimizers; default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    options = parser.parse_args(arguments)
    environment = describe(torch.device("cpu"), "benchmarks.first_step")
    rows = run(options.backend, options.repetitions)
    lines = []
    for row in rows:
        low, high = row["quartiles"]
        second = f"{1e3 * row['second_step_seconds']:.1f}"
        lines.append([row["optimizer"], f"{row['seconds']:.3f}", f"{low:.3f} - {high:.3f}", second])
    header = ["", "first step, s", "quartiles", "second step, ms"]
    text = "\n\n".join(
        [
            f"# First step of a process, backend {options.backend}",
            f"Medians of {options.repetitions} processes, from after the imports. {summary(environment)}",
            report.table(header, lines),
        ]
    )
    report.write(options.output, "first_step", {"environment": environment, "backend": options.backend, "results": rows}, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
