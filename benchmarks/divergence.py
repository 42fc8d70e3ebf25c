"""A divergence check beside the training step that it is amortised over: `python -m benchmarks.divergence`.

Two gloo ranks with one thread each train GPT-2 under DDP with this library's AdamW, so that both hold all parameters and moments. Steps and
checks take turns. All ranks begin a sample together, and it takes as long as the slowest rank.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import sharded_optim as so
from benchmarks import report
from benchmarks.environment import describe, summary
from benchmarks.gloo_ranks import start
from benchmarks.gpt2 import GPT2Model
from benchmarks.timing import quartiles, seconds_of, without_collector

__all__ = ["SMALL", "main", "markdown", "run"]

RESULTS = Path(__file__).parent / "results"
STEM = "divergence_cpu"
WORLD_SIZE = 2
ROUNDS, QUICK_ROUNDS, WARM_UP = 15, 1, 2
EVERY = 100  # steps from one check to the next
BATCH = (1, 32)  # sequences and tokens of each: the more, the less a check counts
TIMEOUT = timedelta(seconds=120)  # of a collective
IMPORTED = ("benchmarks.gpt2", "sharded_optim", "torch._dynamo")  # by the server of ranks
SMALL: dict[str, int] = {"layers": 2, "width": 32, "vocabulary": 64, "positions": 64, "heads": 4}


def _slowest(work: Callable[[], object]) -> float:
    """Seconds of the slowest rank, when all begin together."""
    dist.barrier()
    seconds = torch.tensor([seconds_of(work)], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def _time(sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = GPT2Model(**sizes)
    tokens = torch.randint(model.tokens.num_embeddings, BATCH, generator=torch.Generator().manual_seed(dist.get_rank()))
    wrapped = DistributedDataParallel(model)
    optimizer = so.AdamW(model.named_parameters(), lr=1e-4)
    check = so.DivergenceCheck(optimizer, model=wrapped)

    def step() -> None:
        output = wrapped(tokens)
        functional.cross_entropy(output.flatten(0, 1), tokens.roll(-1, dims=1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    samples: dict[str, list[float]] = {"step": [], "check": []}
    with without_collector():
        for number in range(-WARM_UP, rounds):
            for name, work in (("step", step), ("check", check)):
                seconds = _slowest(work)
                if number >= 0:
                    samples[name].append(seconds)
    states = [value for state in optimizer.state.values() for value in state.values()]
    compared = [*model.parameters(), *(value for value in states if value.ndim)]
    return {"samples": samples, "bytes": sum(tensor.numel() * tensor.element_size() for tensor in compared)}


def run(sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    """Measure steps and checks, and how they compare in the same round."""
    work = partial(_time, sizes, rounds)
    found = start(work, world_size=WORLD_SIZE, imported=IMPORTED, environment={"OMP_NUM_THREADS": "1"}, timeout=TIMEOUT)
    steps, checks = found["samples"]["step"], found["samples"]["check"]
    rows = {name: dict(zip(("low", "median", "high"), quartiles(seconds), strict=True)) for name, seconds in found["samples"].items()}
    share = quartiles([check / (EVERY * step) for step, check in zip(steps, checks, strict=True)])
    return {"bytes": found["bytes"], "rounds": rounds, "every": EVERY, "seconds": rows, "share": share}


def markdown(record: dict[str, Any]) -> str:
    environment = record["environment"]
    rows = [[name, *(f"{each[key]:.3f}" for key in ("median", "low", "high"))] for name, each in record["seconds"].items()]
    size, check, share = record["bytes"], record["seconds"]["check"]["median"], [f"{each:.2%}" for each in record["share"]]
    measured = f"a check reads {size / 1e6:.0f} MB on each rank, {size / check / 1e9:.1f} GB/s"
    parts = [
        f"# A divergence check on {WORLD_SIZE} gloo ranks under DDP",
        f"GPT-2 with AdamW in float32; {measured}. Seconds of the slowest rank, {record['rounds']} rounds. {summary(environment)}",
        f"`{environment['command']}`, commit {environment['commit']}, load average {environment['load_average']:.1f} before",
        report.table(["", "median", "lower quartile", "upper quartile"], rows),
        f"Every {record['every']} steps it takes {share[1]} of their time: median of the rounds, quartiles {share[0]} and {share[2]}.",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.divergence", description="A divergence check beside a training step.")
    parser.add_argument("--quick", action="store_true", help="a small model, once: a smoke run, whose figures mean nothing")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    options = parser.parse_args(arguments)
    environment = describe(torch.device("cpu"), "benchmarks.divergence") | {"threads": 1}
    record = {"environment": environment, **run(SMALL if options.quick else {}, QUICK_ROUNDS if options.quick else options.rounds)}
    text = markdown(record)
    if not options.quick:
        report.write(options.output, STEM, record, text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
