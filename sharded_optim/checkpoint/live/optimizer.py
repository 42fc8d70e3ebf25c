"""`LiveOptimizer`: this process's part of the state, masters, step counters and hyperparameters of an optimizer of this library.

`adapters.py`, `zero.py` and `deepspeed.py` make it; saving and `tools/divergence.py` read it, `state_plan.py` loads into it.
Hyperparameters are converted to Python's own numbers, strings and containers.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Rational, Real
from typing import Any

import numpy as np
from torch import Tensor

from sharded_optim.checkpoint.live.model import LiveModel, local_tensors
from sharded_optim.checkpoint.local_tensor import MASTER, LocalTensor
from sharded_optim.checkpoint.manifest import Parameters
from sharded_optim.checkpoint.values import decode, encode
from sharded_optim.sharding import LocalParam
from sharded_optim.step.engine import Engine
from sharded_optim.step.param_groups import named_params
from sharded_optim.step.state import STEP

__all__ = ["LiveOptimizer", "LiveParam", "group_of", "hyperparameters_of", "plain_hyperparameters", "renamed"]

Group = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LiveParam:
    """A parameter of an optimizer.

    Attributes:
        param: the parameter itself, which is the key of its state in the optimizer.
        group: index of its param group.
        local: this rank's part of the parameter, under the names that checkpoints use.
        is_master: whether it is a float32 master; the model's own parameter is then its rounded copy.
    """

    param: Tensor
    group: int
    local: LocalParam
    is_master: bool = False

    def tensors(self, kind: str, tensor: Tensor) -> Iterator[LocalTensor]:
        """Describe this rank's part of the parameter, or of a state tensor that is sharded like it."""
        return local_tensors(kind, tensor, self.local)

    @property
    def names(self) -> list[str]:
        """The names of the model's parameters in it: several if a wrapper has flattened them together."""
        return [piece.segment.name for piece in self.local.pieces]


@dataclass(frozen=True, kw_only=True)
class LiveOptimizer:
    """The part of an optimizer that this process holds.

    Attributes:
        engine: the optimizer that steps the parameters and has their state.
        params: the parameters of `engine`.
        groups: the param groups that users see.
        group_of: index of the group of each parameter of this rank's optimizer, by the parameter's name.
        order: names of parameters in the order of the model, if a wrapper has flattened them and the optimizer's order is lost.
        synchronize: called before anything is read or written.
        after_load: called after everything is loaded.
    """

    engine: Engine
    params: Sequence[LiveParam]
    groups: Sequence[Group]
    group_of: Mapping[str, int]
    order: Sequence[str] = ()
    synchronize: Callable[[], None] = lambda: None
    after_load: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, optimizer: Any, _: Any, live: LiveModel) -> LiveOptimizer | None:
        """Describe an optimizer of the model's own parameters; None if it is not of this library.

        Args:
            live: gives parameters their names; parameters that it lacks have the optimizer's names, or their positions.
        """
        if not isinstance(optimizer, Engine):
            return None
        if optimizer.layout is not None and optimizer.layout.steps_by_group:
            raise ValueError("under DeepSpeed pass the engine, which knows the param groups, as model=, beside optimizer=")
        params = []
        model_names = set(live.names.values())
        for index, group in enumerate(optimizer.param_groups):
            for param, own_name in named_params(group, index):
                if own_name in model_names and param not in live.names and not live.order:
                    raise ValueError(
                        f"the optimizer's parameter {own_name!r} is not the model's of that name; build the optimizer from the parameters "
                        f"of the model as it is, after it was wrapped, moved or replaced"
                    )
                local = live.local_params.get(param) or optimizer.describe_param(param, live.names.get(param, own_name), group)
                params.append(LiveParam(param=param, group=index, local=local))
        return cls(engine=optimizer, params=params, groups=optimizer.param_groups, group_of=group_of(params), order=live.order)

    # ---------------------------------------------------------------------------------------------------------------------- saving

    def tensors(self) -> list[LocalTensor]:
        """List the optimizer's state tensors and masters."""
        self.engine.drop_stale_compensation()
        tensors: list[LocalTensor] = []
        for param in self.params:
            if param.is_master:
                tensors += param.tensors(MASTER, param.param)
            for kind, value in self.engine.state.get(param.param, {}).items():
                if kind != STEP:
                    tensors += param.tensors(kind, value)
        return tensors

    def parameters(self) -> Parameters:
        """Return the optimizer's step counters, param groups and hyperparameters."""
        steps = {
            name: float(state[STEP])
            for param in self.params
            if (state := self.engine.state.get(param.param)) is not None
            for name in param.names
        }
        encoded = [encode(plain_hyperparameters(group), f"param_groups[{index}]") for index, group in enumerate(self.groups)]
        copies = tuple(map(decode, encoded))  # training goes on during a save in the background
        return Parameters(optimizer=type(self.engine).__name__, groups=copies, group_of=dict(self.group_of), steps=steps)

    # --------------------------------------------------------------------------------------------------------------------- loading

    def rounded(self) -> set[str]:
        """Return the names of the parameters whose masters this rank holds; the model has rounded copies of these."""
        return {name for param in self.params if param.is_master for name in param.names}

    def saved_groups(self, saved: Parameters) -> list[set[int]]:
        """Return, for each param group, the indices of the saved groups of those of its parameters that this rank has."""
        indices: list[set[int]] = [set() for _ in self.groups]
        for name, index in self.group_of.items():
            if name in saved.group_of:
                indices[index].add(saved.group_of[name])
        return indices

    def is_empty(self, name: str) -> bool:
        """Return whether a parameter of this rank's optimizer has no elements."""
        return any(piece.segment.name == name and not piece.segment.tensor_numel for param in self.params for piece in param.local.pieces)

    def ignored_kinds(self) -> frozenset[str]:
        """Return the kinds of state that another optimizer may have saved and this one does not need."""
        return frozenset(kind for group in self.groups for kind in self.engine._choose(group).ignored_state)


def group_of(params: Sequence[LiveParam]) -> dict[str, int]:
    """Return the index of each parameter's group, by name."""
    return {name: param.group for param in params for name in param.names}


def renamed(local: LocalParam, name: str) -> LocalParam:
    """Return a copy of the description of a parameter, with another name."""
    pieces = tuple(replace(piece, segment=replace(piece.segment, name=name)) for piece in local.pieces)
    return replace(local, pieces=pieces)


# ---------------------------------------------------------------------------------------------------------------- hyperparameters


def hyperparameters_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a param group without its parameters and their names."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names") and not key.startswith("_ds_")}


def plain_hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the hyperparameters of a group to Python's own types, from those of NumPy, torch and config libraries."""
    return {key: _plain(value) for key, value in hyperparameters_of(group).items()}


def _plain(value: Any) -> Any:
    """Convert a one-element tensor, a NumPy scalar, or an instance of a subclass of a Python type; return other values unchanged."""
    if (isinstance(value, Tensor) and value.numel() == 1) or isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    if isinstance(value, dict) and type(value) not in (OrderedDict, Counter, defaultdict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Integral):
        return value if isinstance(value, bool) else int(value)
    if isinstance(value, Real) and not isinstance(value, Rational):
        return float(value)
    return str.__str__(value) if isinstance(value, str) else value  # not str(value): an enum overrides it
