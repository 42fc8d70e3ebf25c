"""The optimizer's step as users run it, right behind a backward pass in one process: `python -m benchmarks.behind_backward`.

Gradients are new tensors in each step, as `zero_grad` leaves them, and the threads of the backward pass have just been at work. Contenders
take turns on the same parameters. Also with fewer threads than there are cores.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.contenders import BASELINE, by_name
from benchmarks.environment import describe, summary
from benchmarks.fsdp2 import Model
from benchmarks.timing import keep_threads, quartiles, seconds_of, without_collector

__all__ = ["CONTENDERS", "main"]

RESULTS = Path(__file__).parent / "results"
ROUNDS, WARM_UP = 40, 2
# A new contender is one more name of `contenders.CONTENDERS`. The first is the baseline.
CONTENDERS = (BASELINE, "DeepSpeedCPUAdam", "ours AdamW cpu", "optimi StableAdamW foreach", "ours StableAdamW cpu")
# Sizes of the model, and of a batch of tokens.
MODELS: dict[str, tuple[dict[str, int], tuple[int, int]]] = {
    "0.9M": ({"layers": 2, "width": 128, "vocabulary": 3072, "positions": 512}, (8, 128)),
    "23M": ({"layers": 6, "width": 512, "vocabulary": 8192, "positions": 512}, (2, 64)),
}


def measure(sizes: dict[str, int], batch: tuple[int, int], names: Sequence[str], threads: int, rounds: int) -> dict[str, Any]:
    """Time all contenders behind backward passes of one model; milliseconds and ratios to the baseline, medians."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Model(**sizes)
    params = list(model.parameters())
    tokens = torch.randint(sizes["vocabulary"], batch)
    missing, samples, steps = {}, {}, {}

    def backward() -> None:
        model.zero_grad()
        model(tokens).square().mean().backward()

    for name in names:
        try:
            optimizer = by_name(name).make(params)
            for _ in range(WARM_UP):
                backward()
                optimizer.step()
            keep_threads(threads, name)
            steps[name], samples[name] = optimizer.step, []
        except Exception as error:  # whatever it is: the others go on, and the report has the reason
            missing[name] = f"{type(error).__name__}: {error}"
    generator = random.Random(0)
    with without_collector():
        for _ in range(rounds):
            for name in generator.sample(list(steps), len(steps)):
                backward()
                samples[name].append(seconds_of(steps[name]))
    results = []
    for name, seconds in samples.items():
        ratios = [own / other for own, other in zip(seconds, samples[BASELINE], strict=True)]
        results.append({"contender": name, "milliseconds": 1e3 * quartiles(seconds)[1], "ratio": quartiles(ratios)[1]})
    elements = sum(param.numel() for param in params)
    return {"threads": threads, "tensors": len(params), "elements": elements, "results": results, "missing": missing}


def markdown(record: dict[str, Any]) -> str:
    measured = f"Medians of {record['rounds']} steps; in brackets the ratio to {BASELINE} in the same round"
    parts = ["# Time of a step right behind a backward pass", f"{measured}. {summary(record['environment'])}"]
    for title, cases in record["models"].items():
        cells: dict[str, list[str]] = {row["contender"]: [row["contender"]] for case in cases for row in case["results"]}
        for case in cases:
            found = {row["contender"]: f"{row['milliseconds']:.2f} ({row['ratio']:.2f})" for row in case["results"]}
            for name, row in cells.items():
                row.append(found.get(name, ""))
        parts.append(f"## {title}: {cases[0]['elements']:,} parameters in {cases[0]['tensors']} tensors")
        parts.append(report.table(["ms", *(f"{case['threads']} threads" for case in cases)], list(cells.values())))
        reasons = {name: reason for case in cases for name, reason in case["missing"].items()}
        parts += [f"- {name}: {reason}" for name, reason in reasons.items()]
    return "\n\n".join(parts) + "\n"


def _thread_counts() -> list[int]:
    """1, 2, 4, ... and the number of cores."""
    cores = len(os.sched_getaffinity(0))
    return sorted({cores, *(2**power for power in range(cores.bit_length()) if 2**power <= cores)})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.behind_backward", description="Times steps right behind a backward pass.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="default: all")
    parser.add_argument("--threads", nargs="+", type=int, default=_thread_counts(), help="default: 1, 2, 4, ..., all cores")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, help=f"names of contenders; {BASELINE} is always measured")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        names = list(dict.fromkeys([BASELINE, *(by_name(name).name for name in options.contenders)]))
    except ValueError as error:
        parser.error(str(error))
    before = torch.get_num_threads()
    environment = describe(torch.device("cpu"), "benchmarks.behind_backward") | {"threads": max(options.threads)}
    models = {title: [measure(*MODELS[title], names, threads, options.rounds) for threads in options.threads] for title in options.models}
    torch.set_num_threads(before)
    record = {"environment": environment, "baseline": BASELINE, "rounds": options.rounds, "models": models}
    text = markdown(record)
    report.write(options.output, "behind_backward", record, text)
    print(text)
    print(f"written to {options.output / 'behind_backward'}.json and .md", file=sys.stderr)


if __name__ == "__main__":
    main()
