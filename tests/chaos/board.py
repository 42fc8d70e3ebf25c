"""What each rank is doing, in a file that all map into memory: read when the rank is dead, it tells what it was killed in."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

__all__ = ["Board", "Phase"]

RANKS = 2
NUMBER = struct.Struct("=q")


class Phase(IntEnum):
    """What a rank does; of what it does at once, the last."""

    STARTING = 0
    LOADING = 1
    TRAINING = 2
    SAVING = 3
    SAVING_IN_THE_BACKGROUND = 4
    PRUNING = 5


class Board:
    """A phase and a step for each rank.

    Args:
        path: of the file; made if need be.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(2 * RANKS * NUMBER.size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))

    def phase(self, rank: int) -> Phase:
        return Phase(self._get(rank))

    def step(self, rank: int) -> int:
        return self._get(RANKS + rank)

    def enter(self, rank: int, phase: Phase) -> None:
        self._set(rank, phase)

    def count(self, rank: int, step: int) -> None:
        self._set(RANKS + rank, step)

    @contextmanager
    def during(self, rank: int, phase: Phase) -> Iterator[None]:
        before = self.phase(rank)
        self.enter(rank, phase)
        try:
            yield
        finally:
            self.enter(rank, before)

    def _get(self, index: int) -> int:
        return NUMBER.unpack_from(self._memory, index * NUMBER.size)[0]

    def _set(self, index: int, value: int) -> None:
        NUMBER.pack_into(self._memory, index * NUMBER.size, value)
