"""What the first step and a save cost a rank where there are thousands: `python -m benchmarks.scale`.

One rank runs the real code, and collectives are simulated: they answer what the other ranks would, if each held its shard of every tensor,
cut along the first dimension as FSDP2 cuts them. Tensors with fewer rows than ranks are empty on some. What a network takes for the
collectives is not in the figures. The ranks that are measured are the first, the last, and the one that checks most tensors.
"""

from __future__ import annotations

import argparse
import gc
import math
import pickle
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import report
from benchmarks.environment import describe, summary
from sharded_optim.checkpoint import write_plan
from sharded_optim.checkpoint.collectives import digest_of
from sharded_optim.checkpoint.local_tensor import LocalTensor
from sharded_optim.sharding import Layout, LocalParam, Piece
from sharded_optim.sharding.exchange import FIRST, NEEDS_TEXT, OWNED, exchange_layouts
from sharded_optim.sharding.piece_exchange import EXTENTS, INDEX, RowText
from sharded_optim.sharding.row_exchange import Array, hash_words
from sharded_optim.sharding.segment import Segment

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Shards", "layout_of_rank", "main", "measure", "plan_of_rank"]

RESULTS = Path(__file__).parent / "results"
WORLD_SIZES = (512, 2048, 16384)
TENSORS = 300
MIB = 2**20
WIDTH = 4096
# The shapes of a transformer's tensors, in turn.
SHAPES = ((WIDTH,), (WIDTH, WIDTH), (1024, WIDTH), (14336, WIDTH), (WIDTH, 14336))


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Which elements of the tensors of a model each rank holds."""

    world_size: int
    shapes: Sequence[tuple[int, ...]]

    @classmethod
    def of_transformer(cls, world_size: int, tensors: int) -> Shards:
        return cls(world_size=world_size, shapes=[SHAPES[number % len(SHAPES)] for number in range(tensors)])

    @property
    def names(self) -> list[str]:
        return [f"model.layers.{number // len(SHAPES)}.block.{number % len(SHAPES)}.weight" for number in range(len(self.shapes))]

    def extents(
        self,
        tensors: Array,  # int64 (n,), numbers
        ranks: Array,  # int64, of a shape that goes with (n,)
    ) -> Array:  # int64 (..., 4): start, run, stride, count
        rows = np.array([shape[0] for shape in self.shapes])[tensors]
        width = np.array([math.prod(shape[1:]) for shape in self.shapes])[tensors]
        height = -(-rows // self.world_size)
        begin, end = (np.minimum(number * height, rows) for number in (ranks, ranks + 1))
        run = (end - begin) * width
        return np.stack([np.where(run > 0, begin * width, 0), run, run, (run > 0).astype(np.int64)], axis=-1)

    def first_empty(self, tensors: Array) -> Array:
        """The first rank that has nothing of a tensor: int64 (n,)."""
        rows = np.array([shape[0] for shape in self.shapes])[tensors]
        return -(-rows // -(-rows // self.world_size))

    def segments(self, rank: int) -> list[Segment]:
        tensors = np.arange(len(self.shapes))
        extents = self.extents(tensors, np.full(len(tensors), rank)).tolist()
        return [
            Segment(name=name, shape=shape, start=start, run=run, stride=stride, count=count)
            for name, shape, (start, run, stride, count) in zip(self.names, self.shapes, extents, strict=True)
        ]

    def layout_replies(self, tensors: Array, ranks: Array) -> Array:
        is_filled, empty = self.extents(tensors, ranks)[..., 1] > 0, self.first_empty(tensors)
        flags = (is_filled | (ranks == empty)) * OWNED | (ranks == 0) * (FIRST | NEEDS_TEXT)
        return np.stack([flags, np.where(is_filled, np.where(ranks == 0, empty - 1, -1), 0)], axis=-1)

    def plan_replies(self, tensors: Array, ranks: Array) -> Array:
        is_filled = self.extents(tensors, ranks)[..., 1] > 0
        empty = self.first_empty(tensors)
        count, position = np.where(is_filled, 1, self.world_size - empty), np.where(is_filled, 0, ranks - empty)
        return np.stack(np.broadcast_arrays((ranks == 0) * write_plan.NEEDS_TEXT, count, position, 0), axis=-1)


class _Group:
    """Stands for a process group."""

    group_name = "simulated"


@dataclass(kw_only=True)
class _Simulation:
    """The collectives of a rank. Once they have been answered, they are answered from memory.

    Attributes:
        replies: (numbers of tensors, ranks) -> what the ranks that check the tensors reply.
        published: (numbers of tensors) -> what the rank that checks them gathers for all.
    """

    shards: Shards
    rank: int
    prefix: str  # of the names of tensors in keys
    dtype: str
    replies: Callable[[Array, Array], Array]
    published: Callable[[list[int]], Any]
    group: Any = field(default_factory=_Group)
    received: int = 0  # bytes
    _answers: list[Any] = field(default_factory=list)
    _next: int = 0
    _rows: Array = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))  # in the order in which they are sent
    _counts: list[int] = field(default_factory=list)  # rows sent to each rank

    @contextmanager
    def running(self) -> Iterator[None]:
        self._next, self.received = 0, 0
        fakes = {
            "get_rank": lambda group: self.rank,
            "get_world_size": lambda group: self.shards.world_size,
            "get_backend_config": lambda group: "cpu:gloo",
            "all_to_all_single": self._all_to_all,
            "all_gather_object": self._gather,
        }
        with mock.patch.multiple(dist, **fakes):
            yield

    def _all_to_all(self, output: torch.Tensor, given: torch.Tensor, received: list[int], sent: list[int], group: Any) -> None:
        number = self._next
        self._next += 1
        if number == len(self._answers):
            self._answers.append(self._answer(number, given.numpy(), sent))
        output.numpy()[:] = self._answers[number]
        self.received += output.nbytes

    def _answer(self, number: int, given: Array, sent: list[int]) -> Array:
        every, rank = np.arange(self.shards.world_size), self.rank
        begin, end = sum(self._counts[:rank]), sum(self._counts[: rank + 1])
        checked = self._rows[begin:end]
        if number == 0:  # how many rows each sends, and its facts: the same as this one
            self._counts = given[:, 0].tolist()
            return np.tile(given[rank], (len(every), 1))
        if number == 1:  # rows
            self._rows = given.copy()
            mine = given[begin:end]
            rows = np.tile(mine, (len(every), 1, 1))
            rows[..., EXTENTS] = self.shards.extents(mine[:, INDEX], every[:, None])
            assert (rows[rank] == mine).all(), "the simulation says of this rank what it says itself"
            return rows.reshape(-1, mine.shape[1])
        if number == 2:  # replies to this rank's rows
            expected = self.replies(checked[:, INDEX], every[:, None]).reshape(-1, given.shape[1])
            same = slice(0, min(3, given.shape[1]))  # what follows is a hash
            assert (given[:, same] == expected[:, same]).all(), "this rank replies as the simulation does"
            return self.replies(self._rows[:, INDEX], np.array(rank))
        if given.dtype == np.int64:  # of the values of replicas, of which there are none
            return np.zeros((len(every) * (end - begin), 1), dtype=np.int64)
        # Texts, all from the first rank.
        of_shards = zip(self.shards.shapes, self.shards.names, strict=True)
        texts = [f"{','.join(map(str, shape))} {self.dtype} {self.prefix}{name}" for shape, name in of_shards]
        return np.frombuffer("".join(texts[index] for index in checked[:, INDEX].tolist()).encode(), dtype=np.uint8)

    def _gather(self, values: list[Any], value: Any, group: Any) -> None:
        number = self._next
        self._next += 1
        if number == len(self._answers):
            of_ranks = np.split(self._rows[:, INDEX], np.cumsum(self._counts)[:-1])
            is_publication = isinstance(value[1], list)
            others = [(None, self.published(indices.tolist()) if is_publication else None) for indices in of_ranks]
            assert others[self.rank] == value, "this rank says what the simulation does"
            self._answers.append([pickle.dumps(other) for other in others])
        content = self._answers[number]
        for rank, text in enumerate(content):
            values[rank] = pickle.loads(text)
        self.received += len(content) * max(map(len, content))  # all are as long as the longest


def layout_of_rank(shards: Shards, rank: int) -> tuple[_Simulation, Callable[[], Layout]]:
    """Prepare the exchange of layouts of the first step on one rank."""
    names, numels = shards.names, [math.prod(shape) for shape in shards.shapes]
    simulation = _Simulation(
        shards=shards,
        rank=rank,
        prefix="",
        dtype="torch.float32",
        replies=shards.layout_replies,
        published=lambda tensors: [(0, index, numels[index], names[index]) for index in tensors],
    )
    params = []
    for segment in shards.segments(rank):
        param = torch.nn.Parameter(torch.ones(segment.numel))
        param.grad = torch.full_like(param, 1e-2)
        pieces = (Piece(segment=segment),)
        params.append(LocalParam(param=param, name=segment.name, pieces=pieces, local=lambda tensor, role: tensor))
    return simulation, lambda: exchange_layouts(lambda: params, simulation.group, compares_values=lambda _: False)


def plan_of_rank(shards: Shards, rank: int) -> tuple[_Simulation, Callable[[], write_plan.WritePlan]]:
    """Prepare the plan of a checkpoint on one rank."""
    names, shapes = shards.names, shards.shapes
    prefix = f"model{write_plan.SEPARATOR}"
    simulation = _Simulation(
        shards=shards,
        rank=rank,
        prefix=prefix,
        dtype="F32",
        replies=shards.plan_replies,
        published=lambda tensors: [(0, index, RowText(prefix + names[index], shapes[index], "F32")) for index in tensors],
    )
    tensors = [LocalTensor(kind="model", segment=segment, local=torch.ones(segment.numel)) for segment in shards.segments(rank)]

    def plan() -> write_plan.WritePlan:
        simulation.group = _Group()  # plans are kept for a group
        rows = write_plan.rows_of(tensors)
        return write_plan.plan_for(tensors, [digest_of(rows)] * shards.world_size, simulation.group)

    return simulation, plan


WORKS: dict[str, Callable[[Shards, int], tuple[_Simulation, Callable[[], Any]]]] = {
    "layouts, first step": layout_of_rank,
    "plan of a checkpoint": plan_of_rank,
}


def measure(simulation: _Simulation, work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, of the clock and of the processor, and bytes of memory at the peak."""
    with simulation.running():
        work()
    gc.collect()
    with simulation.running():
        begin = time.perf_counter(), time.process_time()
        work()
        seconds, cpu_seconds = time.perf_counter() - begin[0], time.process_time() - begin[1]
    gc.collect()
    tracemalloc.start()
    try:
        with simulation.running():
            work()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Torch's memory is not traced: what was received is counted as if it all were held at the peak.
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "bytes": peak + simulation.received, "received": simulation.received}


def _measured_ranks(shards: Shards, prefix: str) -> list[int]:
    words = hash_words([f"{prefix}{name}".encode() for name in shards.names])[:, 0].view(np.uint64) % np.uint64(shards.world_size)
    busiest = int(np.bincount(words.astype(np.int64)).argmax())
    return sorted({0, busiest, shards.world_size - 1})


def run(world_sizes: Sequence[int], tensors: int) -> list[dict[str, Any]]:
    """Of each work and number of ranks, the most that any of the measured ranks takes."""
    rows = []
    for name, prepare in WORKS.items():
        for world_size in world_sizes:
            shards = Shards.of_transformer(world_size, tensors)
            found = []
            for rank in _measured_ranks(shards, f"model{write_plan.SEPARATOR}" if prepare is plan_of_rank else ""):
                found.append(measure(*prepare(shards, rank)))
                print(f"{name}, rank {rank} of {world_size}: {found[-1]}", file=sys.stderr, flush=True)
            rows.append({"work": name, "ranks": world_size} | {key: max(each[key] for each in found) for key in found[0]})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description="Times one rank of many, with simulated collectives.")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=WORLD_SIZES, help="numbers of ranks; default: %(default)s")
    parser.add_argument("--tensors", type=int, default=TENSORS, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    options = parser.parse_args(arguments)
    environment = describe(torch.device("cpu"), "benchmarks.scale")
    rows = run(options.world_sizes, options.tensors)
    lines = [
        [
            row["work"],
            f"{row['ranks']:,}",
            f"{row['seconds']:.3f}",
            f"{row['cpu_seconds']:.3f}",
            f"{row['bytes'] / MIB:.1f}",
            f"{row['received'] / MIB:.1f}",
        ]
        for row in rows
    ]
    text = "\n\n".join(
        [
            f"# One rank of many, {options.tensors} tensors",
            f"The other ranks are simulated; what the network takes is not in it. {summary(environment)}",
            report.table(["", "ranks", "s", "s of the processor", "memory, MiB", "of it received, MiB"], lines),
        ]
    )
    report.write(options.output, "scale", {"environment": environment, "tensors": options.tensors, "results": rows}, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
