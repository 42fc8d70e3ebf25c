"""Gradient release under DistributedDataParallel: a communication hook averages a bucket while the bucket before is stepped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from collections.abc import Set as AbstractSet
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from sharded_optim.sharding.wrappers import StepUnit

__all__ = ["release"]

_bucket_releases: WeakKeyDictionary[DistributedDataParallel, _BucketRelease] = WeakKeyDictionary()


def release(model: nn.Module, optimized: AbstractSet[Tensor], step: StepUnit) -> Iterator[tuple[Collection[Tensor], Callable[[], None]]]:
    """Step the buckets of each DistributedDataParallel in a model within backward; see `Wrapper.release`."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            bucketed = {param for name, param in module.module.named_parameters() if name not in module.parameters_to_ignore}
            yield bucketed, _release_buckets(module, optimized, step)


def _release_buckets(model: DistributedDataParallel, optimized: AbstractSet[Tensor], step: StepUnit) -> Callable[[], None]:
    if model.find_unused_parameters:
        raise ValueError(
            "gradient release does not work with find_unused_parameters=True: in a bucket, unused parameters have gradients of zero like "
            "others; freeze the unused ones, or build DistributedDataParallel without it"
        )
    if model not in _bucket_releases:
        hook = _BucketRelease(model)
        try:
            model.register_comm_hook(None, hook.hook)
        except RuntimeError as error:
            raise ValueError("the DistributedDataParallel has a communication hook already, and it takes one; build it without") from error
        # So that DDP does not set `param.grad` again after the hook. Tried with torch 2.11 and 2.13.
        model.reducer._set_optimizer_in_backward()  # pyright: ignore[reportAttributeAccessIssue]
        _bucket_releases[model] = hook
    hook = _bucket_releases[model]
    hook.step, hook.optimized = step, optimized

    def remove() -> None:
        hook.step, hook.optimized = None, frozenset()

    return remove


class _BucketRelease:
    """DDP's communication hook: starts to average a bucket, and meanwhile steps the bucket before."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self.step: StepUnit | None = None  # None: only average
        self.optimized: AbstractSet[Tensor] = frozenset()  # the optimizer's parameters; gradients of other parameters stay
        self._process_group = model.process_group
        self._grads_are_views = model.gradient_as_bucket_view
        self._in_flight: tuple[Any, list[Tensor], list[Tensor]] | None = None

    def hook(self, _, bucket):  # GradBucket -> Future[Tensor]; unannotated, as DDP refuses the strings that annotations are in this file
        buffer = bucket.buffer()
        buffer.mul_(1.0 / dist.get_world_size(self._process_group))  # divided before the sum, as by DDP without a hook
        work = dist.all_reduce(buffer, group=self._process_group, async_op=True)
        assert work is not None, "asynchronous"
        if self._in_flight is None:
            Variable._execution_engine.queue_callback(self._finish)
        else:
            self._finish()
        self._in_flight = (work, bucket.parameters(), bucket.gradients())
        for param in self.optimized & set(bucket.parameters()):
            param.grad = None  # the bucket has it
        return work.get_future().then(lambda future: future.value()[0])

    def __reduce__(self) -> tuple[type[_NoBucketRelease], tuple[()]]:
        return _NoBucketRelease, ()

    def _finish(self) -> None:
        """Wait for the bucket in flight, set its gradients, and step its parameters."""
        assert self._in_flight is not None, "queued when it was filled"
        (work, params, grads), self._in_flight = self._in_flight, None
        work.wait()
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad if param in self.optimized or self._grads_are_views else grad.clone()
        if self.step is not None:
            self.step([param for param in params if param in self.optimized])


class _NoBucketRelease:
    """Replaces the hook in a copied DistributedDataParallel, which keeps the hook object but does not call it."""

    def hook(self, *_: object) -> None:
        raise RuntimeError("a copy of a DistributedDataParallel called the communication hook of gradient release; build it anew")
