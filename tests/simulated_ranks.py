"""Ranks as threads of one process, with the collectives of `torch.distributed` that exchanges use.

No process is started, so that a test may run hundreds of jobs.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist

Result = TypeVar("Result")

TIMEOUT = 20.0  # seconds that a rank waits for the others


class SimulatedGroup:
    """Stands for the process group of these ranks."""

    group_name = "simulated"

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.calls: list[str] = []  # of the first rank
        self._local = threading.local()
        self._barrier = threading.Barrier(world_size)
        self._given: list[Any] = [None] * world_size

    def run(self, function: Callable[[int, Any], Result]) -> list[Result | Exception]:
        """Call `function(rank, group)` on every rank; what it raises is its result."""

        def call(rank: int) -> Result | Exception:
            self._local.rank = rank
            try:
                return function(rank, self)
            except Exception as error:
                return error

        fakes = {
            "get_rank": lambda group: self._local.rank,
            "get_world_size": lambda group: self.world_size,
            "get_backend_config": lambda group: "cpu:gloo",
            "all_to_all_single": self._all_to_all,
            "all_gather_object": self._gather,
        }
        with mock.patch.multiple(dist, **fakes), ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(call, range(self.world_size)))

    def _exchange(self, name: str, value: Any) -> list[Any]:
        """All ranks' values. A rank that makes another call than the others fails, and so do they."""
        if self._local.rank == 0:
            self.calls.append(name)
        self._given[self._local.rank] = name, value
        self._barrier.wait(TIMEOUT)
        given = list(self._given)
        self._barrier.wait(TIMEOUT)
        assert {other for other, _ in given} == {name}, "all ranks make the same collective calls in the same order"
        return [value for _, value in given]

    def _all_to_all(self, output: torch.Tensor, given: torch.Tensor, received: list[int], sent: list[int], group: Any) -> None:
        parts = [part[self._local.rank] for part in self._exchange("all-to-all", given.clone().split(sent))]
        assert [len(part) for part in parts] == received, "ranks expect what is sent to them"
        torch.cat(parts, out=output)

    def _gather(self, values: list[Any], value: Any, group: Any) -> None:
        values[:] = [pickle.loads(each) for each in self._exchange("all-gather", pickle.dumps(value))]
