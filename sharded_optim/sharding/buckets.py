"""Plan flat buckets: the offsets of tensors that are laid end to end and cut into equal shards, one for each rank.

Arithmetic on sizes alone. Used by `zero/`, which allocates and communicates bucket by bucket, and by `tools/plan/`, which estimates memory
and time.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate

__all__ = ["ALIGNMENT", "IN_FLIGHT", "BucketPlan", "Size", "default_bucket_bytes", "plan_buckets"]

ALIGNMENT = 64  # bytes to which shards are aligned: a cache line, and enough for every vector load
SMALLEST_DEFAULT = 25 * 2**20  # bytes, as DistributedDataParallel's
IN_FLIGHT = 2  # buckets that are reduced at a time; their full gradients stay in memory meanwhile
LEAST_SHARD = 2**16  # bytes of a bucket per rank; padding, less than ALIGNMENT per rank, is then under 0.1 % of the bucket


@dataclass(frozen=True, kw_only=True)
class Size:
    """Number and size of the elements of one tensor."""

    numel: int
    itemsize: int  # bytes of an element
    kind: Hashable = None  # dtype, device and the like; only tensors of equal kind share a bucket


@dataclass(frozen=True, kw_only=True)
class BucketPlan:
    """Tensors that lie end to end in one flat buffer."""

    members: tuple[int, ...]  # indices of the tensors, in the order of memory
    offsets: tuple[int, ...]  # position of the first element of each member
    numel: int  # with the padding at the end; a multiple of the number of shards
    itemsize: int


def default_bucket_bytes(shards: int) -> int:
    """Default bucket size in bytes: 25 MiB, and more on more than 400 ranks."""
    return max(SMALLEST_DEFAULT, LEAST_SHARD * shards)


def plan_buckets(sizes: Sequence[Size], shards: int, bucket_bytes: int) -> list[BucketPlan]:
    """Fill buckets with tensors from the last to the first, which is about the order in which backward completes their gradients.

    A bucket is closed when the next tensor would make it larger than `bucket_bytes`; a larger tensor has a bucket of its own. In a bucket,
    tensors whose sizes are multiples of ALIGNMENT come first, so that all of them stay aligned.

    Args:
        sizes: the size of each tensor, in the order of use in the forward pass.
        shards: the number of equal shards of each bucket.
        bucket_bytes: the largest size of a bucket.

    Returns:
        The buckets, in the order in which backward completes them.
    """
    open_buckets: dict[Hashable, list[int]] = {}
    filled: dict[Hashable, int] = {}  # bytes in each open bucket
    closed: list[list[int]] = []
    for index in reversed(range(len(sizes))):
        size = sizes[index]
        bucket = open_buckets.setdefault(size.kind, [])
        added = size.numel * size.itemsize
        if bucket and filled[size.kind] + added > bucket_bytes:
            closed.append(bucket)
            bucket = open_buckets[size.kind] = []
        filled[size.kind] = added + (filled[size.kind] if bucket else 0)
        bucket.append(index)
    closed += open_buckets.values()
    closed.sort(key=lambda bucket: -bucket[-1])  # backward completes the lowest index, the last of a bucket, last
    return [_laid_out(bucket, sizes, shards) for bucket in closed]


def _laid_out(bucket: list[int], sizes: Sequence[Size], shards: int) -> BucketPlan:
    itemsize = sizes[bucket[0]].itemsize
    members = sorted(bucket, key=lambda index: sizes[index].numel * itemsize % ALIGNMENT != 0)
    *offsets, end = accumulate((sizes[index].numel for index in members), initial=0)
    unit = shards * (ALIGNMENT // itemsize)
    numel = -(-max(end, 1) // unit) * unit  # a bucket of empty tensors gets padding, so that no buffer is empty
    return BucketPlan(members=tuple(members), offsets=tuple(offsets), numel=numel, itemsize=itemsize)
