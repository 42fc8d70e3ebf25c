"""Reduce gradients from backward to the ranks that step them.

    hook of a parameter -> its bucket's contents -> reduce-scatter (-> all-reduce over replicas) -> this rank's shard of the average

A *round* is what one backward pass does, with the passes inside it: every bucket is reduced once, in the same order on every rank, also
where a rank has no gradient for it: then it brings zeros. At its end the ranks tell each other which parameters had a gradient anywhere;
the others are not stepped. A parameter that gets a further gradient in a round, when its bucket is on its way, keeps it: reentrant
checkpoints do that to parameters that are used in several of them. The ranks tell each other that too, and run a further round for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import compress
from typing import NoReturn
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.sharding.buckets import IN_FLIGHT
from sharded_optim.storage.devices import known_on_host
from sharded_optim.zero import transfers
from sharded_optim.zero.bucket import Bucket, ParamSlot
from sharded_optim.zero.passes import Passes
from sharded_optim.zero.transfers import ShardGroup, Transfer

__all__ = ["Pool", "Reducer"]


class Pool:
    """A pool of flat buffers: new memory would have to be mapped page by page."""

    def __init__(self, make: Callable[[int, torch.dtype, torch.device], Tensor]) -> None:
        self._make = make
        self._free: list[tuple[Tensor, Transfer]] = []

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised buffer: (numel,)."""
        size = numel * dtype.itemsize
        fitting = [each for each in self._free if each[0].device == device and each[0].untyped_storage().nbytes() >= size]
        # One that is too small is let go, so that there are never more than were in use together.
        buffer, transfer = min(fitting or self._free[-1:], key=lambda each: each[0].untyped_storage().nbytes(), default=(None, Transfer()))
        self._free = [each for each in self._free if each[0] is not buffer]
        transfer.settle()
        if buffer is None or not fitting:
            return self._make(numel, dtype, device)
        return torch.empty(0, dtype=dtype, device=device).set_(buffer.untyped_storage(), 0, (numel,), (1,))

    def give(self, buffer: Tensor, transfer: Transfer) -> None:
        """Give a buffer back, to be used again when the transfer has ended for other ranks too."""
        self._free.append((buffer, transfer))


class Reducer:
    """Averages gradients over ranks, bucket by bucket.

    Args:
        shard_group: the ranks that hold the shards of a bucket.
        replica_group: the ranks that hold the same shard; None: this one alone.
        all_ranks: both together; None: this one alone.
        keeps_contents: whether a bucket's full gradients stay allocated (ZeRO-1) or are returned once they are reduced (ZeRO-2).
        reduce_dtype: in which gradients are added up; None is the parameters'.
        arrived: is called with each bucket whose gradients are averaged.

    Attributes:
        buckets: in the order in which they are reduced.
        synchronizes: whether a backward pass is a round, or leaves its gradients in the parameters.
        is_open: whether a round has begun and not ended.
        rounds: how many were run since `collect`.
        has_unreduced: whether parameters have gradients of passes that did not synchronize.
    """

    def __init__(
        self,
        *,
        shard_group: ShardGroup,
        replica_group: dist.ProcessGroup | None,
        all_ranks: dist.ProcessGroup | None,
        keeps_contents: bool,
        reduce_dtype: torch.dtype | None,
        arrived: Callable[[Bucket], None],
    ) -> None:
        self.buckets: list[Bucket] = []
        self.synchronizes = True
        self.rounds = 0
        self.has_unreduced = False
        self._shard_group, self._replica_group, self._all_ranks = shard_group, replica_group, all_ranks
        self._ranks = 1 if all_ranks is None else dist.get_world_size(all_ranks)
        self._scale = 1.0 / self._ranks
        self._keeps_contents = keeps_contents
        self._reduce_dtype = reduce_dtype
        self._arrived = arrived
        self._contents = Pool(shard_group.zeros)
        self._scratch = Pool(_empty)
        self._round = 0
        self.is_open = False
        self._passes = Passes(WeakMethod(self._pass_ended))
        self._left: deque[Bucket] = deque()  # of the open round, not yet being reduced
        self._used: set[ParamSlot] = set()  # whose gradients this rank brings to the open round
        self._repeated: dict[ParamSlot, Tensor] = {}  # further gradients, for which a round is to be run
        self._in_flight: deque[_Reduction] = deque()
        self._unsettled: list[Transfer] = []  # of contents that are not the pool's
        self._pending: list[_GradientCounts] = []
        self._found: set[ParamSlot] = set()  # that had a gradient on any rank, as far as it is known

    # ---------------------------------------------------------------------------------------------------------------- in backward

    def ready(self, slot: ParamSlot) -> None:
        """Take the gradient of a parameter from it: a post-accumulate-grad hook.

        Raises:
            RuntimeError: the backward pass before this one did not end, or other ranks did not take part.
        """
        if slot.own_grad is None:
            slot.param.grad = slot.placeholder.take_added()
        if not self.synchronizes:
            self.has_unreduced = True
            return
        if self._passes.was_left:
            self._refuse_unended()
        self._passes.enter()
        if not self.is_open:
            for bucket in self.buckets:  # so that autograd need not add to it
                for each in bucket.slots:
                    each.remove_placeholder()
            self._open()
        if slot in self._used and slot.bucket not in self._left:
            grad = slot.own_grad
            assert grad is not None, "a hook is called with one"
            self._repeated[slot] = self._repeated[slot] + grad if slot in self._repeated else grad
            slot.param.grad = slot.placeholder
            return
        self._fill(slot)
        while self._left and self._is_full(self._left[0]):
            self._launch(self._left.popleft())

    def _pass_ended(self) -> None:
        if self.is_open:
            self._close()

    def _refuse_unended(self) -> NoReturn:
        raise RuntimeError(
            f"the last backward pass did not end: an exception left {self._left[0].named if self._left else 'its end'} to be reduced, for "
            f"which the other ranks wait; let the exception end the job"
        )

    def run_round(self, slots: Iterable[ParamSlot] = ()) -> None:
        """Run a round outside of backward, with gradients that passes without synchronization have left."""
        self._open()
        for slot in slots:
            if slot.own_grad is not None or slot in self._repeated:
                self._fill(slot)
        self._close()

    def _open(self) -> None:
        self._finish_in_flight()
        for transfer in self._unsettled:  # before its buffers are filled again
            transfer.settle()
        self._unsettled = []
        self.is_open = True
        self._round += 1
        self._used = set()
        self._left = deque(bucket for bucket in self.buckets if any(slot.param.requires_grad for slot in bucket.slots))

    def _close(self) -> None:
        """Reduce the rest of the buckets, and exchange which parameters had gradients."""
        slots = [slot for bucket in self.buckets for slot in bucket.slots]
        for slot in [slot for bucket in self._left for slot in bucket.slots] if self.has_unreduced else ():
            if slot not in self._used and slot.own_grad is not None:
                self._fill(slot)
        while self._left:
            self._launch(self._left.popleft())
        last = [self._shard_group.serial, bool(self._repeated)]
        used = torch.tensor([slot in self._used for slot in slots] + last, dtype=torch.int32)
        counts = used.to(slots[0].param.device, non_blocking=True)
        what = f"which gradients there are, of {self.buckets[0].named} and all others,"
        transfer = transfers.all_reduce(counts, self._all_ranks, what)
        is_known = len(self._used) == len(slots) and not self._repeated
        self._pending.append(_GradientCounts(transfer=transfer, counts=counts, slots=slots, is_known=is_known))
        self.is_open = False
        self.has_unreduced = False
        self.rounds += 1

    def _is_full(self, bucket: Bucket) -> bool:
        return all(slot in self._used or not slot.param.requires_grad for slot in bucket.slots)

    @torch.no_grad()
    def _fill(self, slot: ParamSlot) -> None:
        """Move a gradient into its bucket."""
        grad, bucket = slot.own_grad, slot.bucket
        further = self._repeated.pop(slot, None)
        if further is not None:
            grad = further if grad is None else grad + further
        assert grad is not None, "a hook is called with one"
        if grad.layout != torch.strided:
            raise ValueError(f"the gradient of {slot.name!r} is sparse ({grad.layout}); build the layer with sparse=False")
        if self._sends_alone(bucket) and slot in self._used and bucket.contents is not None:
            bucket.contents = bucket.contents.clone()  # it may be autograd's own memory
        if self._sends_alone(bucket) and slot not in self._used and grad.is_contiguous() and grad.dtype == self._dtype(bucket):
            bucket.contents = grad.detach().view(-1)
        else:
            if bucket.contents is None:
                bucket.contents = self._take_contents(bucket)
                bucket.contents[bucket.pad].zero_()
            place = bucket.contents[slot.whole_in_bucket].view(slot.param.shape)
            if slot in self._used:
                place.add_(grad, alpha=1.0 if self._sends_alone(bucket) else self._scale)
            elif self._sends_alone(bucket):
                place.copy_(grad)
            elif place.element_size() <= grad.element_size():
                torch.mul(grad, self._scale, out=place)
            else:
                place.copy_(grad).mul_(self._scale)
        slot.param.grad = slot.placeholder
        self._used.add(slot)

    def _sends_alone(self, bucket: Bucket) -> bool:
        """Return whether a bucket holds a single gradient, which can be sent from its own memory and is divided when it is summed.

        The same on every rank. Not in float16, whose sums overflow.
        """
        if self._keeps_contents or self._replica_group is not None or self._shard_group.shared_memory.exist:
            return False
        return len(bucket.slots) == 1 and bucket.slots[0].param.numel() == bucket.numel and self._dtype(bucket) != torch.float16

    def _dtype(self, bucket: Bucket) -> torch.dtype:
        """Return the dtype in which the gradients of a bucket are sent."""
        return self._reduce_dtype or bucket.kind.dtype

    def _take_contents(self, bucket: Bucket) -> Tensor:
        return self._contents.take(bucket.numel, self._dtype(bucket), bucket.kind.device)

    @torch.no_grad()
    def _launch(self, bucket: Bucket) -> None:
        """Start to reduce a bucket, and finish an earlier one, so that few are in memory at a time."""
        if bucket.contents is None:
            bucket.contents = self._take_contents(bucket).zero_()
        elif not self._is_filled(bucket):
            for slot in bucket.slots:
                if slot not in self._used:
                    bucket.contents[slot.whole_in_bucket].zero_()
        self._in_flight.append(_Reduction(self._reduce(bucket)))
        if self._replica_group is not None:
            for reduction in list(self._in_flight)[:-1]:
                reduction.leave_first_stage()
        while len(self._in_flight) > IN_FLIGHT:
            self._in_flight.popleft().finish()

    def _is_filled(self, bucket: Bucket) -> bool:
        return all(slot in self._used for slot in bucket.slots)

    def _reduce(self, bucket: Bucket) -> Iterator[Transfer]:
        """Reduce a bucket: a generator that yields each transfer to be waited for."""
        contents = bucket.contents
        assert contents is not None, "filled"
        device = bucket.kind.device
        shard = bucket.grads if not bucket.has_gradient else self._scratch.take(bucket.shard_numel, bucket.grads.dtype, device)
        room = self._shard_group.scratch_shards * bucket.shard_numel
        scratch = self._scratch.take(room, contents.dtype, device) if room else None
        what = f"the gradients of {bucket.named}"
        transfer = self._shard_group.reduce_scatter(contents, shard, what=what, number=self._round, place=bucket.number, scratch=scratch)
        yield transfer
        if scratch is not None:
            self._scratch.give(scratch, Transfer())
        if self._keeps_contents:
            self._unsettled.append(transfer)
        else:
            if self._sends_alone(bucket):  # autograd's own memory
                self._unsettled.append(transfer)
            else:
                self._contents.give(contents, transfer)
            bucket.contents = None
        if self._replica_group is not None:
            yield transfers.all_reduce(shard, self._replica_group, what)
        if self._sends_alone(bucket):
            shard.mul_(self._scale)
        if shard is not bucket.grads:
            bucket.grads.add_(shard)
            self._scratch.give(shard, Transfer())
        bucket.has_gradient = True
        self._arrived(bucket)

    # ------------------------------------------------------------------------------------------------------------- after backward

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until all gradients of the rounds so far are averaged."""
        while self._end_rounds():
            self.run_round(list(self._repeated))

    def _end_rounds(self) -> bool:
        """Wait for all rounds so far, and for the exchange of which parameters had gradients.

        Returns:
            Whether a rank has a further gradient of a parameter, for which all are to run a further round.
        """
        if self._passes.was_left or self._passes.is_any_running:
            self._refuse_unended()
        if self.is_open:
            self._close()
        self._finish_in_flight()
        repeating = 0
        for counted in self._pending:
            repeating = self._read(counted)  # of the last: a round brings what was left of the one before
        self._pending.clear()
        return repeating > 0

    def _finish_in_flight(self) -> None:
        while self._in_flight:
            self._in_flight.popleft().finish()

    def _read(self, counted: _GradientCounts) -> int:
        """Read which parameters had a gradient on any rank in a round; return the number of ranks with a further gradient."""
        counted.transfer.wait()
        if counted.is_known and not known_on_host(counted.counts):  # this rank knows the answer without waiting for the device
            self._found.update(counted.slots)
            return 0
        *counts, serials, repeating = counted.counts.tolist()
        if serials != self._shard_group.serial * self._ranks:
            raise RuntimeError(
                "ranks have run backward passes for several ShardedOptimizers in different orders; run them in one order, with a "
                "gradient for each optimizer on every rank"
            )
        if repeating not in (0, self._ranks) and not known_on_host(counted.counts):  # a rank that has not looked runs no further round
            here = "".join(f", here {slot.name!r}" for slot in self._repeated)
            raise RuntimeError(
                f"parameters got several gradients in one backward pass on {repeating} of {self._ranks} ranks{here}, from several "
                f"reentrant checkpoints; let all ranks do so or none, or checkpoint with use_reentrant=False"
            )
        self._found.update(compress(counted.slots, counts))
        return repeating

    def collect(self) -> set[ParamSlot]:
        """Finish all rounds since the last call.

        Returns:
            The parameters that had a gradient on any rank in any of them.
        """
        self.finish()
        found, self._found = self._found, set()
        self.rounds = 0
        return found

    def forget(self) -> None:
        """Finish all rounds and drop their gradients."""
        self._end_rounds()
        self._found = set()
        self._repeated = {}
        self.rounds = 0


def _empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(numel, dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class _GradientCounts:
    """Counts the ranks on which each parameter had a gradient in a round."""

    transfer: Transfer
    counts: Tensor  # int32 (parameters + 2,), complete after the transfer; the last are the sum of what the ranks call their optimizer,
    # and on how many of them a parameter has a further gradient
    slots: list[ParamSlot]
    is_known: bool  # whether this rank had one of each, and none further


class _Reduction:
    """The running reduction of one bucket."""

    def __init__(self, stages: Iterator[Transfer]) -> None:
        self._stages = stages
        self._transfer: Transfer | None = next(stages)
        self._is_first = True

    def leave_first_stage(self) -> None:
        if self._is_first:
            self._advance()

    def finish(self) -> None:
        while self._transfer is not None:
            self._advance()

    def _advance(self) -> None:
        assert self._transfer is not None, "not finished"
        self._transfer.wait()
        self._is_first = False
        self._transfer = next(self._stages, None)
