"""Add parameters to a ShardedOptimizer: at construction, in a later param group, or when a frozen parameter becomes trainable.

A parameter is stepped by the optimizer to which it was added last. Earlier optimizers of it are superseded, and refuse to step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import count
from weakref import WeakSet, finalize

import torch.distributed as dist
from torch import Tensor, nn

from sharded_optim.sharding.ranks import raising_together
from sharded_optim.step.engine import Engine
from sharded_optim.step.param_groups import named_params
from sharded_optim.zero.arguments import groups_of, tensors_of
from sharded_optim.zero.bucket import Bucket
from sharded_optim.zero.bucket_layout import BucketLayout, Group
from sharded_optim.zero.forward import ForwardHooks
from sharded_optim.zero.gathering import Gatherer
from sharded_optim.zero.gradients import ShardedGradients, call_and_drop

__all__ = ["ShardedParams", "wait_for_others"]

_numbers = count()  # numbers ShardedParams in the order of creation, the same on all ranks
_in_use: WeakSet[ShardedParams] = WeakSet()  # those of optimizers that are neither freed nor superseded


class ShardedParams:
    """The parameters of a ShardedOptimizer: the same on every rank, added on all ranks or on none.

    Owns the forward hooks, and the flag whether the optimizer is superseded. Removes all hooks when the optimizer is superseded or freed.

    Args:
        all_ranks: the ranks that hold the parameters; None: this process is alone.
        bucket_layout: the parameters' buckets; buckets of new parameters are added to it.
        engine: the optimizer inside, to whose param groups new parameters are added.
        gatherer: gathers the parameters after a step.
        gradients: the parameters' gradients.
        model: the model whose modules wait for the gatherer in their forward passes; None: only `wait` waits.

    Attributes:
        is_superseded: whether a parameter was later added to another optimizer.
    """

    def __init__(
        self,
        all_ranks: dist.ProcessGroup | None,
        bucket_layout: BucketLayout,
        engine: Engine,
        gatherer: Gatherer,
        gradients: ShardedGradients,
        model: nn.Module | None,
    ) -> None:
        self.is_superseded = False
        self._all_ranks, self._bucket_layout = all_ranks, bucket_layout
        self._engine, self._gatherer, self._gradients = engine, gatherer, gradients
        self._number = next(_numbers)
        self._removals = [gradients.remove_hooks]
        if model is not None:
            self._removals.append(ForwardHooks(model, gatherer, bucket_layout.slots).release)
        # Not when Python exits: process groups may have ended by then, and the memory is freed anyway.
        finalize(self, _clean_up, self._removals, bucket_layout).atexit = False

    def take_up(self, buckets: Sequence[Bucket]) -> None:
        """Start to optimize the parameters in these buckets: broadcast rank 0's values, and watch gradients. A collective."""
        self._take_over(buckets)
        self._gradients.watch(buckets)

    def add_group(self, param_group: Group, param_groups: Sequence[Group]) -> Group:
        """Add the parameters of a later param group, in buckets of their own. A collective.

        Args:
            param_group: the new group, in any form that torch's optimizers take.
            param_groups: the earlier groups of whole parameters.

        Returns:
            The new group, with its parameters as a list.

        Raises:
            ValueError: on all ranks; nothing was added.
        """
        buckets: list[Bucket] = []
        index = len(param_groups)
        try:
            with raising_together(self._all_ranks, self._bucket_layout.description):
                group, *_ = groups_of([param_group])
                known = {id(param): name for number, before in enumerate(param_groups) for param, name in named_params(before, number)}
                known |= {id(param): slot.name for param, slot in self._bucket_layout.slots.items()}  # frozen ones are in no bucket
                for param in tensors_of(group):
                    if id(param) in known:
                        raise ValueError(f"parameter {known[id(param)]!r} appears twice; give each parameter once")
                buckets = self._bucket_layout.move_in([group], first=index)
                self._engine.add_param_group(self._bucket_layout.group_inside(group, index))
        except Exception:
            self._bucket_layout.move_out(buckets)
            del self._engine.param_groups[index:]
            raise
        self._take_up_late(buckets)
        return group

    def refresh(self, groups: Sequence[Group]) -> None:
        """Wait for running transfers, add parameters that were unfrozen, and restore replaced memory (`BucketLayout.rebind`). A collective.

        Args:
            groups: the current param groups of whole parameters.

        Raises:
            ValueError: an unfrozen parameter cannot be optimized (on all ranks), or a parameter was moved, cast or swapped (on this rank).
        """
        self.wait()
        self._take_up_unfrozen(groups)
        self._bucket_layout.rebind()

    def wait(self) -> None:
        """Wait until all parameters have their new values on all ranks."""
        self._gatherer.wait_for_all(self._bucket_layout.buckets, settles=True)

    def _take_up_unfrozen(self, param_groups: Sequence[Group]) -> None:
        """Create buckets for parameters that have become trainable, and add the parts that this rank steps to the optimizer inside."""
        groups = self._bucket_layout.unfrozen(param_groups)
        if not any(group["params"] for group in groups):
            return
        buckets: list[Bucket] = []
        try:
            with raising_together(self._all_ranks, self._bucket_layout.description):
                buckets = self._bucket_layout.move_in(groups)
        except Exception:
            self._bucket_layout.move_out(buckets)
            raise
        for index, (group, inside) in enumerate(zip(groups, self._engine.param_groups, strict=True)):
            for name, local in self._bucket_layout.stepped(group, index):
                inside["params"].append(local)
                inside["param_names"].append(name)
        self._take_up_late(buckets)

    def _take_up_late(self, buckets: Sequence[Bucket]) -> None:
        """Take up the parameters in these buckets, which may already have gradients. A collective."""
        # A new layout object makes all ranks exchange segments again, also ranks without elements of these parameters.
        self._engine.layout = replace(self._bucket_layout.layout)
        self._take_over(buckets)
        self._gradients.watch_late(buckets)

    def _take_over(self, buckets: Sequence[Bucket]) -> None:
        """Supersede other optimizers of the parameters in these buckets, and broadcast rank 0's values."""
        for other in _in_use_with([slot.param for bucket in buckets for slot in bucket.slots]):
            if other is not self:
                other.is_superseded = True
                _in_use.discard(other)
                call_and_drop(other._removals)
        _in_use.add(self)
        for bucket in buckets:
            if self._all_ranks is not None:
                dist.broadcast(bucket.values, group_src=0, group=self._all_ranks)
            if bucket.masters is not None:
                bucket.masters.copy_(bucket.shard)
            for slot in bucket.slots:
                slot.version = slot.param._version


def wait_for_others(params: Iterable[Tensor]) -> None:
    """Wait for transfers of these parameters that other ShardedOptimizers have started, also ones that have been freed."""
    for other in _in_use_with(params):
        other.wait()
    for hooks in list(ForwardHooks.released):
        hooks.finish()


def _in_use_with(params: Iterable[Tensor]) -> list[ShardedParams]:
    """Return the ShardedParams of optimizers that have any of these parameters, in the order of their creation."""
    params = list(params)
    with_params = [sharded for sharded in _in_use if any(param in sharded._bucket_layout.slots for param in params)]
    return sorted(with_params, key=lambda sharded: sharded._number)


def _clean_up(removals: list[Callable[[], None]], bucket_layout: BucketLayout) -> None:
    """Clean up after an optimizer: remove its hooks, and free its buckets, except those with running transfers."""
    call_and_drop(removals)
    for bucket in bucket_layout.buckets:
        if bucket.gathering.has_ended():
            bucket.slots.clear()
