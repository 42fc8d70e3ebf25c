"""Exchange rows of numbers: each rank sends every row to the rank that checks it, and receives a reply.

The pieces of a tensor on all ranks must be compared on some rank. If every rank compared those of all tensors, time and memory would grow
with ranks x tensors; here each rank compares the rows of its share of the tensors. Used by `piece_exchange.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["Array", "RowExchange", "hash_words"]

Array = np.ndarray[Any, np.dtype[Any]]


def hash_words(texts: Sequence[bytes]) -> Array:
    """Return 128 bits of a cryptographic hash of each text: int64 (texts, 2), so that equal hashes mean equal texts."""
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
    return np.frombuffer(digests, dtype=np.int64).reshape(len(texts), 2)


class RowExchange:
    """Sends each row to the rank that checks it. Construction and each method are collectives.

    Args:
        rows: int64 (n, columns), this rank's rows.
        to: int64 (n,), the rank that checks each row.
        facts: int64 (k,), numbers that this rank sends to all others.
        process_group: the ranks; None: this process is alone.

    Attributes:
        facts: int64 (ranks, k), the numbers of all ranks.
        rows: int64 (m, columns), the rows that this rank checks, by sending rank, and in the sender's order.
        ranks: int64 (m,), the rank that has sent each of `rows`.
    """

    def __init__(self, rows: Array, to: Array, facts: Sequence[int], process_group: dist.ProcessGroup | None) -> None:
        self._process_group = process_group
        self._device = None if process_group is None else _device_of(process_group)
        world_size = 1 if process_group is None else dist.get_world_size(process_group)
        self._order = np.argsort(to, kind="stable")  # the order in which rows are sent
        self._to = to
        sent = np.bincount(to, minlength=world_size)
        headers = np.empty((world_size, 1 + len(facts)), dtype=np.int64)
        headers[:, 0] = sent
        headers[:, 1:] = facts
        each = [1] * world_size
        headers = self._all_to_all(headers, each, each)
        self.facts = headers[:, 1:]
        self._sent, self._received = sent.tolist(), headers[:, 0].tolist()
        self.ranks = np.repeat(np.arange(world_size), self._received)
        self.rows = self.send(rows)

    def send(
        self,
        values: Array,  # int64 (n, columns), one row for each row of this rank
    ) -> Array:  # int64 (m, columns), one for each row that this rank checks
        return self._all_to_all(values[self._order], self._sent, self._received)

    def reply(
        self,
        values: Array,  # int64 (m, columns), one row for each row that this rank checks
    ) -> Array:  # int64 (n, columns), the reply to each row of this rank
        received = self._all_to_all(values, self._received, self._sent)
        replies = np.empty_like(received)
        replies[self._order] = received
        return replies

    def send_texts(
        self,
        texts: Sequence[bytes],  # one for each row of this rank; empty ones are not sent
        sizes: Array,  # int64 (m,), bytes of the text of each row that this rank checks; 0: none
    ) -> list[bytes]:  # one for each row that this rank checks
        own_sizes = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        sent = np.bincount(self._to, weights=own_sizes, minlength=len(self._sent)).astype(np.int64)
        received = np.bincount(self.ranks, weights=sizes, minlength=len(self._sent)).astype(np.int64)
        content = np.frombuffer(b"".join(texts[row] for row in self._order.tolist()), dtype=np.uint8)
        gathered = self._all_to_all(content, sent.tolist(), received.tolist()).tobytes()
        ends = np.cumsum(sizes).tolist()
        return [gathered[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]

    def _all_to_all(self, values: Array, sent: list[int], received: list[int]) -> Array:
        if self._process_group is None:
            return values
        values = np.ascontiguousarray(values)
        given = torch.from_numpy(values if values.flags.writeable else values.copy()).to(self._device)
        output = torch.empty((sum(received), *values.shape[1:]), dtype=given.dtype, device=self._device)
        dist.all_to_all_single(output, given, received, sent, self._process_group)
        return output.cpu().numpy()


def _device_of(process_group: dist.ProcessGroup) -> torch.device:
    """Return the device of a group's collectives: the CPU if the group has a backend for CPUs (gloo), else the accelerator."""
    if "cpu:" in dist.get_backend_config(process_group):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None, "a group without a backend for the CPU has one for an accelerator"
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
