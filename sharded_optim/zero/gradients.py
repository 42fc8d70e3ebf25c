"""A ShardedOptimizer's gradients between backward and the step: taken from the parameters, averaged, and set on this rank's parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from weakref import WeakMethod, ref

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.backends.position_hash import position_hashes
from sharded_optim.sharding.ddp import averaged_params, ddp_modules
from sharded_optim.sharding.ranks import gather_objects
from sharded_optim.step.engine import Engine
from sharded_optim.zero.bucket import Bucket, ParamSlot
from sharded_optim.zero.bucket_layout import BucketLayout, unit_of
from sharded_optim.zero.gathering import Gatherer
from sharded_optim.zero.reduction import Reducer
from sharded_optim.zero.topology import Topology

__all__ = ["ShardedGradients", "call_and_drop"]


class ShardedGradients:
    """Averaged gradients of the parts of parameters that the optimizer inside steps.

    A gradient is in its bucket, averaged by the reducer, or in `param.grad`, if DistributedDataParallel averages it or the user has
    assigned it.

    Owns the hooks that take gradients out of parameters, and the set of parameters that have had a gradient since the last step.

    Args:
        topology: the ranks.
        bucket_layout: the parameters and their buckets.
        engine: the optimizer inside.
        gatherer: gathers the parameters; backward waits for it.
        reducer: averages the gradients.
        stay_in_params: see the attribute.

    Attributes:
        stay_in_params: whether gradients stay in the parameters, as they need no averaging here: this process is alone, or
            DistributedDataParallel averages them, which may be detected in the first backward pass.
    """

    def __init__(
        self, topology: Topology, bucket_layout: BucketLayout, engine: Engine, gatherer: Gatherer, reducer: Reducer, *, stay_in_params: bool
    ) -> None:
        self.stay_in_params = stay_in_params
        self._looked_for_ddp = stay_in_params
        self._topology, self._bucket_layout = topology, bucket_layout
        self._engine, self._gatherer, self._reducer = engine, gatherer, reducer
        # Functions that remove the hooks and the placeholders. The hooks hold this object weakly: Python cannot collect a cycle through
        # autograd.
        self._hooks: list[Callable[[], None]] = []
        self._unwaited: set[Bucket] = set()  # buckets for which no module had waited when the backward pass began
        self._used: set[ParamSlot] = set()  # parameters with a gradient, on any rank, since the last step
        self._stepped: set[ParamSlot] = set()  # parameters that the last step has stepped
        reducer.listen(WeakMethod(self._reduced))

    # ---------------------------------------------------------------------------------------------------------------- in backward

    def watch(self, buckets: Sequence[Bucket]) -> None:
        """Register hooks that take the gradients of the parameters in these buckets, unless gradients stay in the parameters."""
        self._reducer.buckets += buckets
        if self.stay_in_params:
            return
        for slot in _slots_of(buckets):
            hook = slot.param.register_post_accumulate_grad_hook(partial(_ready, ref(self)))
            slot.identity = slot.param._cdata
            self._hooks += [hook.remove, slot.remove_placeholder]

    def watch_late(self, buckets: Sequence[Bucket]) -> None:
        """Watch parameters that may already have gradients, from backward passes or assigned, and average these. A collective.

        Gradients that are equal on all ranks stay as they are: the average is the same, to the last bit.
        """
        self.watch(buckets)
        if self.stay_in_params:
            return
        slots = _slots_of(buckets)
        rows = gather_objects([_hash(slot.own_grad) for slot in slots], self._topology.all_ranks)
        differing = [slot for slot, *hashes in zip(slots, *rows, strict=True) if len(set(hashes)) > 1]
        if differing:
            self._reducer.run_round(differing)

    @property
    def remove_hooks(self) -> Callable[[], None]:
        """A function that removes the hooks, after which gradients stay in the parameters. It holds no reference to this object."""
        return partial(call_and_drop, self._hooks)

    def _ready(self, slot: ParamSlot) -> None:
        """Take a parameter's gradient, which autograd has just completed."""
        if not self._looked_for_ddp:
            self._looked_for_ddp = True
            self.stay_in_params = _are_under_ddp(self._bucket_layout.slots.values())
        if self.stay_in_params:
            call_and_drop(self._hooks)
            return
        if self._reducer.synchronizes and not self._reducer.is_open:
            # Other ranks may wait until this one has acknowledged their parameters, before they reduce gradients.
            self._unwaited = set(self._gatherer.wait_for_all(self._bucket_layout.buckets, settles=False))
        if slot.bucket in self._unwaited:
            raise RuntimeError(
                f"{slot.name!r} was used before its new values had arrived from the other ranks, other than by the forward pass of the "
                f"module that holds it, or of one that contains that; call optimizer.wait() before, or build with overlap=False"
            )
        self._reducer.ready(slot)

    def _reduced(self, bucket: Bucket) -> None:
        """Let the optimizer inside observe a bucket whose gradients have been averaged, usually while backward continues."""
        for slot in bucket.slots:
            if slot.local is not None and slot in self._stepped:
                slot.local.grad = slot.grad
        self._engine.observe_unit(unit_of(bucket))

    # ------------------------------------------------------------------------------------------------------------- after backward

    def collect(self) -> set[ParamSlot]:
        """Set the gradients of the parts that the optimizer inside steps, and reduce those that backward has not. A collective.

        Returns:
            All parameters that have a gradient on any rank.

        Raises:
            ValueError: a parameter has a gradient in its bucket and one of its own.
        """
        slots = self._bucket_layout.slots.values()
        if not self.stay_in_params:
            self._reducer.finish()
            has_any = self._reducer.rounds or self._used or any(slot.own_grad is not None for slot in slots)
            if self._reducer.has_unreduced or not has_any:  # if this rank has none, others may have some
                self._reducer.run_round()
            self._used |= self._reducer.collect()
        for slot in slots:
            if slot.local is not None:
                slot.local.grad = slot.grad if slot in self._used else None
        assigned = [slot for slot in slots if slot.own_grad is not None]
        for slot in assigned:
            if slot in self._used:
                raise ValueError(
                    f"{slot.name!r} has a gradient of its own beside the one that was averaged in backward, assigned later or by another "
                    f"wrapper; assign gradients without a backward pass, or give the wrapped model to ShardedOptimizer"
                )
            if slot.local is not None and slot.own_grad is not None:
                slot.local.grad = slot.of_shard(slot.own_grad).to(slot.local.dtype)
        return self._used.union(assigned)

    def norm(self, used: Collection[ParamSlot], norm_type: float) -> Tensor:
        """Return the norm of the collected gradients of the parameters in `used`: float64 (), the same on every rank. A collective."""
        in_order = [slot for slot in self._bucket_layout.slots.values() if slot in used]  # so that the norm has the same bits in every run
        local = [slot.local.grad for slot in in_order if slot.local is not None and slot.local.grad is not None]
        zero = torch.zeros((), dtype=torch.float64, device=next(iter(self._bucket_layout.slots.values())).kind.device)
        norms = [torch.linalg.vector_norm(grad, norm_type, dtype=torch.float64) for grad in local]
        is_max = norm_type == float("inf")
        total = zero if not norms else torch.stack(norms).max() if is_max else torch.stack(norms).pow(norm_type).sum()
        if self._topology.shard_group is not None:
            dist.all_reduce(total, op=dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM, group=self._topology.shard_group)
        return total if is_max else total.pow(1.0 / norm_type)

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients of this rank, in buckets and in parameters, by `factor`."""
        for bucket in self._bucket_layout.buckets:
            if bucket.has_gradient:
                bucket.grads.mul_(factor)
        for slot in self._bucket_layout.slots.values():
            if slot.own_grad is not None:
                slot.own_grad.mul_(factor)

    def end_step(self, stepped: set[ParamSlot]) -> None:
        """Drop the gradients in buckets after a step, and remember which parameters it has stepped."""
        self._stepped = stepped
        self._empty_buckets()

    def drop(self) -> None:
        """Drop all gradients except those in `param.grad`, also gradients that are still being reduced."""
        self._reducer.forget()
        self._empty_buckets()

    def _empty_buckets(self) -> None:
        """Drop the gradients in the buckets, which `model.zero_grad()` does not reach."""
        self._used = set()
        for slot in self._bucket_layout.slots.values():
            slot.remove_placeholder()
        for bucket in self._bucket_layout.buckets:
            bucket.has_gradient = False


def _ready(gradients: ref[ShardedGradients], param: Tensor) -> None:
    """A post-accumulate-grad hook, which does not keep the ShardedGradients alive."""
    sharded_gradients = gradients()
    if sharded_gradients is not None:
        sharded_gradients._ready(sharded_gradients._bucket_layout.slots[param])


def _are_under_ddp(slots: Collection[ParamSlot]) -> bool:
    """Return whether DistributedDataParallel averages the gradients of these parameters.

    Raises:
        ValueError: it averages only some of them.
    """
    averaged = averaged_params(ddp_modules())
    outside = [slot.name for slot in slots if id(slot.param) not in averaged]
    if outside and len(outside) < len(slots):
        raise ValueError(
            f"DistributedDataParallel averages the gradients of some parameters, but not that of {outside[0]!r}; give the parameters that "
            f"it does not average to an optimizer of their own"
        )
    return not outside


def call_and_drop(functions: list[Callable[[], None]]) -> None:
    """Call the functions of a list from last to first, and empty the list."""
    while functions:
        functions.pop()()


def _slots_of(buckets: Iterable[Bucket]) -> list[ParamSlot]:
    return [slot for bucket in buckets for slot in bucket.slots]


def _hash(grad: Tensor | None) -> int | None:
    """Hash the bits of a gradient: None if there is none, 0 if it is sparse, which the reduction refuses."""
    if grad is None:
        return None
    return int(position_hashes([grad])) if grad.layout == torch.strided else 0
