"""Moves parameters into flat buckets, and says what of each this rank steps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
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
from sharded_optim.zero.bucket import Bucket, Home, Kind
from sharded_optim.zero.transfers import ShardGroup

__all__ = ["Group", "Housing", "check_params", "unit_of", "without_params"]

Group = dict[str, Any]
UNKNOWN_PARAM = "was not given to ShardedOptimizer; add it with add_param_group"
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Housing:
    """Where the trainable parameters of an optimizer lie.

    Args:
        shard_group: the ranks that buckets are cut over.
        bucket_bytes: how large a bucket may become.
        defaults: options of groups that have none of their own.

    Attributes:
        homes: by parameter.
        buckets: in the order in which gradients are reduced.
        shards: how many there are of each.
        layout: of what this rank steps.
    """

    def __init__(self, *, shard_group: ShardGroup, bucket_bytes: int, defaults: Mapping[str, Any]) -> None:
        self.homes: dict[Tensor, Home] = {}
        self.buckets: list[Bucket] = []
        self._names: dict[Tensor, str] = {}  # of all parameters that were given, frozen ones too
        self._in_masters: dict[
            Tensor, bool
        ] = {}  # likewise, whether in low precision they have masters, by the options they were given with
        self._flat: dict[Tensor, FlatTensor] = {}
        self._units: dict[Tensor, int] = {}
        self.layout = FlatLayout(flat=self._flat, whole={}, unknown_param_error=UNKNOWN_PARAM, units=self._units)
        self.shards = shard_group.size
        self._shard_group = shard_group
        self._bucket_bytes = bucket_bytes
        self._defaults = defaults

    def move_in(self, groups: Sequence[Group], *, first: int = 0) -> list[Bucket]:
        """Make buckets for the trainable parameters of param groups, of which the first is number `first`, that lie in none yet.

        Raises:
            ValueError: a parameter that cannot be optimized, or that shares memory with another; nothing was moved.
        """
        check_params(groups, first=first)
        devices = {
            str(param.device) for index, group in enumerate(groups) for param, _ in named_params(group, index) if param.requires_grad
        }
        devices |= {str(home.kind.device) for home in self.homes.values()}
        if len(devices) > 1:
            raise ValueError(f"parameters are on several devices, {', '.join(sorted(devices))}; build an optimizer for those of each")
        found: dict[Tensor, Home] = {}
        for index, group in enumerate(groups, start=first):
            for param, name in named_params(group, index):
                self._names[param] = name
                has_masters = self._in_masters.setdefault(param, self._wants_masters(group)) and param.dtype in LOW_PRECISION
                if param.requires_grad and param not in self.homes and param not in found:
                    kind = Kind(dtype=param.dtype, device=param.device, has_masters=has_masters)
                    found[param] = Home(param=param, name=name, kind=kind)
        new = list(found.values())
        _refuse_shared_memory(new)
        plans = plan_buckets([_size(home) for home in new], self.shards, self._bucket_bytes)
        numbered = enumerate(plans, start=len(self.buckets))
        buckets = [Bucket(plan, new, number=number, shard_group=self._shard_group) for number, plan in numbered]
        for home in new:
            if home.numel:
                home.local = nn.Parameter(memory.with_own_storage(home.bucket.stepped_memory(home)))
                segment = Segment.flat(home.name, home.param.shape, home.start, home.numel)
                self._flat[home.local] = FlatTensor(numel=home.numel, pieces=(Piece(segment=segment),))
                self._units[home.local] = unit_of(home.bucket)
        for home in new:  # when nothing can fail any more
            home.bucket.bring_home(home)
        self.homes |= found
        self.buckets += buckets
        return buckets

    def move_out(self, buckets: Sequence[Bucket]) -> None:
        """Forget buckets that were made for nothing."""
        self.buckets = [bucket for bucket in self.buckets if bucket not in buckets]
        for home in [home for bucket in buckets for home in bucket.homes]:
            del self.homes[home.param], self._in_masters[home.param]
            if home.local is not None:
                del self._flat[home.local], self._units[home.local]

    def unfrozen(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with those of their parameters that are trainable and lie in no bucket yet."""
        late = [[param for param in group["params"] if param.requires_grad and param not in self.homes] for group in groups]
        return [
            without_params(group) | {"params": [(self._names[param], param) for param in params]}
            for group, params in zip(groups, late, strict=True)
        ]

    def stepped(self, group: Group, index: int) -> list[tuple[str, Tensor]]:
        """What this rank steps of a param group's parameters."""
        homes = [self.homes.get(param) for param, _ in named_params(group, index)]
        return [(home.name, home.local) for home in homes if home is not None and home.local is not None]

    def group_inside(self, group: Group, index: int) -> Group:
        """A param group with what this rank steps; an empty tensor where that is nothing, as it may be in all groups."""
        params = self.stepped(group, index)
        if not params:
            name = named_params(group, index)[0][1] if group["params"] else f"param_groups[{index}]"
            nothing = nn.Parameter(torch.empty(0, device=next(iter(self.homes)).device))
            self._flat[nothing] = FlatTensor(numel=0, pieces=())
            params = [(f"{name}, of which and of its group this rank steps nothing", nothing)]
        return without_params(group) | {"params": params}

    def bring_home(self) -> None:
        """Undo what users did to parameters since the last step: their values are what counts.

        Raises:
            ValueError: a parameter was moved, cast or swapped.
        """
        for home in self.homes.values():
            param, bucket = home.param, home.bucket
            if home.identity and param._cdata != home.identity:  # its gradients came to no bucket
                raise ValueError(
                    f"parameter {home.name!r} was swapped with another tensor, as converting a model does under "
                    f"torch.__future__.set_swap_module_params_on_conversion(True), and has lost the hook that brings its gradients; "
                    f"convert the model before it is given to ShardedOptimizer"
                )
            if param._version == home.version and bucket.is_home(home):
                continue
            if param.dtype != home.kind.dtype or param.device != home.kind.device or param.shape != home.shape:
                raise ValueError(
                    f"parameter {home.name!r} has become {param.dtype} {tuple(param.shape)} on {param.device}, but was {home.kind.dtype} "
                    f"{tuple(home.shape)} on {home.kind.device} when it was given to ShardedOptimizer; convert the model before"
                )
            if not bucket.is_home(home):
                bucket.bring_home(home)
            bucket.renew_masters(home)
            if home.local is not None and not home.kind.has_masters:  # whose memory is the parameter's
                increment_version(home.local)
            home.version = param._version

    def _wants_masters(self, group: Group) -> bool:
        return not any(group.get(key, self._defaults.get(key)) for key in ("kahan_sum", "stochastic_rounding"))


def unit_of(bucket: Bucket) -> int:
    """The unit, in the sense of `FlatLayout`, of what lies in a bucket: those that a forward pass needs first are stepped first."""
    return -bucket.number


def without_params(group: Group) -> Group:
    """Its hyperparameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _size(home: Home) -> Size:
    kind: Hashable = home.kind
    return Size(numel=home.param.numel(), itemsize=home.param.element_size(), kind=kind)


def check_params(groups: Sequence[Group], *, first: int = 0) -> None:
    """Raise ValueError for a trainable parameter that cannot lie in a bucket."""
    for index, group in enumerate(groups, start=first):
        for param, name in named_params(group, index):
            if param.requires_grad:
                _check(param, name)


def _check(param: Tensor, name: str) -> None:
    describe(param, name)
    if type(param) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"parameter {name!r} is a {type(param).__name__}, not an ordinary tensor; what FSDP2 or tensor parallelism has sharded goes "
            f"into the optimizer itself, without ShardedOptimizer"
        )
    if param.device.type == "meta":
        raise ValueError(f"parameter {name!r} has no memory (device meta); materialize the model before: model.to_empty(device=...)")


def _refuse_shared_memory(homes: Sequence[Home]) -> None:
    """Parameters that overlap would each get a copy, and go apart."""
    spans = []
    for home in homes:
        if home.param.numel():
            last = sum((size - 1) * stride for size, stride in zip(home.param.shape, home.param.stride(), strict=True))
            first = home.param.data_ptr()
            spans.append((str(home.kind.device), first, first + (last + 1) * home.param.element_size(), home.name))
    spans.sort()
    for (device, _, end, name), (other_device, start, _, other) in pairwise(spans):
        if device == other_device and start < end:
            raise ValueError(
                f"parameters {name!r} and {other!r} share memory; tie them as one parameter: module.weight = other.weight, which is then "
                f"given once"
            )
