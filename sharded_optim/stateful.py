"""What an optimizer holds: param groups that are checked, state that is allocated when asked for, and state dicts. Below the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import is_
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sharded_optim import foreign_state, loading, param_groups
from sharded_optim.algorithms import Algorithm, Choose
from sharded_optim.algorithms.hyperparameters import COMMON, Hyperparameter, Unsupported, by_name
from sharded_optim.arguments import check_iterable
from sharded_optim.compensation import CompensationLog
from sharded_optim.formats import Format, chosen_format, extra_arrays, param_format
from sharded_optim.options import Params
from sharded_optim.param_index import ParamIndex
from sharded_optim.sharding import FlatLayout, LocalParam, describe
from sharded_optim.state import STEP, Choice, State, called_to_allocate, fsdp1_that_offloads_whole_state, new_state, zeros

__all__ = ["StatefulOptimizer"]

ABSENT = object()  # stands for a hyperparameter that a group lacks
MUTABLE = object()  # for one that may have another value, though it is the same object, or was not checked
IMMUTABLE = (bool, int, float, str, type(None), torch.dtype)


class _Given(NamedTuple):
    """The shapes of the parameters with which a group was added, and those that have one dimension."""

    group: dict[str, Any]
    shapes: list[torch.Size]
    flat: list[Tensor]

    @classmethod
    def of(cls, group: dict[str, Any]) -> _Given:
        params = group["params"]
        return cls(group, [param.shape for param in params], [param for param in params if param.ndim == 1])


class StatefulOptimizer(torch.optim.Optimizer):
    """A torch optimizer without a step.

    Args:
        params: as for every torch optimizer: tensors, (name, tensor) tuples, or dicts of param groups.
        defaults: hyperparameters of the param groups.
        algorithm: chooses the math of a param group, which says what state it needs.
        state_dtype: storage of the moments: a dtype, or the name of a format.
        max_lr: reference learning rate of groups that do not bring their own `max_lr`; None takes each group's `lr`.
        layout: of parameters that a wrapper has flattened.

    Attributes:
        hyperparameters: that a class declares: each is checked, compared between ranks, saved. A default that is not declared is checked
            and compared as any value.
        algorithms: that a class runs, by the argument of its constructor that asks for each; "" asks for nothing.
        replaces_composer: whether a class takes the place of one of Composer's, whose state it continues.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = COMMON
    algorithms: ClassVar[Mapping[str, Algorithm]] = {}
    replaces_composer: ClassVar[bool] = False
    gradient_release = False  # whether steps happen inside backward, so that a step of all may find no gradient

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        algorithm: Choose,
        state_dtype: torch.dtype | str,
        max_lr: float | None,
        layout: FlatLayout | None,
    ) -> None:
        self._choose = algorithm
        self._index = ParamIndex()
        self.compensation_log = CompensationLog()
        self._lost_layout = False
        self.layout = layout
        self._given: list[_Given] = []  # of groups that no step has stepped yet: wrappers replace parameters before the first
        self.state_dtype = state_dtype
        self._declared = {name: Hyperparameter(name) for name in defaults} | by_name(self.hyperparameters)
        self._passed: dict[str, list[Any]] = {}  # what the last check of a scheduled group has passed, by where it stands
        self._check_group({"max_lr": max_lr} | defaults, "the optimizer's arguments")
        self._max_lr = None if max_lr is None else float(max_lr)
        check_iterable(params, "params")
        super().__init__(params, defaults)
        if not self.all_params():
            raise ValueError("params has no parameters, in any group; give the parameters of a model")
        self.state = State(self, self.state)
        param_groups.warn_of_high_decay(self.param_groups)

    # ----------------------------------------------------------------------------------------------------- parameters and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, after checking what torch would let pass.

        Raises:
            ValueError: a parameter given twice, a hyperparameter out of range, or a parameter that cannot be optimized.
        """
        index = len(self.param_groups)
        if isinstance(param_group, dict) and "params" in param_group and not isinstance(param_group["params"], set):
            params = param_group["params"]
            check_iterable(params, f"the params of param_groups[{index}]")
            param_group = {**param_group, "params": [params] if isinstance(params, Tensor) else list(params)}
            named = param_groups.named_params(param_group, index)
            param_group = param_groups.translate_switches(param_group, self.defaults)
            param_groups.resolve_kahan(param_group, self.defaults)
            self._check_group(self.defaults | param_group, f"param_groups[{index}]")
            known = {id(p): n for g_index, g in enumerate(self.param_groups) for p, n in param_groups.named_params(g, g_index)}
            names = set(known.values())
            for param, name in named:
                if id(param) in known:
                    raise ValueError(f"parameter {name!r} appears twice, also as {known[id(param)]!r}; give each parameter once")
                if name in names:
                    raise ValueError(f"two parameters are named {name!r}; give each a name of its own, for example with a prefix per model")
                known[id(param)] = name
                names.add(name)
                if isinstance(param, Tensor):
                    describe(param, name, self.layout)
            param_groups.follow_names(param_group, self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[index]
        self._given.append(_Given.of(group))
        param_groups.set_reference_lr(group, self._max_lr)

    def describe_param(self, param: Tensor, name: str, group: dict[str, Any]) -> LocalParam:
        """What this rank holds of a parameter.

        Args:
            name: for error messages.
            group: its param group.

        Raises:
            ValueError: it cannot be optimized, or the optimizer was not told how it is sharded.
        """
        if self._lost_layout:
            raise ValueError(
                "this optimizer was copied or unpickled, which cannot take its layout along; set it again: optimizer.layout = "
                "so.fsdp1_layout(model), or so.deepspeed.attach(engine)"
            )
        if self.layout is None and self._stands_for_others(param, group):
            raise ValueError(
                f"parameter {name!r} of shape {tuple(param.shape)} was put in the place of those that the optimizer was given, as by "
                f"wrappers that flatten them, and it does not tell which tensors it holds. Under DeepSpeed call "
                f"so.deepspeed.attach(engine) after deepspeed.initialize, or so.deepspeed.initialize instead of it; parameters of your "
                f"own go in with add_param_group"
            )
        return describe(param, name, self.layout)

    def _stands_for_others(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Whether a flat tensor is all that is left of a group, before its first step: wrappers that flatten do it so, as DeepSpeed.

        Users who edit a group before its first step may replace its one 1-D parameter by a longer or a shorter one. It is a Parameter.
        """
        given = next((given for given in self._given if given.group is group), None)
        if given is None or len(group["params"]) != 1 or param.ndim != 1 or type(param) not in (Tensor, torch.nn.Parameter):
            return False
        if type(param) is torch.nn.Parameter and len(given.shapes) == 1 and len(given.shapes[0]) == 1:
            return False
        return not any(other is param for other in given.flat) and given.shapes not in ([], [param.shape])

    @property
    def layout(self) -> FlatLayout | None:
        """How parameters are sharded that do not tell it themselves."""
        return self._layout

    @layout.setter
    def layout(self, layout: FlatLayout | None) -> None:
        self._layout = layout
        self._lost_layout = False

    def all_params(self) -> list[Tensor]:
        """Of all groups, in their order."""
        return [param for group in self.param_groups for param in group["params"]]

    def groups_of(self, params: Sequence[Tensor] | None) -> list[dict[str, Any]]:
        """The param group in which each parameter is now: they are moved, and groups are replaced when a state dict is loaded.

        Args:
            params: None means all, in their order.

        Raises:
            ValueError: one is in none of the groups.
        """
        if params is None:
            return [group for group in self.param_groups for _ in group["params"]]
        return [place.group for place in self._index.places_of(self.param_groups, params)]

    def check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Raise ValueError for hyperparameters of these groups, to which schedulers and users write, that no step could use."""
        checked = set(map(id, groups))
        for index, group in enumerate(self.param_groups):
            if id(group) in checked:
                self._check_group(group, f"param_groups[{index}]", scheduled=True)

    def init_state(self) -> None:
        """Allocate the state of every trainable parameter that has none yet: what the first step does for those with a gradient."""
        for index, group in enumerate(self.param_groups):
            for param, name in param_groups.named_params(group, index):
                if param.requires_grad:
                    self.complete_state(param, group, name)

    def zero_grad(self, set_to_none: bool = True, param: Tensor | None = None) -> None:
        """As in torch; or of one parameter alone."""
        if param is None:
            super().zero_grad(set_to_none)
        elif set_to_none:
            param.grad = None
        elif param.grad is not None:
            param.grad = torch.zeros_like(param.grad)

    def is_allocation_step(self) -> bool:
        """Whether a wrapper steps only to have state allocated: see `called_to_allocate`."""
        has_state = any(group["params"][0] in self.state for group in self.param_groups if group["params"])
        return not has_state and called_to_allocate()

    def new_state(self, param: Tensor) -> dict[str, Any]:
        """State of a parameter that has none yet, as `self.state` asks for it."""
        return new_state(param, self.choice_of(param, self._group_with(param) or self.param_groups[0]).entries)

    def _group_with(self, param: Tensor) -> dict[str, Any] | None:
        place = self._index.place_of(self.param_groups, param)
        return None if place is None else place.group

    def complete_state(self, param: Tensor, group: dict[str, Any], name: str) -> dict[str, Any]:
        """The parameter's state, with everything that the group's algorithm and the format need.

        Raises:
            ValueError: something is missing that cannot begin now.
        """
        choice = self.choice_of(param, group)
        if not self.state.get(param):  # torch's optimizers too take empty state as none
            self.state[param] = new_state(param, choice.entries)
        state = self.state[param]
        if STEP not in state:
            raise ValueError(f"the state of {name!r} lacks {STEP!r} (it has {', '.join(map(str, state))}); delete it, or load a full state")
        for key in extra_arrays() & state.keys() - choice.entries.keys():
            del state[key]  # of a value that is about to change
        may_begin = choice.may_begin(state.keys())
        for key, dtype in choice.entries.items():
            if key not in state:
                if key not in may_begin and state[STEP] > 0:
                    raise ValueError(
                        f"the state of {name!r} lacks {key!r} after {int(state[STEP])} steps, and it cannot begin late; load a full state, "
                        f"or choose at construction what needs it"
                    )
                state[key] = zeros(param, dtype)
        return state

    @cached_property
    def compared(self) -> frozenset[str]:
        """Names of the hyperparameters that must be the same on all ranks that agree on a step."""
        return frozenset(name for name, each in self._declared.items() if each.compared)

    def foreign_hyperparameters(self) -> dict[str, Hyperparameter]:
        """Those that other optimizers support, and this one does not declare."""
        supported = [each for optimizer in _classes() for each in optimizer.hyperparameters if not isinstance(each, Unsupported)]
        return {name: each for name, each in by_name(supported).items() if name not in self._declared}

    @cached_property
    def _known(self) -> dict[str, Hyperparameter]:
        """All that are checked: a foreign one of a wrong value is a mistake too."""
        return self.foreign_hyperparameters() | self._declared

    def _check_group(self, group: dict[str, Any], where: str, *, scheduled: bool = False) -> None:
        """Raise ValueError for hyperparameters that no step could use.

        Args:
            scheduled: a scheduler may have written the group. Values that have passed the last such check are not checked again.
        """
        values = [self.state_dtype, *[group.get(name, ABSENT) for name in self._known]]
        passed = (self._passed.get(where) if scheduled else None) or [MUTABLE] * len(values)
        if all(map(is_, values, passed)):
            return
        for each, value, before in zip(self._known.values(), values[1:], passed[1:], strict=True):
            if value is not before and value is not ABSENT:
                each.check(value, where, scheduled=scheduled)
        try:
            self._choose(group)
        except ValueError as error:
            raise ValueError(f"{error} (in {where})") from None
        param_groups.check_state_dtype(self.state_dtype, group, where)
        if scheduled:
            known = zip(values, passed, strict=True)
            self._passed[where] = [value if value is before or _is_immutable(value) else MUTABLE for value, before in known]

    @property
    def state_format(self) -> Format:
        """How the moments are stored."""
        return chosen_format(self.state_dtype)

    def choice_of(self, param: Tensor, group: Mapping[str, Any]) -> Choice:
        """What the options choose for a parameter of a param group."""
        algorithm = self._choose(group)
        fmt = param_format(param.dtype, kahan_sum=group["kahan_sum"], stochastic_rounding=group["stochastic_rounding"])
        return Choice(algorithm, fmt, (self.state_format,) * len(algorithm.state))

    # ------------------------------------------------------------------------------------------------------------- state dicts

    def drop_stale_compensation(self) -> None:
        """Zero the Kahan compensations of parameters that were written since the last step, before state is read together with them."""
        names = extra_arrays()
        rows = [(param, state[key]) for param, state in self.state.items() for key in names & state.keys()]
        self.compensation_log.drop_stale([param for param, _ in rows], [compensation for _, compensation in rows])

    def state_dict(self) -> dict[str, Any]:
        """As in torch.

        Raises:
            ValueError: torch asks for it on behalf of FullyShardedDataParallel, and would give moments each other's values.
        """
        model = None if self._layout is None else fsdp1_that_offloads_whole_state()
        if model is not None:
            from sharded_optim.sharding import fsdp1

            fsdp1.check_whole_state_on_cpu(model, sorted({key for state in self.state.values() for key in state} - {STEP}))
        self.drop_stale_compensation()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but all or nothing, with moments stored as in `state_dtype`, and group keys the saved state lacks kept as they are.

        State of torch's Adam, AdamW and SGD, of Composer's and of optimi's optimizers is recognised and continued; see `foreign_state.py`.

        Raises:
            ValueError: the saved state does not fit; nothing was changed.
        """
        before = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        given = {index: each for each in self._given for index, group in enumerate(self.param_groups) if group is each.group}
        incoming: dict[str, Any] = {}

        def prepare(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            loading.check_sizes(self.param_groups, saved)
            saved = foreign_state.translate(saved, self.param_groups, replaces_composer=self.replaces_composer)
            merged = []
            for index, (own, group) in enumerate(zip(self.param_groups, saved["param_groups"], strict=True)):
                where = f"the state dict's param_groups[{index}]"
                merged.append(own | group | {"params": own["params"]})
                self._check_group(merged[-1], where, scheduled=True)
            moments = {name for optimizer in _classes() for algorithm in optimizer.algorithms.values() for name in algorithm.state}
            loading.check_state(merged, saved, self.choice_of, moments)
            loading.check_family(saved, self.foreign_hyperparameters())
            incoming.update(saved)
            return saved

        def restore(_: torch.optim.Optimizer) -> None:
            loading.restore_groups(self.param_groups, before)
            self._given = [each._replace(group=self.param_groups[index]) for index, each in given.items()]
            loading.restore_state(self, incoming, self.choice_of)

        # After the users' pre-hooks, which may convert the state dict, and before their post-hooks, which may look at the result.
        hooks = [self.register_load_state_dict_pre_hook(prepare), self.register_load_state_dict_post_hook(restore, prepend=True)]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_choose", "state_dtype", "_max_lr", "_declared")
        lost = {"_lost_layout": self._layout is not None or self._lost_layout}
        return super().__getstate__() | {name: getattr(self, name) for name in own} | lost

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state = State(self, self.state)  # torch makes it a plain dict when it loads
        if "_choose" in state:  # unpickled or copied; torch also calls this with the loaded state and groups alone
            self._index = ParamIndex()
            self._passed = {}
            self.compensation_log = CompensationLog()
            self._layout = None
            self._given = list(map(_Given.of, self.param_groups))


def _classes() -> list[type[StatefulOptimizer]]:
    """All optimizers that there are."""
    found = [StatefulOptimizer]
    for each in found:
        found += each.__subclasses__()
    return found


def _is_immutable(value: Any) -> bool:
    return value is ABSENT or isinstance(value, IMMUTABLE) or (type(value) is tuple and all(map(_is_immutable, value)))
