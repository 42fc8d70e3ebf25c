"""Asynchronous reduce-scatter, all-gather and all-reduce of flat buffers that are cut into equal shards.

Gloo has no reduce-scatter: torch runs an all-reduce of everything instead, and gloo's all-gather of 94 MiB on two ranks took 90 ms. Under
gloo ranks therefore exchange shards directly: through shared memory on one machine (`shared_memory.py`), and else by sends, which took
24 ms for half of the bytes. Sums are in float32, in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.sharding.ranks import COLLECTIVE_ERRORS
from sharded_optim.storage import memory
from sharded_optim.zero.shared_memory import Receive, SharedMemoryTransport, shared_zeros

__all__ = ["ShardGroup", "Transfer", "all_reduce", "exchanges"]

# The parts of a tag, an int of 31 bits, from the highest bits: the serial of the ShardGroup, the number of the round or step, the bucket,
# and two bits for the kind of message. They are all in it so that a message that was never received is not taken for a later one.
SERIALS = ROUNDS = 2**7  # distinct values in a tag
BUCKETS = 2**15

_made: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()  # number of ShardGroups made over each process group


@dataclass(eq=False)
class Transfer:
    """A running transfer.

    Attributes:
        what: a description of the data, for error messages.
        arriving: a `Work` of torch, or a `Receive`, for each receive of this rank. On a GPU, waiting makes the current stream wait, not the
            host.
        finish: called once, when all of `arriving` have ended.
        leaving: the works of what other ranks receive from this one.
        held: buffers that must not be freed until all works have ended.
    """

    what: str = "nothing"
    arriving: Sequence[Any] = ()
    finish: Callable[[], object] | None = None
    leaving: Sequence[Any] = ()
    held: Sequence[Tensor] = ()

    @property
    def is_arriving(self) -> bool:
        """Return whether this rank has not yet waited for its result."""
        return bool(self.arriving) or self.finish is not None

    def wait(self) -> None:
        """Wait until this rank has its result.

        Raises:
            RuntimeError: a rank did not take part within the process group's timeout, or has ended.
        """
        if self.is_arriving:
            with naming_missing_data(self.what):
                for work in self.arriving:
                    work.wait()
            if self.finish is not None:
                self.finish()
            self.arriving, self.finish = (), None

    def settle(self) -> None:
        """Wait until the other ranks have their results too, so that the buffers may be written to.

        Raises:
            RuntimeError: as `wait`.
        """
        self.wait()
        self._end(self.leaving)

    def has_ended(self) -> bool:
        """Return whether all ranks have their results, so that the buffers may be freed.

        Does not wait for ranks that have yet to read this rank's shared memory. Waits for sends, which ranks that have come as far as this
        one receive.
        """
        if self.is_arriving or not all(work.has_come() for work in self.leaving if isinstance(work, Receive)):
            return False
        self._end([work for work in self.leaving if not isinstance(work, Receive)])
        return True

    def _end(self, leaving: Sequence[Any]) -> None:
        """Wait for works of `leaving`, and release the buffers."""
        with naming_missing_data(f"the acknowledgement of {self.what}"):
            for work in leaving:
                work.wait()
        self.leaving, self.held = (), ()


@contextmanager
def naming_missing_data(what: str) -> Iterator[None]:
    """Context in which an error of waiting for other ranks is replaced by one that says what data is missing.

    Raises:
        RuntimeError: instead of an error of torch.distributed or of the operating system.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        if type(error) not in COLLECTIVE_ERRORS and not isinstance(error, OSError):
            raise  # out of memory, for example
        raise RuntimeError(
            f"{what} did not arrive from the other ranks: one of them has raised an error, has ended or did not take part within the "
            f"process group's timeout. See its own error; if there is none, make every rank call backward and step equally often ({error})"
        ) from error


def exchanges(process_group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Return whether ranks exchange shards directly instead of by collectives: on CPUs under gloo, whose collectives are slower."""
    return process_group is not None and device.type == "cpu" and process_group._get_backend(device).name() == "gloo"


class ShardGroup:
    """The ranks over which flat buffers are sharded.

    Args:
        process_group: the process group of these ranks; construction is a collective over it. None: this process is alone.
        device: the device of the buffers.
        shares_memory: whether ranks of one machine read each other's buffers, if they can.

    Attributes:
        size, rank: the number of shards, and the index of this rank's shard.
        serial: counts the ShardGroups over the process group; the same on all ranks.
        exchanges: whether ranks exchange their shards directly.
        shared_memory: the transport between ranks that read each other's buffers.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, device: torch.device, *, shares_memory: bool = True) -> None:
        self._process_group = process_group
        self.serial = 0
        if process_group is not None:
            _made[process_group] = self.serial = _made.get(process_group, 0) + 1
        self.size = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.exchanges = exchanges(process_group, device)
        self.shared_memory = SharedMemoryTransport(process_group if self.exchanges and shares_memory else None)
        self._remote_ranks = [rank for rank in range(self.size) if rank != self.rank and rank not in self.shared_memory.ranks]

    @property
    def sends(self) -> bool:
        """Whether transfers run while this process computes; the same on every rank. Not so with shared memory alone, copied in `wait`."""
        return self.size > 1 and not self.shared_memory.are_all

    @property
    def scratch_shards(self) -> int:
        """The size, in shards, of the scratch memory of a reduce-scatter."""
        return len(self._remote_ranks) if self.exchanges else 0

    def zeros(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a zeroed buffer for the transfers of this group: (numel,). In shared memory if a rank can read it there."""
        if self.shared_memory.ranks and numel and device.type == "cpu":
            return shared_zeros(numel * dtype.itemsize).view(dtype)
        return memory.zeros_on(device, numel, dtype)

    def reduce_scatter(
        self,
        full: Tensor,  # (size * n,), from `zeros`; read-only
        shard: Tensor,  # (n,), any dtype; written: this rank's shard of the sum over ranks
        *,
        what: str,  # a description of the buffers
        number: int,  # number of the round
        place: int,  # index of the buffer in the round
        scratch: Tensor | None = None,  # (scratch_shards * n,) in full's dtype, if scratch_shards is not 0; written
    ) -> Transfer:
        """Sum the buffers of all ranks; each rank gets its shard of the sum."""
        if self._process_group is None:
            shard.copy_(full)
            return Transfer()
        if not self.exchanges:
            summed = shard if shard.dtype == full.dtype else torch.empty_like(shard, dtype=full.dtype)
            work = _reduce_scatter_single(summed, full, group=self._process_group, async_op=True)
            return Transfer(what, [work], None if summed is shard else lambda: shard.copy_(summed), held=(full, summed))
        own = full.split(shard.numel())
        received = dict(zip(self._remote_ranks, scratch.split(shard.numel()) if scratch is not None else (), strict=True))
        known = {self.rank: own[self.rank], **received}

        def add_up(read: Callable[[int], Tensor]) -> None:
            own_shard = slice(self.rank * shard.numel(), (self.rank + 1) * shard.numel())
            _sum([known[rank] if rank in known else read(rank)[own_shard] for rank in range(self.size)], shard)

        return self._exchange(what, full, own, received, add_up, self._tag(number, place, 0), scratch)

    def all_gather(
        self,
        full: Tensor,  # (size * n,), from `zeros`, with this rank's shard; the other shards are written
        *,
        what: str,  # a description of the buffers
        number: int,  # number of the step
        place: int,  # index of the buffer in the step
    ) -> Transfer:
        """Gather the shards of all ranks."""
        if self._process_group is None:
            return Transfer()
        shards = full.split(full.numel() // self.size)
        own = shards[self.rank]
        if not self.exchanges:
            return Transfer(what, [_all_gather_single(full, own, group=self._process_group, async_op=True)], held=(full,))

        def copy(read: Callable[[int], Tensor]) -> None:
            for rank in sorted(self.shared_memory.ranks):
                shards[rank].copy_(read(rank)[rank * own.numel() : (rank + 1) * own.numel()])

        received = {rank: shards[rank] for rank in self._remote_ranks}
        return self._exchange(what, full, [own] * self.size, received, copy, self._tag(number, place, 2), None)

    def _tag(self, number: int, place: int, kind: int) -> int:
        """Return the tag of a transfer. Acknowledgements of the transfer have that tag plus 1."""
        return ((self.serial % SERIALS * ROUNDS + number % ROUNDS) * BUCKETS + place % BUCKETS) * 4 + kind

    def _exchange(
        self,
        what: str,
        full: Tensor,
        sent: Sequence[Tensor],  # what each rank gets, by rank
        received: Mapping[int, Tensor],  # buffers to receive into, by rank: of ranks without shared memory
        finish: Callable[[Callable[[int], Tensor]], None],  # is called with a function: rank -> the `full` of that rank
        tag: int,
        scratch: Tensor | None,
    ) -> Transfer:
        """Exchange buffers with all other ranks: by sends, or on this machine by reading shared memory and acknowledging."""
        shared_memory, group = self.shared_memory, self._process_group
        ready = {rank: Receive(shared_memory, rank, tag) for rank in shared_memory.ranks}
        acknowledgements = [Receive(shared_memory, rank, tag + 1) for rank in shared_memory.ranks]
        later = [rank for rank in self._remote_ranks if rank > self.rank]  # put first, so that not all ranks send to the same rank first
        targets = later + [rank for rank in self._remote_ranks if rank < self.rank]
        with naming_missing_data(what):
            for rank in shared_memory.ranks:
                shared_memory.post(rank, tag, full)
            works = [dist.irecv(received[rank], group=group, group_src=rank, tag=tag) for rank in reversed(targets)]
            sends = [dist.isend(sent[rank], group=group, group_dst=rank, tag=tag) for rank in targets]

        def read(rank: int) -> Tensor:
            with naming_missing_data(what):
                buffer = shared_memory.read(rank, ready[rank].which)
            return buffer[: full.nbytes].view(full.dtype)

        def finish_and_acknowledge() -> None:
            finish(read)
            for rank in ready:
                with suppress(RuntimeError):  # the other process has ended, and needs no acknowledgement
                    shared_memory.post(rank, tag + 1)

        held = [full] if scratch is None else [full, scratch]
        return Transfer(what, [*works, *ready.values()], finish_and_acknowledge, [*sends, *acknowledgements], held)


def all_reduce(
    tensor: Tensor,  # written
    process_group: dist.ProcessGroup | None,
    what: str,
) -> Transfer:
    """Start to sum a tensor over the ranks of a process group, in place."""
    if process_group is None:
        return Transfer()
    with naming_missing_data(what):
        return Transfer(what, [dist.all_reduce(tensor, group=process_group, async_op=True)], held=(tensor,))


def _sum(parts: Sequence[Tensor], out: Tensor) -> None:
    """Write the sum of tensors of one dtype to `out`. Added in float32, in the order of `parts`, so that every run gives the same bits."""
    first, second, *rest = parts
    if out.dtype == first.dtype == torch.float32:
        torch.add(first, second, out=out)
        for part in rest:
            out.add_(part)
        return
    total = out.copy_(first) if out.dtype == torch.float32 else first.float()
    for part in (second, *rest):
        total.add_(part)
    if total is not out:
        out.copy_(total)


# Renamed in torch 2.13, where the old names warn.
_reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
