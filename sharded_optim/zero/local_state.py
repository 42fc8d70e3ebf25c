"""The optimizer state of this rank's shards, under the model's parameters: `optimizer.state` and local state dicts."""

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
from sharded_optim.zero.bucket import Home
from sharded_optim.zero.housing import Group, without_params
from sharded_optim.zero.logical import LogicalTensor

__all__ = ["MASTER", "SHARDS", "LocalState", "LogicalState", "ShardTable", "Values", "inside", "shards_of"]

MASTER = "master"  # the float32 values of a low-precision parameter: (n,), as of moments this rank's part
SHARDS = "shards"  # key of a state dict: what its tensors are


class LocalState(Mapping[Tensor, dict[str, Any]]):
    """For each parameter of the model that this rank steps a part of, the state of that part: 1-D tensors, and the step counter."""

    def __init__(self, engine: Engine, homes: Mapping[Tensor, Home]) -> None:
        self._engine = engine
        self._homes = homes

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        home = self._homes[param]
        if home.local is None or home.local not in self._engine.state:
            raise KeyError(f"this rank has no state of {home.name!r}")
        state = self._engine.state[home.local]
        return {**state, MASTER: home.local.detach()} if home.kind.has_masters else state

    def __iter__(self) -> Iterator[Tensor]:
        return (param for param, home in self._homes.items() if home.local is not None and home.local in self._engine.state)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class LogicalState(LocalState):
    """For each trainable parameter its state as whole tensors, on every rank: ordinary ones where this rank has all of them.

    Of a parameter that was frozen later the ranks that step a part of it know whether it has state, and they alone have it here.

    Where a rank has nothing of a parameter it does not know the step counter, nor what has no dimensions.

    Args:
        engine: the optimizer inside, with state of all that this rank steps.
        homes: of the model's parameters.
        groups: their param groups.
        template: what the rank does not know is zero; else it is missing, so that only ranks that know it save it.
    """

    def __init__(self, engine: Engine, homes: Mapping[Tensor, Home], groups: Sequence[Group], *, template: bool) -> None:
        super().__init__(engine, homes)
        self._template = template
        self._groups = {param: index for index, group in enumerate(groups) for param in group["params"]}

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        home = self._homes[param]
        state = super().__getitem__(param) if home.local is not None else self._of_nothing(home)
        return {name: _logical(home, value) for name, value in state.items() if self._template or _is_known(home, value)}

    def _of_nothing(self, home: Home) -> dict[str, Any]:
        """The state of no elements."""
        dtype = torch.float32 if home.kind.has_masters else home.kind.dtype
        nothing = torch.empty(0, dtype=dtype, device=home.kind.device)
        state = new_state(nothing, self._engine.choice_of(nothing, self._engine.param_groups[self._groups[home.param]]).entries)
        return state | {MASTER: nothing} if home.kind.has_masters else state

    def __iter__(self) -> Iterator[Tensor]:
        known = set(super().__iter__())
        return (param for param in self._groups if param in self._homes and (param.requires_grad or param in known))


def _is_known(home: Home, value: Tensor) -> bool:
    return home.numel > 0 or home.param.numel() == 0 or (value.ndim > 0 and len(home.shape) > 0)


def _logical(home: Home, value: Tensor) -> Tensor:
    """A state tensor of this rank's part of a parameter as one of the whole parameter."""
    if value.ndim == 0:
        return value
    if home.numel == home.param.numel():
        return value.view(home.shape)
    return LogicalTensor(value, home.shape, home.start) if home.shape else value.new_zeros(())


class ShardTable(dict[int, dict[str, Any]]):
    """What `shards_of` gives, in a state dict of one of several ranks. To pickle it warns, once: trainers save what rank 0 has for all.

    Args:
        content: of it.
        warned: has an element once there was a warning; shared by the state dicts of an optimizer. Frameworks that move a state dict to a
            device (Accelerate) make others of its parts with the content alone.
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
                "one rank's part of the state of a ShardedOptimizer is being saved. That is complete where every rank saves its own. Where "
                "one rank saves for all, the others' parts are lost: call optimizer.consolidate_state_dict() on every rank before, or save "
                "with so.checkpoint or torch.distributed.checkpoint",
                UserWarning,
                stacklevel=3,
            )
        return OrderedDict, (list(self.items()),)  # which torch.load takes with weights_only=True, where it refuses dict

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardTable:
        return ShardTable(deepcopy(dict(self), memo), self._warned)


def shards_of(groups: Sequence[Group], homes: Mapping[Tensor, Home]) -> dict[int, dict[str, Any]]:
    """For each parameter of a state dict, by its number: the elements, [start, start + numel) of the flattened one, that this rank has."""
    params = [param for group in groups for param in group["params"]]
    return {
        number: {"start": homes[param].start, "numel": homes[param].numel, "shape": tuple(param.shape)}
        for number, param in enumerate(params)
        if param in homes
    }


def inside(
    state_dict: Mapping[str, Any], groups: Sequence[Group], homes: Mapping[Tensor, Home], engine: Engine, *, keeps_frozen: bool
) -> tuple[dict[str, Any], Values]:
    """A state dict as the optimizer inside takes it, and the float32 values in it: masters, or parameters with their Kahan compensations.

    Args:
        state_dict: of a ShardedOptimizer on this rank, or with whole tensors: of one process, or of torch.distributed.checkpoint.
        groups: the param groups that it is going to be loaded into.
        homes: of their parameters.
        engine: the optimizer inside.
        keeps_frozen: whether frozen parameters that it has no state of keep theirs.

    Raises:
        ValueError: it has other groups or other parts of the parameters.
    """
    saved_groups = state_dict["param_groups"]
    sizes, own_sizes = [len(group["params"]) for group in saved_groups], [len(group["params"]) for group in groups]
    if sizes != own_sizes:
        raise ValueError(
            f"the state dict has param groups of {sizes} parameters, the optimizer of {own_sizes}; build the same groups before loading"
        )
    shards: Mapping[int, Any] | None = state_dict.get(SHARDS)
    own_shards = shards_of(groups, homes)
    numbers = {id(local): number for number, local in enumerate(local for group in engine.param_groups for local in group["params"])}
    state: dict[int, Any] = {}
    values = Values()
    number = 0
    inner_groups = []
    for index, (group, saved, own) in enumerate(zip(groups, saved_groups, engine.param_groups, strict=True)):
        for (param, name), key in zip(named_params(group, index), saved["params"], strict=True):
            home = homes.get(param)
            if home is not None and key in state_dict["state"]:
                if shards is not None and shards.get(key) != own_shards[number]:
                    raise ValueError(
                        f"the state dict was saved with another sharding: of {name!r} it has {shards.get(key)}, this rank steps "
                        f"{own_shards[number]}; load the file of the same rank of as many ranks, or a whole state dict, of which each rank "
                        f"takes its part: of an optimizer in one process, or saved after optimizer.consolidate_state_dict()"
                    )
                found = {name: _part(home, value, shards is None) for name, value in state_dict["state"][key].items()}
                if home.kind.has_masters:
                    values.take(home, found, state_dict["state"][key])
                if home.local is not None:
                    state[numbers[id(home.local)]] = {key: value for key, value in found.items() if key != MASTER}
            elif keeps_frozen and not param.requires_grad and home is not None and home.local is not None and home.local in engine.state:
                state[numbers[id(home.local)]] = engine.state[home.local]
            number += 1
        inner_groups.append(without_params(saved) | {"params": [numbers[id(local)] for local in own["params"]]})
    return {"state": state, "param_groups": inner_groups}, values


def _part(home: Home, value: Any, is_whole: bool) -> Any:
    """This rank's part of a state tensor that is shaped like the parameter."""
    if isinstance(value, LogicalTensor):
        if home.local is not None and (value.start, value.local.numel(), value.shape) != (home.start, home.numel, home.shape):
            raise ValueError(
                f"the state dict was made for another sharding: of {home.name!r} it has {value!r}, this rank steps {home.numel} elements "
                f"from {home.start} on of shape {tuple(home.shape)}; ask get_optimizer_state_dict of the optimizer into which you load, "
                f"and have torch.distributed.checkpoint.load fill that"
            )
        return value.local
    if is_whole and isinstance(value, Tensor) and value.shape == home.shape and not (value.ndim == 0 and home.numel == 0):
        return home.of_shard(value)
    return value


@dataclass(frozen=True)
class Values:
    """Float32 values of low-precision parameters that are being loaded.

    Attributes:
        masters: this rank's parts.
        params: whole parameters, rounded from them, where other ranks' parts are known too.
    """

    masters: dict[Home, Tensor] = field(default_factory=dict)
    params: dict[Home, Tensor] = field(default_factory=dict)

    def take(self, home: Home, found: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
        """What a saved state says of the values of a parameter.

        Args:
            found: this rank's part of it.
            whole: all of it that there is.
        """
        if MASTER in found:
            if home.local is not None:
                self.masters[home] = found[MASTER]
            return
        # optimi has placeholders
        beside = {key: value for key, value in whole.items() if isinstance(value, Tensor) and value.is_floating_point()}
        fmt = format_beside(home.kind.dtype, beside)
        arrays = [beside[array.name] for array in fmt.extra]
        if not arrays:
            return
        if all(type(array) is Tensor and array.shape == home.shape for array in arrays):
            value = fmt.load(home.param.detach(), *arrays)
            self.params[home] = value.to(home.kind.dtype)
            if home.local is not None:
                self.masters[home] = home.of_shard(value)
        elif home.local is not None:
            self.masters[home] = fmt.load(home.of_shard(home.param), *(found[array.name] for array in fmt.extra))

    @torch.no_grad()
    def write(self) -> None:
        """Set masters, and round parameters from them.

        torch.distributed.checkpoint writes to the masters themselves. Then there is nothing to set, and the parameters' values count where
        they are no rounded masters: a checkpoint without masters, loaded with a planner that allows it, left these as they were.
        """
        for home, values in self.masters.items():
            assert home.local is not None, "loaded for what this rank steps"
            if values.data_ptr() == home.local.data_ptr():
                continue
            home.local.copy_(values)
            home.bucket.shard[home.in_shard].copy_(values)
        for home, values in self.params.items():
            home.param.copy_(values)
