"""Move parameters into flat buckets, and describe the part of each that this rank steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from sharded_optim.sharding import FlatLayout, FlatTensor, Piece, describe
from sharded_optim.sharding.buckets import Size, plan_buckets
from sharded_optim.sharding.segment import Segment
from sharded_optim.step.param_groups import named_params
from sharded_optim.storage import memory
from sharded_optim.zero.bucket import Bucket, Kind, ParamSlot
from sharded_optim.zero.transfers import ShardGroup

__all__ = ["BucketLayout", "Group", "check_params", "unit_of", "without_params"]

Group = dict[str, Any]
UNKNOWN_PARAM = "was not given to ShardedOptimizer; add it with add_param_group"
LOW_PRECISION = (torch.bfloat16, torch.float16)


class BucketLayout:
    """The buckets and slots of an optimizer's trainable parameters.

    Args:
        shard_group: the ranks over which buckets are sharded.
        bucket_bytes: the largest size of a bucket.
        defaults: the optimizer's options, for param groups that do not set their own.

    Attributes:
        slots: the slot of each parameter.
        buckets: the buckets, in the order in which gradients are reduced.
        shards: the number of shards of each bucket.
        layout: the layout of the parts of parameters that this rank steps.
    """

    def __init__(self, *, shard_group: ShardGroup, bucket_bytes: int, defaults: Mapping[str, Any]) -> None:
        self.slots: dict[Tensor, ParamSlot] = {}
        self.buckets: list[Bucket] = []
        self._names: dict[Tensor, str] = {}  # of all parameters of the optimizer, frozen ones too
        self._in_masters: dict[Tensor, bool] = {}  # whether a parameter has masters if its dtype is 16-bit; set by its group
        self._flat: dict[Tensor, FlatTensor] = {}
        self._units: dict[Tensor, int] = {}
        self.layout = FlatLayout(flat=self._flat, whole={}, unknown_param_error=UNKNOWN_PARAM, units=self._units)
        self.shards = shard_group.size
        self._shard_group = shard_group
        self._bucket_bytes = bucket_bytes
        self._defaults = defaults

    def move_in(self, groups: Sequence[Group], *, first: int = 0) -> list[Bucket]:
        """Create buckets for the trainable parameters that are in no bucket yet, and move their values in.

        Args:
            groups: param groups.
            first: the index in the optimizer of the first of `groups`.

        Raises:
            ValueError: a parameter cannot be optimized, or shares memory with another, or is on another device; nothing was moved.
        """
        check_params(groups, first=first)
        devices = {
            str(param.device) for index, group in enumerate(groups) for param, _ in named_params(group, index) if param.requires_grad
        }
        devices |= {str(slot.kind.device) for slot in self.slots.values()}
        if len(devices) > 1:
            raise ValueError(f"parameters are on several devices, {', '.join(sorted(devices))}; build an optimizer for those of each")
        new_slots: dict[Tensor, ParamSlot] = {}
        for index, group in enumerate(groups, start=first):
            for param, name in named_params(group, index):
                self._names[param] = name
                has_masters = self._in_masters.setdefault(param, self._wants_masters(group)) and param.dtype in LOW_PRECISION
                if param.requires_grad and param not in self.slots and param not in new_slots:
                    kind = Kind(dtype=param.dtype, device=param.device, has_masters=has_masters)
                    new_slots[param] = ParamSlot(param=param, name=name, kind=kind)
        new = list(new_slots.values())
        _refuse_shared_memory(new)
        sizes = [Size(numel=slot.param.numel(), itemsize=slot.param.element_size(), kind=slot.kind) for slot in new]
        plans = plan_buckets(sizes, self.shards, self._bucket_bytes)
        numbered = enumerate(plans, start=len(self.buckets))
        buckets = [Bucket(plan, new, number=number, shard_group=self._shard_group) for number, plan in numbered]
        for slot in new:
            if slot.numel:
                slot.local = nn.Parameter(memory.with_own_storage(slot.bucket.stepped_memory(slot)))
                segment = Segment.flat(slot.name, slot.param.shape, slot.start, slot.numel)
                self._flat[slot.local] = FlatTensor.holding(slot.numel, [Piece(segment=segment)])
                self._units[slot.local] = unit_of(slot.bucket)
        for slot in new:  # last, when nothing can fail any more
            slot.bucket.rebind(slot)
        self.slots |= new_slots
        self.buckets += buckets
        return buckets

    def move_out(self, buckets: Sequence[Bucket]) -> None:
        """Remove buckets that `move_in` has created on this rank, after an error on any rank."""
        self.buckets = [bucket for bucket in self.buckets if bucket not in buckets]
        for slot in [slot for bucket in buckets for slot in bucket.slots]:
            del self.slots[slot.param], self._in_masters[slot.param]
            if slot.local is not None:
                del self._flat[slot.local], self._units[slot.local]

    def unfrozen(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups with only those parameters that are trainable and in no bucket yet."""
        unfrozen = [[param for param in group["params"] if param.requires_grad and param not in self.slots] for group in groups]
        return [
            without_params(group) | {"params": [(self._names[param], param) for param in params]}
            for group, params in zip(groups, unfrozen, strict=True)
        ]

    def stepped(self, group: Group, index: int) -> list[tuple[str, Tensor]]:
        """Return (name, local part) of each parameter of a param group of which this rank steps a part."""
        slots = [self.slots.get(param) for param, _ in named_params(group, index)]
        return [(slot.name, slot.local) for slot in slots if slot is not None and slot.local is not None]

    def group_inside(self, group: Group, index: int) -> Group:
        """Return the group for the optimizer inside: the parts that this rank steps, or one empty tensor if it steps none."""
        params = self.stepped(group, index)
        if not params:
            name = named_params(group, index)[0][1] if group["params"] else f"param_groups[{index}]"
            empty = nn.Parameter(torch.empty(0, device=next(iter(self.slots)).device))
            self._flat[empty] = FlatTensor.holding(0, [])
            params = [(f"{name}, of whose group this rank steps no elements", empty)]
        return without_params(group) | {"params": params}

    def description(self) -> list[tuple[object, ...]]:
        """Return what must be equal on all ranks: name, shape, dtype and offset of each parameter."""
        return [(slot.name, tuple(slot.shape), slot.kind.dtype, slot.offset) for slot in self.slots.values()]

    def rebind(self) -> None:
        """Move parameters back into their slots if users have replaced their memory, with their current values. Updates masters.

        Raises:
            ValueError: a parameter was moved, cast or swapped.
        """
        for slot in self.slots.values():
            param, bucket = slot.param, slot.bucket
            if slot.identity and param._cdata != slot.identity:  # the hook that fills the bucket was lost
                raise ValueError(
                    f"parameter {slot.name!r} was swapped with another tensor, as converting a model does under "
                    f"torch.__future__.set_swap_module_params_on_conversion(True), and has lost the hook that takes its gradients; "
                    f"convert the model before it is given to ShardedOptimizer"
                )
            if param._version == slot.version and bucket.is_bound(slot):
                continue
            if param.dtype != slot.kind.dtype or param.device != slot.kind.device or param.shape != slot.shape:
                raise ValueError(
                    f"parameter {slot.name!r} has become {param.dtype} {tuple(param.shape)} on {param.device}, but was {slot.kind.dtype} "
                    f"{tuple(slot.shape)} on {slot.kind.device} when it was given to ShardedOptimizer; convert the model before"
                )
            if not bucket.is_bound(slot):
                bucket.rebind(slot)
            bucket.renew_masters(slot)
            if slot.local is not None and not slot.kind.has_masters:  # then `local` is a view of the parameter's memory
                increment_version(slot.local)
            slot.version = param._version

    def _wants_masters(self, group: Group) -> bool:
        return not any(group.get(key, self._defaults.get(key)) for key in ("kahan_sum", "stochastic_rounding"))


def unit_of(bucket: Bucket) -> int:
    """Return the number of a bucket's unit (see `FlatLayout`), so that buckets that the forward pass needs first are stepped first."""
    return -bucket.number


def without_params(group: Group) -> Group:
    """Return a param group without its parameters and their names: the hyperparameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def check_params(groups: Sequence[Group], *, first: int = 0) -> None:
    """Raise ValueError for a trainable parameter that cannot be in a bucket."""
    for index, group in enumerate(groups, start=first):
        for param, name in named_params(group, index):
            if not param.requires_grad:
                continue
            describe(param, name)
            if type(param) not in (Tensor, nn.Parameter):
                raise ValueError(
                    f"parameter {name!r} is a {type(param).__name__}, not an ordinary tensor; give parameters that FSDP2 or tensor "
                    f"parallelism has sharded to the optimizer itself, without ShardedOptimizer"
                )
            if param.device.type == "meta":
                raise ValueError(
                    f"parameter {name!r} has no memory (device meta); materialize the model before: model.to_empty(device=...)"
                )


def _refuse_shared_memory(slots: Sequence[ParamSlot]) -> None:
    """Raise ValueError for parameters that overlap in memory: each would get a copy of its own, and the copies would diverge."""
    spans = []
    for slot in slots:
        if slot.param.numel():
            last = sum((size - 1) * stride for size, stride in zip(slot.param.shape, slot.param.stride(), strict=True))
            first = slot.param.data_ptr()
            spans.append((str(slot.kind.device), first, first + (last + 1) * slot.param.element_size(), slot.name))
    spans.sort()
    for (device, _, end, name), (other_device, start, _, other) in pairwise(spans):
        if device == other_device and start < end:
            raise ValueError(
                f"parameters {name!r} and {other!r} share memory; tie them as one parameter: module.weight = other.weight, which is then "
                f"given once"
            )
