"""Gradients on their way from backward to the ranks that step them.

    hook of a parameter -> its bucket's contents -> reduce-scatter (-> all-reduce over replicas) -> this rank's shard of the average

A *round* is what one backward pass does: every bucket is reduced once, in the same order on every rank, also where a rank has no gradient
for it: then it brings zeros. At its end the ranks tell each other which parameters had a gradient anywhere; the others are not stepped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable

from sharded_optim.buckets import IN_FLIGHT
from sharded_optim.zero import transfers
from sharded_optim.zero.bucket import Bucket, Home
from sharded_optim.zero.transfers import Transfer

__all__ = ["Pool", "Reducer", "tag_of", "wait"]

ROUNDS = 2**14  # that a tag tells apart: a rank that has left one out must not be paired with others' next one


class Pool:
    """Flat buffers that are used again: memory that is new has to be mapped page by page."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []  # uint8

    def take(self, numel: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Anything in (numel,), on the device of `like`."""
        size = numel * dtype.itemsize
        fitting = [buffer for buffer in self._free if buffer.device == like.device and buffer.numel() >= size]
        if fitting:
            buffer = min(fitting, key=Tensor.numel)
            self._free = [each for each in self._free if each is not buffer]
        else:  # too small ones are let go, so that there are never more than were in use together
            self._free = self._free[:-1]
            buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        return buffer[:size].view(dtype)

    def give(self, buffer: Tensor | None) -> None:
        """Back."""
        if buffer is not None:
            self._free.append(torch.empty(0, dtype=torch.uint8, device=buffer.device).set_(buffer.untyped_storage()))


class Reducer:
    """Averages gradients over ranks, bucket by bucket.

    Args:
        shard_group: the ranks that hold the shards of a bucket; None: this one alone.
        replica_group: the ranks that hold the same shard; None: this one alone.
        all_ranks: both together; None: this one alone.
        keeps_contents: whether a bucket's full gradients stay allocated (ZeRO-1) or are returned once they are reduced (ZeRO-2).
        reduce_dtype: in which gradients are added up; None is the parameters'.
        arrived: is told of each bucket whose gradients are averaged.

    Attributes:
        buckets: in the order in which they are reduced.
        synchronizes: whether a backward pass is a round, or leaves its gradients in the parameters.
        rounds: how many were run since `collect`.
        has_unreduced: whether parameters have gradients of passes that did not synchronize.
    """

    def __init__(
        self,
        *,
        shard_group: dist.ProcessGroup | None,
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
        self._scale = 1.0 if all_ranks is None else 1.0 / dist.get_world_size(all_ranks)
        self._keeps_contents = keeps_contents
        self._reduce_dtype = reduce_dtype
        self._arrived = arrived
        self._pool = Pool()
        self._round = 0
        self._is_open = False
        self._left: deque[Bucket] = deque()  # of the open round, not yet being reduced
        self._used: set[Home] = set()  # whose gradients this rank brings to the open round
        self._in_flight: deque[_Reduction] = deque()
        self._told: list[_Told] = []

    # ---------------------------------------------------------------------------------------------------------------- in backward

    def ready(self, home: Home) -> None:
        """Take the gradient of a parameter from it: a post-accumulate-grad hook.

        Raises:
            RuntimeError: the backward pass before this one did not end, or other ranks did not take part.
        """
        if not self.synchronizes:
            self.has_unreduced = True
            return
        if not self._is_open:
            self._open()
            Variable._execution_engine.queue_callback(self._close)
        if home in self._used:
            raise RuntimeError(
                f"{home.name!r} got a gradient twice in one backward pass, or an exception ended the pass before, and the ranks are no "
                f"longer at the same place; let such an exception end the job, and run a part of the model that is used twice in one "
                f"piece (checkpoint(..., use_reentrant=False))"
            )
        self._fill(home)
        while self._left and self._is_full(self._left[0]):
            self._launch(self._left.popleft())

    def run_round(self) -> None:
        """A round outside of backward: with the gradients that passes without synchronization have left, or with none."""
        self._open()
        self._close()

    def _open(self) -> None:
        self.finish()  # before its buffers are filled again
        self._is_open = True
        self._round += 1
        self._used = set()
        self._left = deque(bucket for bucket in self.buckets if any(home.param.requires_grad for home in bucket.homes))

    def _close(self) -> None:
        """Reduce what is left, and tell the other ranks what was used: an autograd callback, at the end of a backward pass."""
        homes = [home for bucket in self.buckets for home in bucket.homes]
        for home in [home for bucket in self._left for home in bucket.homes] if self.has_unreduced else ():
            if home not in self._used and home.param.grad is not None:
                self._fill(home)
        while self._left:
            self._launch(self._left.popleft())
        used = torch.tensor([home in self._used for home in homes], dtype=torch.int32)
        told = used.to(homes[0].param.device, non_blocking=True)
        self._told.append(_Told(transfer=transfers.all_reduce(told, self._all_ranks), counts=told, homes=homes, all_used=bool(used.all())))
        self._is_open = False
        self.has_unreduced = False
        self.rounds += 1

    def _is_full(self, bucket: Bucket) -> bool:
        return all(home in self._used or not home.param.requires_grad for home in bucket.homes)

    @torch.no_grad()
    def _fill(self, home: Home) -> None:
        """Move a gradient into its bucket."""
        grad, bucket = home.param.grad, home.bucket
        assert grad is not None, "a hook is called with one"
        if grad.layout != torch.strided:
            raise ValueError(f"the gradient of {home.name!r} is sparse ({grad.layout}); build the layer with sparse=False")
        if self._sends_alone(bucket) and grad.is_contiguous() and grad.dtype == self._dtype(bucket):
            bucket.contents = grad.detach().view(-1)
        else:
            if bucket.contents is None:
                bucket.contents = self._take_contents(bucket)
                bucket.contents[bucket.pad].zero_()
            place = bucket.contents[home.whole_in_bucket].view(home.param.shape)
            if self._sends_alone(bucket):
                place.copy_(grad)
            elif place.dtype == grad.dtype:
                torch.mul(grad, self._scale, out=place)
            else:
                place.copy_(grad).mul_(self._scale)
        home.param.grad = None
        self._used.add(home)

    def _sends_alone(self, bucket: Bucket) -> bool:
        """Whether a bucket holds one gradient and nothing else, which can be sent from where it is, and is divided when it is added up.

        The same on every rank. Not in float16, whose sums overflow.
        """
        is_alone = len(bucket.homes) == 1 and bucket.homes[0].param.numel() == bucket.numel
        return is_alone and not self._keeps_contents and self._dtype(bucket) != torch.float16

    def _dtype(self, bucket: Bucket) -> torch.dtype:
        """In which its gradients are sent."""
        return self._reduce_dtype or bucket.kind.dtype

    def _take_contents(self, bucket: Bucket) -> Tensor:
        return self._pool.take(bucket.numel, bucket.values, self._dtype(bucket))

    @torch.no_grad()
    def _launch(self, bucket: Bucket) -> None:
        """Begin to reduce a bucket, and finish one before it, so that few are in memory at a time."""
        if bucket.contents is None:
            bucket.contents = self._take_contents(bucket).zero_()
        elif not self._is_filled(bucket):
            for home in bucket.homes:
                if home not in self._used:
                    bucket.contents[home.whole_in_bucket].zero_()
        self._in_flight.append(_Reduction(bucket, self._reduce(bucket)))
        if self._replica_group is not None:
            for reduction in list(self._in_flight)[:-1]:
                reduction.leave_first_stage()
        while len(self._in_flight) > IN_FLIGHT:
            self._in_flight.popleft().finish()

    def _is_filled(self, bucket: Bucket) -> bool:
        return all(home in self._used for home in bucket.homes)

    def _reduce(self, bucket: Bucket) -> Iterator[Transfer]:
        """What happens to a bucket's contents, from one transfer to the next."""
        contents = bucket.contents
        assert contents is not None, "filled"
        shard = bucket.grads if not bucket.has_gradient else self._pool.take(bucket.shard_numel, contents, bucket.grads.dtype)
        scratch = None
        if transfers.needs_scratch(contents, self._shard_group):
            scratch = self._pool.take(bucket.numel - bucket.shard_numel, contents, contents.dtype)
        tag = tag_of(bucket, self._round, gathers=False)
        yield transfers.reduce_scatter(contents, shard, self._shard_group, tag=tag, scratch=scratch)
        self._pool.give(scratch)
        if not self._keeps_contents:
            if not self._sends_alone(bucket):  # else it is autograd's
                self._pool.give(contents)
            bucket.contents = None
        if self._replica_group is not None:
            yield transfers.all_reduce(shard, self._replica_group)
        if self._sends_alone(bucket):
            shard.mul_(self._scale)
        if shard is not bucket.grads:
            bucket.grads.add_(shard)
            self._pool.give(shard)
        bucket.has_gradient = True
        self._arrived(bucket)

    # ------------------------------------------------------------------------------------------------------------- after backward

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until all gradients of the rounds so far are averaged."""
        if self._is_open:
            raise RuntimeError(
                f"the last backward pass did not end: an exception left {self._left[0].named if self._left else 'its end'} to be reduced, "
                f"for which the other ranks wait; let the exception end the job"
            )
        while self._in_flight:
            self._in_flight.popleft().finish()

    def collect(self) -> set[Home]:
        """Finish all rounds since the last time.

        Returns:
            The parameters that had a gradient on any rank in any of them.
        """
        self.finish()
        found: set[Home] = set()
        for told in self._told:
            wait(told.transfer, "what the ranks tell each other at the end of a backward pass")
            # A rank that had all gradients knows the answer without waiting for a device.
            found.update(told.homes if told.all_used else compress(told.homes, told.counts.tolist()))
        self._told.clear()
        self.rounds = 0
        return found


@dataclass(frozen=True, kw_only=True)
class _Told:
    """On how many ranks each parameter had a gradient in a round."""

    transfer: Transfer
    counts: Tensor  # int32 (parameters,), complete after the transfer
    homes: list[Home]
    all_used: bool  # whether this rank had one of each


class _Reduction:
    """Of one bucket, while it is in flight."""

    def __init__(self, bucket: Bucket, stages: Iterator[Transfer]) -> None:
        self._named = bucket.named
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
        wait(self._transfer, f"the gradients of {self._named}")
        self._is_first = False
        self._transfer = next(self._stages, None)


def wait(transfer: Transfer, what: str) -> None:
    """Wait for a transfer.

    Raises:
        RuntimeError: it did not end; says of what it was.
    """
    try:
        transfer.wait()
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} did not come from the other ranks: one of them has raised an error, has died or did not get there in the process "
            f"group's timeout. Its own error says why; if there is none, make every rank call backward and step equally often, and no_sync "
            f"on all of them or on none ({error})"
        ) from error


def tag_of(bucket: Bucket, number: int, *, gathers: bool) -> int:
    """Of a transfer between ranks, by the number of the round or step: those of different rounds are not taken for each other."""
    return (number % ROUNDS) << 16 | bucket.number << 1 | gathers
