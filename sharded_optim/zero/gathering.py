"""All-gather the updated parameters, bucket by bucket, while the update of other buckets and the next forward pass run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch

from sharded_optim.zero.bucket import Bucket
from sharded_optim.zero.bucket_layout import unit_of
from sharded_optim.zero.transfers import ShardGroup

__all__ = ["Gatherer"]


class Gatherer:
    """Starts the all-gather of each bucket as soon as the bucket is updated. A listener of the optimizer inside.

    All ranks start the all-gathers in the same order, that of the next forward pass, also ranks that step no elements of a bucket.

    Attributes:
        is_pending: whether a transfer may still have to be waited for.
    """

    def __init__(self, shard_group: ShardGroup) -> None:
        self._shard_group = shard_group
        self._left: list[Bucket] = []  # buckets of this step whose all-gather has not been started, in order
        self._happens = False
        self._step = 0
        self.is_pending = False

    def begin(self, buckets: Sequence[Bucket], changed: Collection[Bucket]) -> None:
        """Prepare for a step.

        Args:
            buckets: all buckets, in the order in which gradients are reduced.
            changed: the buckets in which any rank steps a parameter.
        """
        self._left = [bucket for bucket in reversed(buckets) if bucket in changed]
        self._happens = False
        self._step += 1

    def updating(self) -> None:
        self._happens = True

    def updated(self, unit: int) -> None:
        while self._left and unit_of(self._left[0]) <= unit:
            self._gather(self._left.pop(0))

    def end(self) -> None:
        """End a step: gather the buckets that are left, if the step happened."""
        for bucket in self._left if self._happens else ():
            self._gather(bucket)
        self._left = []

    @torch.no_grad()
    def _gather(self, bucket: Bucket) -> None:
        bucket.round_masters()
        self.is_pending = True
        what = f"the parameters of {bucket.named}"
        bucket.gathering = self._shard_group.all_gather(bucket.values, what=what, number=self._step, place=bucket.number)

    def wait(self, buckets: Iterable[Bucket], *, settles: bool = False) -> None:
        """Wait until this rank has the buckets' parameters; with `settles`, until all ranks have, so that these may be changed."""
        for bucket in buckets:
            if settles:
                bucket.gathering.settle()
            else:
                bucket.gathering.wait()

    def wait_for_all(self, buckets: Iterable[Bucket], *, settles: bool) -> list[Bucket]:
        """Wait for all buckets; return those for which this rank had not waited before."""
        if not self.is_pending:
            return []
        buckets = list(buckets)
        pending = [bucket for bucket in buckets if bucket.gathering.is_arriving]
        self.wait(buckets, settles=settles)
        self.is_pending = not settles
        return pending
