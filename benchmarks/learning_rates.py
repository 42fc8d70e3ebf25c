"""Final loss of the training job over learning rates and seeds, Muon beside StableAdamW: `python -m benchmarks.learning_rates`.

A search with short runs: each optimizer gets as many learning rates, the same seeds and as many steps. Then whole runs at the best learning
rate of each. A run is one process with one thread, `configs/single.yaml`; its result does not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.environment import describe, summary

__all__ = ["main"]

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
STEM = "learning_rates"
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "Muon": ("optimizer.name=Muon", "optimizer.adjust_lr_fn=match_rms_adamw"),
    "StableAdamW": ("optimizer.name=StableAdamW",),
}
RATES = {"Muon": (8e-3, 1.6e-2, 3.2e-2, 6.4e-2), "StableAdamW": (2e-3, 4e-3, 8e-3, 1.6e-2)}
SEEDS = (0, 1, 2)
SHORT, WHOLE = 200, 650  # steps


def run(optimizer: str, rate: float, seed: int, steps: int) -> float:
    """Train once.

    Returns:
        Bits per byte of the validation text after the last step.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = [
            f"steps={steps}",
            f"warmup_steps={steps // 10}",
            f"seed={seed}",
            f"optimizer.lr={rate}",
            f"runs_folder={folder}",
            "run=run",
        ]
        command = [sys.executable, "-m", "launch", "configs/single.yaml", *OPTIMIZERS[optimizer], *options]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        found = json.loads((Path(folder) / "run" / "summary.json").read_text(encoding="utf-8"))
    return found["val_bits_per_byte"]


def measure(steps: int, rates: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for optimizer, of_optimizer in rates.items():
        for rate in of_optimizer:
            bits = [run(optimizer, rate, seed, steps) for seed in seeds]
            rows.append({"optimizer": optimizer, "lr": rate, "steps": steps, "bits_per_byte": bits})
            print(f"{optimizer} {rate:g}, {steps} steps: {', '.join(f'{value:.3f}' for value in bits)}", file=sys.stderr, flush=True)
    return rows


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Sequence[float]]:
    """Return for each optimizer the learning rate with the lowest mean."""
    by_mean = sorted(rows, key=lambda row: statistics.mean(row["bits_per_byte"]), reverse=True)
    return {name: (rate,) for name, rate in {row["optimizer"]: row["lr"] for row in by_mean}.items()}


def markdown(record: dict[str, Any]) -> str:
    header = ["optimizer", "lr", "steps", *(f"seed {seed}" for seed in record["seeds"]), "mean"]
    rows = []
    for row in record["rows"]:
        values = [*row["bits_per_byte"], statistics.mean(row["bits_per_byte"])]
        rows.append([row["optimizer"], f"{row['lr']:g}", str(row["steps"]), *(f"{value:.3f}" for value in values)])
    parts = [
        "# Loss over learning rates",
        "Bits per byte of the validation text after the last step.",
        summary(record["environment"]),
        f"`{record['environment']['command']}`, commit {record['environment']['commit']}",
        report.table(header, rows),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning_rates", description="Searches learning rates, then trains to the end."
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: one learning rate, one seed, few steps")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    options = parser.parse_args(arguments)
    seeds = SEEDS[:1] if options.quick else SEEDS
    rates = {name: rates[:1] if options.quick else rates for name, rates in RATES.items()}
    rows = measure(10 if options.quick else SHORT, rates, seeds)
    rows += measure(20 if options.quick else WHOLE, best(rows), seeds)
    record = {"environment": describe(torch.device("cpu"), "benchmarks.learning_rates") | {"threads": 1}, "seeds": seeds, "rows": rows}
    text = markdown(record)
    report.write(options.output, STEM, record, text)
    print(text)


if __name__ == "__main__":
    main()
