"""A step of Muon on two FSDP2 ranks, beside gathering every matrix on every rank: `python -m benchmarks.muon`.

Gloo ranks with one thread each step the 24 hidden matrices of the 23M model (`fsdp2.py`). "full_tensor" is what users write for want of
better: every rank gathers every matrix, and computes with all of them. Both take turns. All ranks begin a sample together, and it takes as
long as the slowest rank.
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
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import sharded_optim as so
from benchmarks import report
from benchmarks.environment import describe, summary
from benchmarks.fsdp2 import Model
from benchmarks.gloo_ranks import start
from benchmarks.timing import quartiles, seconds_of, without_collector
from sharded_optim.optimizers.muon import orthogonalize

__all__ = ["main", "markdown", "run"]

RESULTS = Path(__file__).parent / "results"
STEM = "muon_cpu"
WORLD_SIZE = 2
ROUNDS, QUICK_ROUNDS, WARM_UP = 9, 1, 1
TIMEOUT = timedelta(seconds=300)  # of a collective
IMPORTED = ("benchmarks.fsdp2", "sharded_optim", "torch._dynamo")  # by the server of ranks
SMALL: dict[str, int] = {"layers": 1, "width": 32, "vocabulary": 64, "positions": 64}


class FullTensor:
    """Muon with `full_tensor` for each matrix: the arithmetic of `so.Muon`, on every rank all of it."""

    def __init__(self, params: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        self._params, self._group = params, group
        self._momentum = [torch.zeros_like(param) for param in params]

    @torch.no_grad()
    def step(self) -> None:
        momentum, lr, decay = self._group["momentum"], self._group["lr"], self._group["weight_decay"]
        for param, buffer in zip(self._params, self._momentum, strict=True):
            assert isinstance(param, DTensor)
            assert isinstance(param.grad, DTensor)
            buffer.lerp_(param.grad, 1 - momentum)
            direction: Any = param.grad.lerp(buffer, momentum).bfloat16()
            whole = orthogonalize(direction.full_tensor(), self._group)
            param.mul_(1 - lr * decay).add_(distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None), alpha=-lr)


def _slowest(work: Callable[[], object]) -> float:
    """Seconds of the slowest rank, when all begin together."""
    dist.barrier()
    seconds = torch.tensor([seconds_of(work)], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def _time(sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Model(**sizes)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    matrices = [(name, param) for name, param in model.named_parameters() if name.startswith("layers") and param.ndim == 2]
    for _, param in matrices:
        param.grad = torch.randn_like(param)
    optimizer = so.Muon(matrices, lr=1e-3)
    gathered = FullTensor([param for _, param in matrices], optimizer.param_groups[0])
    sent: list[int] = []
    start_exchange = dist.all_to_all_single

    def counted(output: Tensor, given: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(given.nbytes)
        return start_exchange(output, given, *args, **options)

    dist.all_to_all_single = counted
    total = torch.zeros((), dtype=torch.int64)
    samples: dict[str, list[float]] = {"so.Muon": [], "full_tensor": []}
    with without_collector():
        for number in range(-WARM_UP, rounds):
            for name, work in (("so.Muon", optimizer.step), ("full_tensor", gathered.step)):
                sent.clear()
                seconds = _slowest(work)
                if number >= 0:
                    samples[name].append(seconds)
                if name == "so.Muon":
                    total.fill_(sum(sent))
    dist.all_reduce(total)
    whole = optimizer._sets.whole
    assert whole is not None, "it has stepped"
    (plan,) = whole.layout.matrices
    numel = sum(param.numel() for _, param in matrices)
    return {"samples": samples, "bytes_per_element": int(total) / numel, "loads": plan.loads, "rounds": len(plan.rounds), "numel": numel}


def run(sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    """Measure both, and how they compare in the same round."""
    work = partial(_time, sizes, rounds)
    found = start(work, world_size=WORLD_SIZE, imported=IMPORTED, environment={"OMP_NUM_THREADS": "1"}, timeout=TIMEOUT)
    samples = found.pop("samples")
    rows = {name: dict(zip(("low", "median", "high"), quartiles(seconds), strict=True)) for name, seconds in samples.items()}
    ratio = quartiles([ours / theirs for ours, theirs in zip(samples["so.Muon"], samples["full_tensor"], strict=True)])
    return found | {"samples": rounds, "seconds": rows, "ratio": ratio}


def markdown(record: dict[str, Any]) -> str:
    environment = record["environment"]
    rows = [[name, *(f"{each[key]:.3f}" for key in ("median", "low", "high"))] for name, each in record["seconds"].items()]
    loads = record["loads"]
    ratio = [f"{each:.2f}" for each in record["ratio"]]
    took = f"so.Muon takes {ratio[1]} of the time of full_tensor: median of the samples, quartiles {ratio[0]} and {ratio[2]}."
    busiest = f"The busiest rank has {max(loads) * len(loads) / sum(loads):.3f} of an even share of the flops"
    travel = f"{record['bytes_per_element']:.3f} bytes travel for each element"
    parts = [
        f"# A step of Muon on {WORLD_SIZE} gloo ranks under FSDP2",
        f"{record['numel']:,} elements of matrices. Seconds of the slowest rank, {record['samples']} samples. {summary(environment)}",
        f"`{environment['command']}`, commit {environment['commit']}, load average {environment['load_average']:.1f} before",
        report.table(["", "median", "lower quartile", "upper quartile"], rows),
        f"{took} {busiest}; {travel}, in {record['rounds']} rounds.",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.muon", description="A step of Muon beside full_tensor.")
    parser.add_argument("--quick", action="store_true", help="a small model, once: a smoke run, whose figures mean nothing")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    options = parser.parse_args(arguments)
    environment = describe(torch.device("cpu"), "benchmarks.muon") | {"threads": 1}
    record = {"environment": environment, **run(SMALL if options.quick else {}, QUICK_ROUNDS if options.quick else options.rounds)}
    text = markdown(record)
    if not options.quick:
        report.write(options.output, STEM, record, text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
