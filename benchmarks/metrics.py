"""What metrics cost: `python -m benchmarks.metrics`.

A step of StableAdamW that records what `metrics()` and `performance()` return later, beside the same step in which the recording is
replaced by nothing, and the time to read them. Recording is no option of an optimizer: it is five readings of the clock, references to
what the step has computed anyway, and the end of the reports of the step before. One process; samples take turns, in a new order in each
round, and ratios are of the same round.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import sharded_optim as so
from benchmarks import report
from benchmarks.cases import GPT2
from benchmarks.environment import describe, summary
from benchmarks.timing import quartiles, seconds_of, without_collector
from sharded_optim.step import engine
from sharded_optim.step.param_set import ParamSets

__all__ = ["CASES", "QUICK", "main", "markdown", "run"]

RESULTS = Path(__file__).parent / "results"
STEM = "metrics_cpu"
ROUNDS, QUICK_ROUNDS, WARM_UP = 31, 2, 3
SAMPLE = 20e-3  # seconds of a sample: shorter ones are repeated
# Where recording weighs most, where reading does, and a model of the usual size.
CASES: dict[str, Sequence[tuple[int, ...]]] = {
    "2,000 tensors of 64 elements": ((64,),) * 2000,
    "2,000 tensors of 10,000 elements": ((100, 100),) * 2000,
    "GPT-2, 148 tensors": GPT2,
}
QUICK: dict[str, Sequence[tuple[int, ...]]] = {"3 tensors": ((7,), (5, 3), ())}
STEP, SILENT, METRICS, PERFORMANCE = "step", "step without recording", "metrics()", "performance()"


@contextmanager
def without_recording() -> Iterator[None]:
    """Context in which steps read no clock and keep the reports of the step before."""
    with patch.object(engine, "perf_counter", lambda: 0.0), patch.object(ParamSets, "forget_reports", lambda *_: None):
        yield


def _time(shapes: Sequence[tuple[int, ...]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer = so.StableAdamW([(f"tensor.{number}", param) for number, param in enumerate(params)], lr=1e-6)
    works: dict[str, Callable[[], object]] = {
        STEP: optimizer.step,
        SILENT: optimizer.step,
        METRICS: optimizer.metrics,
        PERFORMANCE: optimizer.performance,
    }
    samples: dict[str, list[float]] = {name: [] for name in works}
    calls = dict.fromkeys(works, 1)
    order = random.Random(0)
    for _ in range(WARM_UP):
        for name, work in works.items():
            calls[name] = max(1, math.ceil(SAMPLE / seconds_of(work)))
    with without_collector():
        for _ in range(rounds):
            for name in order.sample(list(works), len(works)):
                if name == SILENT:
                    with without_recording():
                        samples[name].append(seconds_of(works[name], calls[name]))
                    optimizer.step()  # whose metrics are then read
                else:
                    samples[name].append(seconds_of(works[name], calls[name]))
    return samples


def run(cases: dict[str, Sequence[tuple[int, ...]]], rounds: int) -> dict[str, Any]:
    """Measure all cases."""
    rows = []
    for name, shapes in cases.items():
        samples = _time(shapes, rounds)
        seconds = {each: dict(zip(("low", "median", "high"), quartiles(values), strict=True)) for each, values in samples.items()}
        ratio = quartiles([step / silent for step, silent in zip(samples[STEP], samples[SILENT], strict=True)])
        rows.append({"case": name, "seconds": seconds, "ratio": ratio})
        print(f"{name}: {ratio[1]:.4f}", file=sys.stderr, flush=True)
    return {"rounds": rounds, "cases": rows}


def markdown(record: dict[str, Any]) -> str:
    environment = record["environment"]
    rows = []
    for row in record["cases"]:
        low, median, high = row["ratio"]
        times = [f"{1e3 * row['seconds'][name]['median']:.3f}" for name in (STEP, METRICS, PERFORMANCE)]
        rows.append([row["case"], times[0], f"{median:.4f}", f"{low:.4f} - {high:.4f}", *times[1:]])
    header = ["", "step, ms", "ratio to one without recording", "quartiles", "`metrics()`, ms", "`performance()`, ms"]
    parts = [
        "# What metrics of a step cost",
        f"StableAdamW in float32, medians of {record['rounds']} rounds. {summary(environment)}",
        f"`{environment['command']}`, commit {environment['commit']}, load average {environment['load_average']:.1f} before",
        report.table(header, rows),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metrics", description="What metrics of a step cost.")
    parser.add_argument("--quick", action="store_true", help="a few elements, twice: a smoke run, whose figures mean nothing")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        environment = describe(torch.device("cpu"), "benchmarks.metrics")
        record = {
            "environment": environment,
            **run(QUICK if options.quick else CASES, QUICK_ROUNDS if options.quick else options.rounds),
        }
    finally:
        torch.set_num_threads(before)
    text = markdown(record)
    if not options.quick:
        report.write(options.output, STEM, record, text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
