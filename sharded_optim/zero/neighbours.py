"""Ranks of one machine read each other's buffers, instead of sending them to each other through the loopback device.

On two ranks with 94 MiB to gather, 24 ms by gloo's sends, 6 ms through memory. A buffer is an anonymous file in memory (memfd), which lives
as long as somebody has mapped it, and leaves nothing behind when a process dies. Others find it under /proc, by a message that says which
it is. Linux, CPU tensors.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Neighbours"]

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # tells machines apart
KEPT = 256  # mappings of other ranks' buffers

_files: dict[int, tuple[int, int]] = {}  # (file descriptor, inode) of each of our buffers, by its address


class Neighbours:
    """The ranks of a process group that can read this one's buffers, and whose it can read.

    Args:
        process_group: finding out is a collective over it; None: this process is alone.

    Attributes:
        ranks: of the group, without this one.
        exist: whether any two ranks of the group are neighbours; the same on every rank.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.ranks: frozenset[int] = frozenset()
        self.exist = False
        self._process_ids: list[int] = []
        self._mapped: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        if process_group is not None:
            self._find(process_group)

    def _find(self, process_group: dist.ProcessGroup) -> None:
        """Read what all others have written into a buffer of theirs, if it can be read."""
        size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        probe = _shared(8) if hasattr(os, "memfd_create") and BOOT_ID.exists() else None
        told: list[tuple[str, int, tuple[int, int]] | None] = [None] * size
        own = None
        if probe is not None:
            probe.copy_(torch.tensor([rank], dtype=torch.int64).view(torch.uint8))
            own = (BOOT_ID.read_text(), os.getpid(), _files[probe.data_ptr()])
        dist.all_gather_object(told, own, group=process_group)
        self._process_ids = [0 if each is None else each[1] for each in told]
        readable = []
        for other, each in enumerate(told):
            if own is None or each is None or other == rank or each[0] != own[0]:
                continue
            try:
                found = self.read(other, torch.tensor(each[2])).view(torch.int64)
            except (OSError, ValueError):  # another container, or not allowed
                continue
            if found.tolist() == [other]:
                readable.append(other)
        lists: list[list[int]] = [[] for _ in range(size)]
        dist.all_gather_object(lists, readable, group=process_group)  # after it nobody reads the probe
        self.ranks = frozenset(other for other in readable if rank in lists[other])
        self.exist = any(each in lists[other] for each in range(size) for other in lists[each])
        self._mapped.clear()

    def allocate(self, size: int) -> Tensor:
        """Zeros that neighbours can read: uint8 (size,)."""
        return _shared(size)

    def message(self, buffer: Tensor) -> Tensor:
        """What tells neighbours which buffer this is, or lies in: int64 (2,)."""
        return torch.tensor(_files[buffer.untyped_storage().data_ptr()], dtype=torch.int64)

    def read(self, rank: int, message: Tensor) -> Tensor:
        """A neighbour's buffer: uint8, all of it, not to be written to.

        Raises:
            OSError: it is gone, or out of reach.
        """
        descriptor, inode = message.tolist()
        key = (rank, inode)
        if key not in self._mapped:
            file = os.open(f"/proc/{self._process_ids[rank]}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
            try:
                status = os.fstat(file)
                if status.st_ino != inode:
                    raise OSError(f"file {descriptor} of process {self._process_ids[rank]} is another one than it has said")
                # Written to by nobody here, but torch has no tensors that are read-only.
                self._mapped[key] = torch.frombuffer(mmap.mmap(file, status.st_size), dtype=torch.uint8)
            finally:
                os.close(file)
            while len(self._mapped) > KEPT:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(key)
        return self._mapped[key]


def _shared(size: int) -> Tensor:
    descriptor = os.memfd_create("sharded_optim", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, max(size, 1))
    memory = mmap.mmap(descriptor, max(size, 1))
    buffer = torch.frombuffer(memory, dtype=torch.uint8)[:size]
    address = buffer.untyped_storage().data_ptr()
    _files[address] = (descriptor, os.fstat(descriptor).st_ino)
    weakref.finalize(memory, _forget, address, descriptor)  # when no tensor uses it any more
    return buffer


def _forget(address: int, descriptor: int) -> None:
    del _files[address]
    os.close(descriptor)
