"""The memory of a bucket: all of its parameters, and this rank's shard of their float32 masters and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from sharded_optim.sharding.buckets import BucketPlan
from sharded_optim.storage import memory
from sharded_optim.zero.placeholder import GradientInBucket
from sharded_optim.zero.transfers import ShardGroup, Transfer

__all__ = ["Bucket", "Kind", "ParamSlot"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The properties that all tensors of a bucket share."""

    dtype: torch.dtype
    device: torch.device
    has_masters: bool  # whether the optimizer steps float32 copies of this rank's shard instead of the shard itself


@dataclass(kw_only=True, eq=False)
class ParamSlot:
    """The position of a parameter in its bucket, and the part of it in this rank's shard.

    Attributes:
        param: the model's parameter.
        name: the parameter's name in errors and metrics.
        kind: the kind of the bucket.
        bucket, offset: the bucket, and the position of the parameter's first element in it.
        shape: the parameter's shape when the slot was created.
        start, numel: this rank's shard has the elements [start, start + numel) of the flattened parameter.
        local: the part of the parameter that this rank's optimizer steps: (numel,); None if numel is 0.
        identity: the parameter's `_cdata` when the gradient hook was registered on its C++ object; 0 if there is no hook.
        version: the parameter's `_version` (torch's count of in-place changes) when slot and masters last matched it.
    """

    param: Tensor
    name: str
    kind: Kind
    bucket: Bucket = field(init=False)
    offset: int = field(init=False)
    start: int = field(init=False)
    numel: int = field(init=False)
    shape: torch.Size = field(init=False)
    local: nn.Parameter | None = None
    identity: int = 0
    version: int = -1

    def __post_init__(self) -> None:
        self.shape = self.param.shape

    @property
    def whole_in_bucket(self) -> slice:
        """The position of the whole parameter in the bucket."""
        return slice(self.offset, self.offset + self.param.numel())

    @property
    def in_shard(self) -> slice:
        """The position of this rank's part of the parameter in the buffers of the shard (`Bucket.shard`, `masters`, `grads`)."""
        first = self.offset + self.start - self.bucket.first
        return slice(first, first + self.numel)

    def of_shard(self, whole: Tensor) -> Tensor:
        """Return this rank's part of `whole`, a tensor with the parameter's shape: (numel,), a view if `whole` is contiguous."""
        return whole.detach().reshape(-1)[self.start : self.start + self.numel]

    @cached_property
    def grad(self) -> Tensor:
        """This rank's part of the averaged gradient, (numel,): a view of the bucket's gradients, in the dtype of `local`."""
        return self.bucket.grads[self.in_shard]

    @cached_property
    def placeholder(self) -> GradientInBucket:
        """The stand-in to which `param.grad` is set while the gradient is in the bucket."""
        return GradientInBucket(self.param, self.name)

    @property
    def own_grad(self) -> Tensor | None:
        """`param.grad`, unless it is the placeholder; None if it is, or if there is no gradient."""
        grad = self.param.grad
        return None if type(grad) is GradientInBucket else grad

    def remove_placeholder(self) -> None:
        if type(self.param.grad) is GradientInBucket:
            self.param.grad = None


class Bucket:
    """Parameters end to end in one flat buffer, of which each rank steps a shard. Created with zeros; `rebind` moves parameters in.

    Args:
        plan: the bucket's parameters and their offsets.
        slots: the slots to which `plan.members` are indices, also those of other buckets.
        number: the bucket's index in the order in which gradients are reduced.
        shard_group: the ranks over which the bucket is sharded.

    Attributes:
        values: the parameters' values: (numel,) in their dtype.
        has_gradient: whether `grads` has the average of a backward pass.
        gathering: the last all-gather of `values`.
        contents: this rank's full gradients, before they are reduced: (numel,). None if not allocated.
    """

    def __init__(self, plan: BucketPlan, slots: Sequence[ParamSlot], *, number: int, shard_group: ShardGroup) -> None:
        self.number = number
        self.slots = [slots[member] for member in plan.members]
        self.numel = plan.numel
        self.kind = self.slots[0].kind
        self.shard_numel = plan.numel // shard_group.size
        self.first = shard_group.rank * self.shard_numel
        self.values = shard_group.zeros(self.numel, self.kind.dtype, self.kind.device)
        for slot, offset in zip(self.slots, plan.offsets, strict=True):
            first = max(offset, self.first)
            end = min(offset + slot.param.numel(), self.first + self.shard_numel)
            slot.bucket, slot.offset = self, offset
            slot.start, slot.numel = (first - offset, end - first) if first < end else (0, 0)
        self.masters = memory.zeros_on(self.kind.device, self.shard_numel, torch.float32) if self.kind.has_masters else None
        self.gathering = Transfer()
        self.has_gradient = False
        self.contents: Tensor | None = None
        self._filled_numel = sum(slot.param.numel() for slot in self.slots)

    @property
    def shard(self) -> Tensor:
        """This rank's part of `values`."""
        return self.values[self.first : self.first + self.shard_numel]

    @cached_property
    def grads(self) -> Tensor:
        """This rank's shard of the averaged gradients, (shard_numel,): float32 with masters, else in the parameters' dtype."""
        dtype = torch.float32 if self.kind.has_masters else self.kind.dtype
        return memory.zeros_on(self.kind.device, self.shard_numel, dtype)

    @property
    def named(self) -> str:
        """A description of the bucket for error messages, with the name of its first parameter."""
        return f"the bucket that begins with {self.slots[0].name!r}"

    @property
    def pad(self) -> slice:
        """The padding: elements that belong to no parameter."""
        return slice(self._filled_numel, self.numel)

    def rebind(self, slot: ParamSlot) -> None:
        """Copy a parameter's values to its slot in `values`, and make the parameter a view of the slot."""
        view = self.values[slot.whole_in_bucket].view(slot.param.shape)
        view.copy_(slot.param.detach())
        slot.param.data = memory.with_own_storage(view)

    def is_bound(self, slot: ParamSlot) -> bool:
        """Return whether the parameter is still a view of its slot: users may have replaced `param.data`."""
        return slot.param.data_ptr() == self.values.data_ptr() + slot.offset * self.values.element_size() or not slot.param.numel()

    def stepped_memory(self, slot: ParamSlot) -> Tensor:
        """Return the memory of a parameter that this rank's optimizer steps: (numel,) of the masters or, without them, of `values`."""
        return (self.shard if self.masters is None else self.masters)[slot.in_shard]

    def renew_masters(self, slot: ParamSlot) -> None:
        """Replace the masters that do not round to the parameter's current values, as after a user has written to the parameter."""
        if self.masters is not None:
            master, value = self.masters[slot.in_shard], self.shard[slot.in_shard]
            master.copy_(torch.where(master.to(value.dtype) == value, master, value.float()))

    def round_masters(self) -> None:
        """Round this rank's masters into its shard of the parameters."""
        if self.masters is not None:
            self.shard.copy_(self.masters)
