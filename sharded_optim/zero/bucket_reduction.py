"""Fill buckets with gradients, and reduce each bucket to this rank's shard of the average.

    gradients -> contents of a bucket -> reduce-scatter (-> all-reduce over replicas) -> this rank's shard

Used by `reduction.py`, which decides when a bucket is reduced.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.sharding.buckets import IN_FLIGHT
from sharded_optim.zero import transfers
from sharded_optim.zero.bucket import Bucket, ParamSlot
from sharded_optim.zero.topology import Topology
from sharded_optim.zero.transfers import ShardGroup, Transfer

__all__ = ["BucketReducer"]


class BucketReducer:
    """Reduces filled buckets, a few at a time.

    Owns the temporary buffers of reductions (contents and scratch memory), and the transfers that use them.

    Args:
        topology: the ranks whose gradients are averaged.
        shard_group: the ranks that hold the shards of a bucket.
        keeps_contents: whether a bucket's full gradients stay allocated (ZeRO-1) or are freed once they are reduced (ZeRO-2).
        reduce_dtype: the dtype in which gradients are sent; None: the parameters'.

    Attributes:
        reduced: a WeakMethod; the method is called with each bucket whose gradients have been averaged.
    """

    def __init__(self, topology: Topology, shard_group: ShardGroup, *, keeps_contents: bool, reduce_dtype: torch.dtype | None) -> None:
        self.reduced: Callable[[], Callable[[Bucket], None] | None] = lambda: None
        self._shard_group, self._replica_group = shard_group, topology.replica_group
        self._scale = 1.0 if topology.all_ranks is None else 1.0 / dist.get_world_size(topology.all_ranks)
        self._keeps_contents = keeps_contents
        self._reduce_dtype = reduce_dtype
        self._contents = _Pool(shard_group.zeros)
        self._scratch = _Pool(lambda numel, dtype, device: torch.empty(numel, dtype=dtype, device=device))
        self._in_flight: deque[_Reduction] = deque()
        self._unsettled: list[Transfer] = []  # transfers of contents that do not belong to the pool

    @torch.no_grad()
    def fill(self, slot: ParamSlot, grad: Tensor, *, adds: bool) -> None:
        """Copy a gradient into its bucket, scaled for the average.

        Args:
            slot: the slot of the parameter.
            grad: the gradient, in the parameter's shape; read-only.
            adds: whether to add `grad` to the gradient of this parameter that is already in the bucket.

        Raises:
            ValueError: `grad` is sparse.
        """
        bucket = slot.bucket
        sends_alone = self._sends_alone(bucket)
        if grad.layout != torch.strided:
            raise ValueError(f"the gradient of {slot.name!r} is sparse ({grad.layout}); build the layer with sparse=False")
        if sends_alone and not adds and grad.is_contiguous() and grad.dtype == self._dtype(bucket):
            bucket.contents = grad.detach().view(-1)
            return
        if bucket.contents is None:
            bucket.contents = self._take_contents(bucket)
            bucket.contents[bucket.pad].zero_()
        elif sends_alone and adds:
            bucket.contents = bucket.contents.clone()  # the contents may be autograd's own memory
        target = bucket.contents[slot.whole_in_bucket].view(slot.param.shape)
        if adds:
            target.add_(grad, alpha=1.0 if sends_alone else self._scale)
        elif sends_alone:
            target.copy_(grad)
        elif target.element_size() <= grad.element_size():
            torch.mul(grad, self._scale, out=target)
        else:
            target.copy_(grad).mul_(self._scale)

    @torch.no_grad()
    def launch(self, bucket: Bucket, filled: Collection[ParamSlot], number: int) -> None:
        """Start to reduce a bucket, and finish the oldest reductions, so that at most `IN_FLIGHT` are left running.

        Args:
            bucket: the bucket to reduce.
            filled: the parameters with a gradient on this rank; zeros are sent for the others.
            number: the number of the round.
        """
        if bucket.contents is None:
            bucket.contents = self._take_contents(bucket).zero_()
        else:
            for slot in bucket.slots:
                if slot not in filled:
                    bucket.contents[slot.whole_in_bucket].zero_()
        self._in_flight.append(_Reduction(self._reduce(bucket, bucket.contents, number)))
        if self._replica_group is not None:
            for reduction in list(self._in_flight)[:-1]:  # earlier buckets start their all-reduce over replicas, in order
                reduction.leave_first_transfer()
        self.finish(except_last=IN_FLIGHT)

    def finish(self, *, except_last: int = 0) -> None:
        """Wait until all buckets are reduced, or all except the last few."""
        while len(self._in_flight) > except_last:
            self._in_flight[0].finish()
            self._in_flight.popleft()  # only now: if the wait fails, the next call waits again

    def settle(self) -> None:
        """Wait until all buckets are reduced and other ranks have read this rank's contents, which may then be filled again."""
        self.finish()
        for transfer in self._unsettled:
            transfer.settle()
        self._unsettled = []

    def _sends_alone(self, bucket: Bucket) -> bool:
        """Return whether a bucket has a single parameter whose gradient can be sent from autograd's memory, without a copy.

        It is then divided after the sum instead of before; so not in float16, whose sums overflow. The same on every rank.
        """
        if self._keeps_contents or self._replica_group is not None or self._shard_group.shared_memory.exist:
            return False
        return len(bucket.slots) == 1 and bucket.slots[0].param.numel() == bucket.numel and self._dtype(bucket) != torch.float16

    def _dtype(self, bucket: Bucket) -> torch.dtype:
        """Return the dtype in which the gradients of a bucket are sent."""
        return self._reduce_dtype or bucket.kind.dtype

    def _take_contents(self, bucket: Bucket) -> Tensor:
        return self._contents.take(bucket.numel, self._dtype(bucket), bucket.kind.device)

    def _reduce(self, bucket: Bucket, contents: Tensor, number: int) -> Iterator[Transfer]:
        """Reduce a bucket: a generator that yields each transfer it starts, to be resumed when the caller has waited for that transfer."""
        device = bucket.kind.device
        shard = bucket.grads if not bucket.has_gradient else self._scratch.take(bucket.shard_numel, bucket.grads.dtype, device)
        room = self._shard_group.scratch_shards * bucket.shard_numel
        scratch = self._scratch.take(room, contents.dtype, device) if room else None
        what = f"the gradients of {bucket.named}"
        transfer = self._shard_group.reduce_scatter(contents, shard, what=what, number=number, place=bucket.number, scratch=scratch)
        yield transfer
        if scratch is not None:
            self._scratch.give(scratch, Transfer())
        if self._keeps_contents or self._sends_alone(bucket):  # a bucket that is sent alone may be autograd's own memory
            self._unsettled.append(transfer)
        else:
            self._contents.give(contents, transfer)
        if not self._keeps_contents:
            bucket.contents = None
        if self._replica_group is not None:
            yield transfers.all_reduce(shard, self._replica_group, what)
        if self._sends_alone(bucket):
            shard.mul_(self._scale)
        if shard is not bucket.grads:
            bucket.grads.add_(shard)
            self._scratch.give(shard, Transfer())
        bucket.has_gradient = True
        if (reduced := self.reduced()) is not None:
            reduced(bucket)


class _Reduction:
    """A running reduction of one bucket. If a wait fails, it can be repeated: an error inside the generator would end that instead.

    Args:
        transfers: the generator of `_reduce`: starts the next transfer when the one before has been waited for.
    """

    def __init__(self, transfers: Iterator[Transfer]) -> None:
        self._transfers = transfers
        self._is_first = True
        self._transfer: Transfer | None = next(transfers)

    def leave_first_transfer(self) -> None:
        """Wait for the first transfer, unless that was done before, and start the next one."""
        if self._is_first:
            self._advance()

    def finish(self) -> None:
        """Wait for all transfers."""
        while self._transfer is not None:
            self._advance()

    def _advance(self) -> None:
        assert self._transfer is not None, "not finished"
        self._transfer.wait()
        self._is_first = False
        self._transfer = next(self._transfers, None)


class _Pool:
    """Flat buffers that are reused, because new memory would have to be mapped page by page.

    Args:
        make: allocates a buffer when no free one is large enough.
    """

    def __init__(self, make: Callable[[int, torch.dtype, torch.device], Tensor]) -> None:
        self._make = make
        self._free: list[tuple[Tensor, Transfer]] = []

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised buffer: (numel,)."""
        size = numel * dtype.itemsize
        fitting = [entry for entry in self._free if entry[0].device == device and entry[0].untyped_storage().nbytes() >= size]
        # If none fits, a free one is dropped, so that the pool never has more buffers than were in use at once.
        candidates = fitting or self._free[-1:]
        buffer, transfer = min(candidates, key=lambda entry: entry[0].untyped_storage().nbytes(), default=(None, Transfer()))
        self._free = [entry for entry in self._free if entry[0] is not buffer]
        transfer.settle()
        if buffer is None or not fitting:
            return self._make(numel, dtype, device)
        return torch.empty(0, dtype=dtype, device=device).set_(buffer.untyped_storage(), 0, (numel,), (1,))

    def give(self, buffer: Tensor, transfer: Transfer) -> None:
        """Return a buffer to the pool, for reuse once the transfer has ended on all ranks."""
        self._free.append((buffer, transfer))
