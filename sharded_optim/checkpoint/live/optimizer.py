"""What an optimizer of this library holds, however its parameters are sharded: moments, masters, step counters, hyperparameters."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Rational, Real
from typing import Any

import torch
from torch import Tensor

from sharded_optim.checkpoint.held import MASTER, Held
from sharded_optim.checkpoint.live.model import LiveModel
from sharded_optim.checkpoint.manifest import Manifest, Parameters, key_of
from sharded_optim.checkpoint.values import decode, encode
from sharded_optim.sharding import LocalParam
from sharded_optim.step.engine import Engine
from sharded_optim.step.param_groups import named_params
from sharded_optim.step.state import STEP, zeros

__all__ = ["Landing", "LiveOptimizer", "Member", "hyperparameters_of", "renamed"]

Group = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Member:
    """A parameter of an optimizer.

    Attributes:
        param: as the optimizer has it: the key of its state.
        group: number of its param group.
        local: what this rank holds of it, under the names that the checkpoint uses.
        is_master: whether it is not the model's own, but float32 values of which that is the rounded copy.
    """

    param: Tensor
    group: int
    local: LocalParam
    is_master: bool = False

    def held(self, kind: str, tensor: Tensor) -> Iterator[Held]:
        """What this rank holds of the parameter, or of a state tensor that is laid out like it."""
        local = self.local.local(tensor, kind)
        for piece in self.local.pieces:
            yield Held(kind=kind, segment=piece.segment, local=piece.of(local))

    @property
    def names(self) -> list[str]:
        """Of the tensors that it has, or has parts of."""
        return [piece.segment.name for piece in self.local.pieces]


@dataclass
class Landing:
    """What loading is going to do to an optimizer, so far without touching it.

    Attributes:
        wanted: tensors to be loaded. Those that are new belong to nobody yet.
        problems: why it cannot be: the parameter that each is about, or "", and what it is.
        states: the state that each parameter is going to have; None: nothing. Of one that is not here, it stays.
        groups: the hyperparameters that each param group is going to have.
    """

    wanted: list[Held] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    states: list[tuple[Tensor, dict[str, Any] | None]] = field(default_factory=list)
    groups: list[Mapping[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LiveOptimizer:
    """What this process holds of an optimizer.

    Attributes:
        engine: what steps.
        members: its parameters.
        groups: its param groups; of those that users see, where these are others.
        group_of: the number of each parameter's group, by name; as far as this rank knows.
        order: names in the order of the model, where a wrapper has flattened parameters and the optimizer's order is lost.
        settle: called before anything is read or written.
        loaded: called when everything is.
    """

    engine: Engine
    members: Sequence[Member]
    groups: Sequence[Group]
    group_of: Mapping[str, int]
    order: Sequence[str] = ()
    settle: Callable[[], None] = lambda: None
    loaded: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, engine: Engine, model: LiveModel) -> LiveOptimizer:
        """Of an optimizer that has the model's own parameters.

        Args:
            model: whose names are used; of other parameters the optimizer's own, or their position.
        """
        members = []
        taken = set(model.names.values())
        for index, group in enumerate(engine.param_groups):
            for param, own_name in named_params(group, index):
                if own_name in taken and param not in model.names and not model.order:
                    raise ValueError(
                        f"the optimizer's parameter {own_name!r} is not the model's of that name; build the optimizer from the parameters "
                        f"of the model as it is, after it was wrapped, moved or replaced"
                    )
                local = model.local_params.get(param) or engine.describe_param(param, model.names.get(param, own_name), group)
                members.append(Member(param=param, group=index, local=local))
        return cls(engine=engine, members=members, groups=engine.param_groups, group_of=group_of(members), order=model.order)

    # ---------------------------------------------------------------------------------------------------------------------- saving

    def held(self) -> list[Held]:
        """Its state, and masters."""
        self.engine.drop_stale_compensation()
        found: list[Held] = []
        for member in self.members:
            if member.is_master:
                found += member.held(MASTER, member.param)
            for kind, value in self.engine.state.get(member.param, {}).items():
                if kind != STEP:
                    found += member.held(kind, value)
        return found

    def parameters(self) -> Parameters:
        """What it knows beside tensors."""
        steps = {
            name: float(state[STEP])
            for member in self.members
            if (state := self.engine.state.get(member.param)) is not None
            for name in member.names
        }
        hyperparameters = tuple(
            decode(encode(_hyperparameters(group), f"param_groups[{index}]")) for index, group in enumerate(self.groups)
        )
        return Parameters(optimizer=type(self.engine).__name__, groups=hyperparameters, group_of=dict(self.group_of), steps=steps)

    # --------------------------------------------------------------------------------------------------------------------- loading

    def rounded(self) -> set[str]:
        """Names of the parameters that the model has as rounded copies of masters; as far as this rank knows."""
        return {name for member in self.members if member.is_master for name in member.names}

    def groups_in(self, saved: Parameters) -> list[set[int]]:
        """For each param group, the numbers of the saved groups that its parameters were in; as far as this rank knows."""
        found: list[set[int]] = [set() for _ in self.groups]
        for name, index in self.group_of.items():
            if name in saved.group_of:
                found[index].add(saved.group_of[name])
        return found

    def land(self, manifest: Manifest, saved: Parameters, groups_in: Sequence[set[int]]) -> Landing:
        """Prepare to load. Changes nothing.

        Args:
            manifest: of the checkpoint.
            saved: in it.
            groups_in: as `groups_in` of all ranks together.
        """
        landing = Landing()
        for index, (group, numbers) in enumerate(zip(self.groups, groups_in, strict=True)):
            landing.groups.append(self._group(index, group, [saved.groups[number] for number in sorted(numbers)], landing.problems))
        for member in self.members:
            self._land_member(member, landing, manifest, saved)
        missing = sorted(name for name in self.group_of if name not in saved.group_of and not self._is_empty(name))
        landing.problems += [(name, f"parameter {name!r} is in no param group of the checkpoint") for name in missing]
        return landing

    def _is_empty(self, name: str) -> bool:
        """Whether a parameter, as far as this rank knows it, has no elements."""
        return any(piece.segment.name == name and not piece.segment.tensor_numel for each in self.members for piece in each.local.pieces)

    def _group(self, index: int, group: Group, saved: Sequence[Mapping[str, Any]], problems: list[tuple[str, str]]) -> Mapping[str, Any]:
        """The hyperparameters that a param group is going to have."""
        own = _hyperparameters(group)
        if not saved:
            return own
        where = f"param_groups[{index}]"
        for other in saved[1:]:
            one, two = (encode(dict(each), where) for each in (saved[0], other))  # tensors have no truth value
            differ = [key for key in one.keys() | two.keys() if one.get(key) != two.get(key)]
            if differ:
                told = (
                    f"{where} has parameters that were in several groups of the checkpoint, with different {', '.join(sorted(differ))}; "
                    f"build groups like those that were saved"
                )
                problems.append(("", told))
        lacking = {key for key in self.engine.compared & own.keys() - saved[0].keys() if own[key]}  # what is off is as good as missing
        strange = {key for key in self.engine.foreign_hyperparameters().keys() & saved[0].keys() - own.keys() if saved[0][key]}
        problems += [("", f"{where} has the hyperparameter {key!r}, the checkpoint has not") for key in sorted(lacking)]
        problems += [("", f"{where} has no hyperparameter {key!r}, the checkpoint has {saved[0][key]!r}") for key in sorted(strange)]
        merged = own | {key: value for key, value in saved[0].items() if key not in strange}
        try:
            self.engine._check_group(dict(merged), f"{where} of the checkpoint", scheduled=True)
        except ValueError as error:
            problems.append(("", str(error)))
            return own
        return merged

    def _land_member(self, member: Member, landing: Landing, manifest: Manifest, saved: Parameters) -> None:
        if member.is_master:
            landing.wanted += member.held(MASTER, member.param)
        if member.names and not any(name in saved.group_of for name in member.names):
            return
        steps = {saved.steps.get(name) for name in member.names}
        if len(steps) > 1:
            told = ", ".join(f"{name!r}: {saved.steps.get(name, 'no state')}" for name in member.names[:8])
            problem = (
                f"the wrapper has flattened parameters together that have taken different numbers of steps ({told}), and counts them "
                f"together; load under another wrapper"
            )
            landing.problems.append(("", problem))
            return
        if steps in ({None}, set()):
            landing.states.append((member.param, None))
            return
        group = self.groups[member.group] | dict(landing.groups[member.group])
        live = self.engine.state.get(member.param, {})
        choice = self.engine.choice_of(member.param, group)
        there = {kind for kind in choice.entries if any(key_of(kind, name) in manifest.tensors for name in member.names)}
        may_begin = choice.may_begin(there) - there
        state: dict[str, Any] = {STEP: torch.tensor(steps.pop(), dtype=torch.float32, device=member.param.device)}
        wanted: list[Held] = []
        for kind, dtype in choice.entries.items():
            begins = kind in may_begin
            is_there = kind in live and live[kind].dtype == dtype and not begins
            state[kind] = live[kind] if is_there else zeros(member.param, dtype)
            if not begins:
                wanted += member.held(kind, state[kind])
        landing.wanted += wanted
        found = [(manifest.tensors.get(held.key), held.segment) for held in wanted if held.segment.tensor_numel]
        if all(entry is not None and entry.shape == segment.shape for entry, segment in found):  # else it is told, and the state stays
            landing.states.append((member.param, state))

    def unused_kinds(self) -> frozenset[str]:
        """Kinds of state that another optimizer may have saved and this one passes over."""
        return frozenset(kind for group in self.groups for kind in self.engine._choose(group).ignored_state)

    def install(self, landing: Landing, *, hyperparameters: bool) -> None:
        """Make what was loaded the optimizer's.

        Args:
            hyperparameters: those of the checkpoint too.
        """
        for param, state in landing.states:
            if state is None:
                self.engine.state.pop(param, None)
                continue
            live = self.engine.state[param]
            for key in live.keys() - state.keys():
                del live[key]
            live.update(state)
        if hyperparameters:
            for group, values in zip(self.groups, landing.groups, strict=True):
                for key, value in values.items():
                    own = group.get(key)
                    if isinstance(own, Tensor) and own.numel() == 1 and isinstance(value, int | float):
                        own.fill_(value)
                    else:
                        group[key] = value
        self.loaded()


def group_of(members: Sequence[Member]) -> dict[str, int]:
    """The number of each parameter's group, by name."""
    return {name: member.group for member in members for name in member.names}


def renamed(local: LocalParam, name: str) -> LocalParam:
    """What a rank holds of a parameter, under another name."""
    pieces = tuple(replace(piece, segment=replace(piece.segment, name=name)) for piece in local.pieces)
    return replace(local, pieces=pieces)


def hyperparameters_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a param group has beside parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names") and not key.startswith("_ds_")}


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """Of a param group, as Python's own numbers, texts and containers, whatever they were computed or configured with."""
    values = hyperparameters_of(group)
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    """A tensor of one element, a scalar of NumPy's, or a value of a class that inherits from one of Python's, as Python's own."""
    numpy = sys.modules.get("numpy")
    if (isinstance(value, Tensor) and value.numel() == 1) or (numpy is not None and isinstance(value, numpy.generic)):
        value = value.item()
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    if isinstance(value, dict) and type(value) not in (OrderedDict, Counter, defaultdict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Integral):
        return value if isinstance(value, bool) else int(value)
    if isinstance(value, Real) and not isinstance(value, Rational):
        return float(value)
    return str.__str__(value) if isinstance(value, str) else value  # not str(value): an enum has its own
