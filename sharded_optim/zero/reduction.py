"""Reduce the gradients of backward passes to the ranks that step them.

    hook of a parameter -> its bucket's contents -> reduce-scatter (-> all-reduce over replicas) -> this rank's shard of the average

A *round* is the reduction of one backward pass, with the passes inside it: every bucket is reduced once, in the same order on every rank.
A rank without a gradient for a bucket contributes zeros. At the end of a round the ranks exchange which parameters had a gradient on any
rank; the others are not stepped. A parameter may get a further gradient in a round after its bucket was reduced, as when it is used in
several reentrant checkpoints. The rank keeps that gradient, the ranks exchange that there is one, and all run a further round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NoReturn
from weakref import WeakMethod

import torch
from torch import Tensor

from sharded_optim.zero.bucket import Bucket, ParamSlot
from sharded_optim.zero.bucket_reduction import BucketReducer
from sharded_optim.zero.gradient_counts import GradientCounts
from sharded_optim.zero.passes import Passes
from sharded_optim.zero.topology import Topology
from sharded_optim.zero.transfers import ShardGroup

__all__ = ["Reducer"]


class Reducer:
    """Averages gradients over ranks, round by round.

    Owns the open round: the buckets that are left to reduce, and which parameters had a gradient on this rank. A `BucketReducer` reduces
    buckets, `GradientCounts` exchanges which parameters had gradients.

    Args:
        topology: the ranks whose gradients are averaged.
        shard_group: the ranks that hold the shards of a bucket.
        keeps_contents, reduce_dtype: see `BucketReducer`.

    Attributes:
        buckets: the buckets, in the order in which they are reduced.
        synchronizes: whether backward passes reduce gradients (in a round each), or leave them in the parameters (`no_sync`).
        is_open: whether a round has begun and not ended.
        rounds: the number of rounds since the last `collect`.
        has_unreduced: whether parameters have gradients of passes that did not synchronize.
    """

    def __init__(self, topology: Topology, shard_group: ShardGroup, *, keeps_contents: bool, reduce_dtype: torch.dtype | None) -> None:
        self.buckets: list[Bucket] = []
        self.synchronizes = True
        self.is_open = False
        self.rounds = 0
        self.has_unreduced = False
        self._bucket_reducer = BucketReducer(topology, shard_group, keeps_contents=keeps_contents, reduce_dtype=reduce_dtype)
        self._counts = GradientCounts(topology.all_ranks, shard_group.serial)
        self._passes = Passes(WeakMethod(self._pass_ended))
        self._round = 0
        self._left: deque[Bucket] = deque()  # buckets of the open round that are not yet being reduced
        self._used: set[ParamSlot] = set()  # parameters that had a gradient on this rank in the open round
        self._repeated: dict[ParamSlot, Tensor] = {}  # this rank's further gradients, which need another round

    def listen(self, reduced: WeakMethod[Callable[[Bucket], None]]) -> None:
        """From now on call a method with each bucket whose gradients have been averaged, as long as the method's object exists."""
        self._bucket_reducer.reduced = reduced

    # ---------------------------------------------------------------------------------------------------------------- in backward

    def ready(self, slot: ParamSlot) -> None:
        """Take a gradient out of its parameter. Called from the parameter's post-accumulate-grad hook.

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
            for bucket in self.buckets:  # so that autograd sets gradients instead of adding to placeholders
                for other in bucket.slots:
                    other.remove_placeholder()
            self._open()
        if slot in self._used and slot.bucket not in self._left:
            grad = slot.own_grad
            assert grad is not None, "a hook is called after a gradient"
            self._repeated[slot] = self._repeated[slot] + grad if slot in self._repeated else grad
            slot.param.grad = slot.placeholder
            return
        self._fill(slot)
        while self._left and self._is_full(self._left[0]):
            self._launch_next()

    def _pass_ended(self) -> None:
        if self.is_open:
            self._close()

    def _refuse_unended(self) -> NoReturn:
        raise RuntimeError(
            f"the last backward pass did not end: after an exception {self._left[0].named if self._left else 'its end'} is still to be "
            f"reduced, and the other ranks wait for it; let the exception end the job"
        )

    def run_round(self, slots: Iterable[ParamSlot] = ()) -> None:
        """Run a round outside of backward.

        Args:
            slots: parameters whose own or further gradients are reduced, besides all that passes without synchronization have left.
        """
        self._open()
        for slot in slots:
            if slot.own_grad is not None or slot in self._repeated:
                self._fill(slot)
        self._close()

    def _open(self) -> None:
        self._bucket_reducer.settle()
        self.is_open = True
        self._round += 1
        self._used = set()
        self._left = deque(bucket for bucket in self.buckets if any(slot.param.requires_grad for slot in bucket.slots))

    def _close(self) -> None:
        """Reduce the rest of the buckets, and exchange which parameters had gradients."""
        for slot in [slot for bucket in self._left for slot in bucket.slots] if self.has_unreduced else ():
            if slot not in self._used and slot.own_grad is not None:
                self._fill(slot)
        while self._left:
            self._launch_next()
        slots = [slot for bucket in self.buckets for slot in bucket.slots]
        what = f"the exchange of which parameters have gradients, from {self.buckets[0].named} on,"
        self._counts.exchange(slots, self._used, repeats=bool(self._repeated), what=what)
        self.is_open = False
        self.has_unreduced = False
        self.rounds += 1

    def _is_full(self, bucket: Bucket) -> bool:
        return all(slot in self._used or not slot.param.requires_grad for slot in bucket.slots)

    @torch.no_grad()
    def _fill(self, slot: ParamSlot) -> None:
        """Move a parameter's gradients into its bucket."""
        grad, further = slot.own_grad, self._repeated.pop(slot, None)
        if further is not None:
            grad = further if grad is None else grad + further
        assert grad is not None, "a hook is called after a gradient"
        self._bucket_reducer.fill(slot, grad, adds=slot in self._used)
        slot.param.grad = slot.placeholder
        self._used.add(slot)

    def _launch_next(self) -> None:
        self._bucket_reducer.launch(self._left.popleft(), self._used, self._round)

    # ------------------------------------------------------------------------------------------------------------- after backward

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until all gradients of the rounds so far are averaged."""
        while self._end_rounds():
            self.run_round(list(self._repeated))

    def _end_rounds(self) -> bool:
        """Wait for all rounds so far, and for the exchange of which parameters had gradients.

        Returns:
            Whether any rank has a further gradient of a parameter; all ranks must then run another round.
        """
        if self._passes.was_left or self._passes.is_any_running:
            self._refuse_unended()
        if self.is_open:
            self._close()
        self._bucket_reducer.finish()
        return self._counts.finish(self._repeated)

    def collect(self) -> set[ParamSlot]:
        """Finish all rounds since the last call.

        Returns:
            The parameters that had a gradient on any rank in any of these rounds.
        """
        self.finish()
        self.rounds = 0
        return self._counts.take()

    def forget(self) -> None:
        """Finish all rounds and drop their gradients."""
        self._end_rounds()
        self._counts.take()
        self._repeated = {}
        self.rounds = 0
