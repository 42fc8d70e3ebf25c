"""How long the first step takes, in processes of its own: `python -m benchmarks.first_step`.

From after the import of torch and this library to the end of the first step: the optimizer is made, the backend is imported, its kernels
are compiled, state is allocated. Torch's own AdamW is beside it. And the same for many tensors, after another optimizer has stepped, which
had the kernels compiled: what is left is what a first step costs for each tensor.
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
TENSORS = 10_000  # of many
# What a process runs: it prints seconds of the first step, of the second, and of the processor in the first.
CODE = """
import time
import torch
import sharded_optim
def with_grads(sizes):
    params = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    for param in params:
        param.grad = torch.full_like(param, 1e-2)
    return params
make = lambda params: {make}
if {warm}:
    make(with_grads([1000])).step()
params = with_grads({sizes})
begin, cpu_begin = time.perf_counter(), time.process_time()
optimizer = make(params)
optimizer.step()
first, cpu_first = time.perf_counter(), time.process_time()
optimizer.step()
print(first - begin, time.perf_counter() - first, cpu_first - cpu_begin)
"""
# A new optimizer is one new entry.
OPTIMIZERS: dict[str, str] = {
    "torch AdamW fused": "torch.optim.AdamW(params, fused=True)",
    "ours AdamW": "sharded_optim.AdamW(params, lr=1e-3, backend={backend!r})",
    "ours StableAdamW": "sharded_optim.StableAdamW(params, lr=1e-3, backend={backend!r})",
}


def measure(code: str) -> tuple[float, float, float]:
    """Seconds of the first step and of the second, and of the processor in the first, in a fresh process.

    Raises:
        RuntimeError: it failed; says what it wrote.
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=TIMEOUT)
    if result.returncode:
        raise RuntimeError(f"the process failed:\n{result.stderr}")
    first, second, cpu = map(float, result.stdout.split()[-3:])
    return first, second, cpu


def run(backend: str, repetitions: int, tensors: int) -> list[dict[str, Any]]:
    """Medians and quartiles for each optimizer, interleaved."""
    cases = {"": {"warm": False, "sizes": "(1000, 1_000_000)"}, f", {tensors:,} tensors": {"warm": True, "sizes": f"[1000] * {tensors}"}}
    samples: dict[str, list[tuple[float, float, float]]] = {f"{name}{case}": [] for case in cases for name in OPTIMIZERS}
    for _ in range(repetitions):
        for case, values in cases.items():
            for name, make in OPTIMIZERS.items():
                sample = measure(CODE.format(make=make.format(backend=backend), **values))
                samples[f"{name}{case}"].append(sample)
                print(f"{name}{case}: {sample[0]:.3f} s", file=sys.stderr, flush=True)
    rows = []
    for name, found in samples.items():
        low, median, high = quartiles([first for first, _, _ in found])
        second, cpu = (quartiles([sample[index] for sample in found])[1] for index in (1, 2))
        rows.append({"optimizer": name, "seconds": median, "quartiles": (low, high), "cpu_seconds": cpu, "second_step_seconds": second})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_step", description="Times the first step of a process.")
    parser.add_argument("--backend", default="cpu", help="of this library's optimizers; default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="default: %(default)s")
    parser.add_argument("--tensors", type=int, default=TENSORS, help="of many; default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    options = parser.parse_args(arguments)
    environment = describe(torch.device("cpu"), "benchmarks.first_step")
    rows = run(options.backend, options.repetitions, options.tensors)
    lines = []
    for row in rows:
        low, high = row["quartiles"]
        second = f"{1e3 * row['second_step_seconds']:.1f}"
        lines.append([row["optimizer"], f"{row['seconds']:.3f}", f"{low:.3f} - {high:.3f}", f"{row['cpu_seconds']:.3f}", second])
    header = ["", "first step, s", "quartiles", "of the processor, s", "second step, ms"]
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
