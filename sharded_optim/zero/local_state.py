"""The optimizer state of this rank's shards, with the model's parameters as keys: `optimizer.state` and local state dicts."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharded_optim.step.engine import Engine
from sharded_optim.step.param_groups import named_params
from sharded_optim.step.state import new_state
from sharded_optim.storage.formats import format_beside
from sharded_optim.zero.bucket import ParamSlot
from sharded_optim.zero.bucket_layout import Group, without_params
from sharded_optim.zero.logical import LogicalTensor

__all__ = ["MASTER", "SHARDS", "LocalState", "LogicalState", "ShardTable", "Values", "convert_for_inside", "shards_of"]

MASTER = "master"  # key of the float32 values of a low-precision parameter: (n,), this rank's part, like the moments
SHARDS = "shards"  # key of a state dict: which elements of the parameters its tensors have; see `shards_of`


class LocalState(Mapping[Tensor, dict[str, Any]]):
    """The state of the parts that this rank steps, by the model's parameter: 1-D tensors, and the step counter."""

    def __init__(self, engine: Engine, slots: Mapping[Tensor, ParamSlot]) -> None:
        self._engine = engine
        self._slots = slots

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        slot = self._slots[param]
        if slot.local is None or slot.local not in self._engine.state:
            raise KeyError(f"this rank has no state of {slot.name!r}")
        state = self._engine.state[slot.local]
        return {**state, MASTER: slot.local.detach()} if slot.kind.has_masters else state

    def __iter__(self) -> Iterator[Tensor]:
        return (param for param, slot in self._slots.items() if slot.local is not None and slot.local in self._engine.state)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class LogicalState(LocalState):
    """The state of every trainable parameter as whole tensors, on every rank: ordinary ones if this rank has all elements.

    A parameter that was frozen later is included only on ranks that step a part of it, as the others do not know whether it has state. A
    rank without elements of a parameter does not know the parameter's step counter, nor other state without dimensions.

    Args:
        engine: the optimizer inside, with state of all parts that this rank steps.
        slots: the slots of the model's parameters.
        groups: the param groups of the model's parameters.
        template: whether state that this rank does not know is zero; else it is left out, so that only ranks that know it save it.
    """

    def __init__(self, engine: Engine, slots: Mapping[Tensor, ParamSlot], groups: Sequence[Group], *, template: bool) -> None:
        super().__init__(engine, slots)
        self._template = template
        self._groups = {param: index for index, group in enumerate(groups) for param in group["params"]}

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        slot = self._slots[param]
        state = super().__getitem__(param) if slot.local is not None else self._empty_state(slot)
        return {name: _logical(slot, value) for name, value in state.items() if self._template or _is_known(slot, value)}

    def _empty_state(self, slot: ParamSlot) -> dict[str, Any]:
        """Return the state of a parameter of which this rank has no elements."""
        dtype = torch.float32 if slot.kind.has_masters else slot.kind.dtype
        empty = torch.empty(0, dtype=dtype, device=slot.kind.device)
        state = new_state(empty, self._engine.choice_of(empty, self._engine.param_groups[self._groups[slot.param]]).entries)
        return state | {MASTER: empty} if slot.kind.has_masters else state

    def __iter__(self) -> Iterator[Tensor]:
        known = set(super().__iter__())
        return (param for param in self._groups if param in self._slots and (param.requires_grad or param in known))


def _is_known(slot: ParamSlot, value: Tensor) -> bool:
    return slot.numel > 0 or slot.param.numel() == 0 or (value.ndim > 0 and len(slot.shape) > 0)


def _logical(slot: ParamSlot, value: Tensor) -> Tensor:
    """Convert a state tensor of this rank's part of a parameter to one of the whole parameter."""
    if value.ndim == 0:
        return value
    if slot.numel == slot.param.numel():
        return value.view(slot.shape)
    return LogicalTensor(value, slot.shape, slot.start) if slot.shape else value.new_zeros(())


class ShardTable(dict[int, dict[str, Any]]):
    """The result of `shards_of`, in the state dict of one of several ranks. Warns once when pickled: some trainers save only rank 0's part.

    Args:
        content: the result of `shards_of`.
        warned: a list shared by all state dicts of an optimizer, empty until the warning. Optional, because frameworks that move a state
            dict to a device (Accelerate) construct this class from the content alone.
    """

    def __init__(
        self, content: Mapping[int, dict[str, Any]] | Iterable[tuple[int, dict[str, Any]]], warned: list[bool] | None = None
    ) -> None:
        super().__init__(content)
        self._warned = [] if warned is None else warned

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        if not self._warned:
            self._warned.append(True)
            warnings.warn(
                "one rank's part of the state of a ShardedOptimizer is being saved. That is complete if every rank saves its own. If one "
                "rank saves for all, the others' parts are lost: call optimizer.consolidate_state_dict() on every rank before, or save "
                "with so.checkpoint or torch.distributed.checkpoint",
                UserWarning,
                stacklevel=3,
            )
        return OrderedDict, (list(self.items()),)  # torch.load(weights_only=True) accepts OrderedDict here, but not dict

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardTable:
        return ShardTable(deepcopy(dict(self), memo), self._warned)


def shards_of(groups: Sequence[Group], slots: Mapping[Tensor, ParamSlot]) -> dict[int, dict[str, Any]]:
    """Return which elements [start, start + numel) of each flattened parameter this rank has, by the parameter's number in a state dict."""
    params = [param for group in groups for param in group["params"]]
    return {
        number: {"start": slots[param].start, "numel": slots[param].numel, "shape": tuple(param.shape)}
        for number, param in enumerate(params)
        if param in slots
    }


def convert_for_inside(
    state_dict: Mapping[str, Any], groups: Sequence[Group], slots: Mapping[Tensor, ParamSlot], engine: Engine, *, keeps_frozen: bool
) -> tuple[dict[str, Any], Values]:
    """Convert a state dict for the optimizer inside, and extract its float32 values: masters, or parameters with Kahan compensations.

    Args:
        state_dict: this rank's, from a ShardedOptimizer; or one with whole tensors, from one process or torch.distributed.checkpoint.
        groups: the param groups, of whole parameters, that the state is loaded into.
        slots: the slots of the parameters in `groups`.
        engine: the optimizer inside.
        keeps_frozen: whether frozen parameters that have no state in `state_dict` keep their current state.

    Raises:
        ValueError: the state dict has other groups, or other parts of the parameters.
    """
    saved_groups = state_dict["param_groups"]
    sizes, own_sizes = [len(group["params"]) for group in saved_groups], [len(group["params"]) for group in groups]
    if sizes != own_sizes:
        raise ValueError(
            f"the state dict has param groups of {sizes} parameters, the optimizer of {own_sizes}; build the same groups before loading"
        )
    shards: Mapping[int, Any] | None = state_dict.get(SHARDS)
    own_shards = shards_of(groups, slots)
    numbers = {id(local): number for number, local in enumerate(local for group in engine.param_groups for local in group["params"])}
    state: dict[int, Any] = {}
    values = Values()
    named = [row for index, group in enumerate(groups) for row in named_params(group, index)]
    keys = [key for saved in saved_groups for key in saved["params"]]
    for number, ((param, name), key) in enumerate(zip(named, keys, strict=True)):
        slot = slots.get(param)
        if slot is not None and key in state_dict["state"]:
            if shards is not None and shards.get(key) != own_shards[number]:
                raise ValueError(
                    f"the state dict was saved with another sharding: of {name!r} it has {shards.get(key)}, this rank steps "
                    f"{own_shards[number]}; load the file of the same rank of as many ranks, or a whole state dict, of which each rank "
                    f"takes its part: of an optimizer in one process, or saved after optimizer.consolidate_state_dict()"
                )
            whole = state_dict["state"][key]
            part = {entry: _part(slot, value, shards is None) for entry, value in whole.items()}
            if slot.kind.has_masters:
                values.take(slot, part, whole)
            if slot.local is not None:
                state[numbers[id(slot.local)]] = {entry: value for entry, value in part.items() if entry != MASTER}
        elif keeps_frozen and not param.requires_grad and slot is not None and slot.local is not None and slot.local in engine.state:
            state[numbers[id(slot.local)]] = engine.state[slot.local]
    inner_groups = [
        without_params(saved) | {"params": [numbers[id(local)] for local in own["params"]]}
        for saved, own in zip(saved_groups, engine.param_groups, strict=True)
    ]
    return {"state": state, "param_groups": inner_groups}, values


def _part(slot: ParamSlot, value: Any, is_whole: bool) -> Any:
    """Return this rank's part of a saved whole tensor or LogicalTensor; any other value unchanged."""
    if isinstance(value, LogicalTensor):
        if slot.local is not None and (value.start, value.local.numel(), value.shape) != (slot.start, slot.numel, slot.shape):
            raise ValueError(
                f"the state dict was made for another sharding: of {slot.name!r} it has {value!r}, this rank steps {slot.numel} elements "
                f"from {slot.start} on of shape {tuple(slot.shape)}; ask get_optimizer_state_dict of the optimizer into which you load, "
                f"and have torch.distributed.checkpoint.load fill that"
            )
        return value.local
    if is_whole and isinstance(value, Tensor) and value.shape == slot.shape and not (value.ndim == 0 and slot.numel == 0):
        return slot.of_shard(value)
    return value


@dataclass(frozen=True)
class Values:
    """Float32 values of low-precision parameters that are being loaded.

    Attributes:
        masters: the new masters, this rank's parts.
        params: whole parameters in their dtype, rounded from values with their Kahan compensations, where the state dict has these whole.
    """

    masters: dict[ParamSlot, Tensor] = field(default_factory=dict)
    params: dict[ParamSlot, Tensor] = field(default_factory=dict)

    def take(self, slot: ParamSlot, part: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
        """Take the values of a parameter from a saved state.

        Args:
            part: this rank's part of the saved state.
            whole: the saved state.
        """
        if MASTER in part:
            if slot.local is not None:
                self.masters[slot] = part[MASTER]
            return
        # optimi saves placeholders, which are not floating-point tensors
        beside = {key: value for key, value in whole.items() if isinstance(value, Tensor) and value.is_floating_point()}
        fmt = format_beside(slot.kind.dtype, beside)
        arrays = [beside[array.name] for array in fmt.extra]
        if not arrays:
            return
        if all(type(array) is Tensor and array.shape == slot.shape for array in arrays):
            value = fmt.load(slot.param.detach(), *arrays)
            self.params[slot] = value.to(slot.kind.dtype)
            if slot.local is not None:
                self.masters[slot] = slot.of_shard(value)
        elif slot.local is not None:
            self.masters[slot] = fmt.load(slot.of_shard(slot.param), *(part[array.name] for array in fmt.extra))

    @torch.no_grad()
    def write(self) -> None:
        """Set masters, and round parameters from them.

        torch.distributed.checkpoint loads into the masters in place, so these need not be set. Where a parameter is then not its rounded
        master, the parameter's value wins: a checkpoint without masters, loaded with a planner that allows it, left the masters unchanged.
        """
        for slot, values in self.masters.items():
            assert slot.local is not None, "loaded only for parts that this rank steps"
            if values.data_ptr() == slot.local.data_ptr():
                continue
            slot.local.copy_(values)
            slot.bucket.shard[slot.in_shard].copy_(values)
        for slot, values in self.params.items():
            slot.param.copy_(values)
