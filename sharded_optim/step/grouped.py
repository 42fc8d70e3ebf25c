"""The lowest layer of an optimizer: param groups, checked when they are added, and the sharding of their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.formulas import Algorithm, Choose, Matrix
from sharded_optim.formulas.hyperparameters import COMMON, Hyperparameter, Unsupported, on_host
from sharded_optim.sharding import FlatLayout, LocalParam, describe, find_layout
from sharded_optim.sharding.matrices import Matrices
from sharded_optim.sharding.ranks import own_process_group
from sharded_optim.step import param_groups
from sharded_optim.step.arguments import check_iterable
from sharded_optim.step.coefficients import GroupValues
from sharded_optim.step.collection import collector_paused
from sharded_optim.step.group_checks import GroupChecks
from sharded_optim.step.options import Params
from sharded_optim.step.param_index import ParamIndex

__all__ = ["GroupedOptimizer", "matrices_of", "optimizer_classes"]


class _Given(NamedTuple):
    """The parameters of a group at the time it was added, to detect their replacement by a wrapper."""

    group: dict[str, Any]
    shapes: list[torch.Size]  # shape of each parameter
    flat: list[Tensor]  # the parameters that were 1-D

    @classmethod
    def of(cls, group: dict[str, Any]) -> _Given:
        params = group["params"]
        return cls(group, [param.shape for param in params], [param for param in params if param.ndim == 1])

    def is_replaced_by(self, param: Tensor) -> bool:
        """Return whether a wrapper has replaced these parameters by one flat tensor.

        A user who edits a group before its first step may replace its only 1-D parameter by one of another length. That is a Parameter.
        """
        if len(self.group["params"]) != 1 or param.ndim != 1 or type(param) not in (Tensor, torch.nn.Parameter):
            return False
        if type(param) is torch.nn.Parameter and len(self.shapes) == 1 and len(self.shapes[0]) == 1:
            return False
        return not any(other is param for other in self.flat) and self.shapes not in ([], [param.shape])


class GroupedOptimizer(torch.optim.Optimizer):
    """A torch optimizer without state and without a step.

    Args:
        params: as for every torch optimizer: tensors, (name, tensor) tuples, or dicts of param groups.
        defaults: hyperparameters of the param groups.
        algorithm: chooses the math of a param group, which determines its state.
        state_dtype: storage of the moments: a dtype, or the name of a format.
        max_lr: reference learning rate of groups without a `max_lr` of their own; None takes each group's `lr`.
        layout: the layout of parameters that a wrapper has flattened.
        process_group: the ranks that train this model together; None means all.

    Attributes:
        checks: the checks of its param groups.
        hyperparameters: the hyperparameters that a class declares: checked, compared between ranks, and saved. A default without a
            declaration is checked and compared as a plain `Hyperparameter`.
        algorithms: the algorithms that a class can run, keyed by the constructor argument that selects each; "" is the default.
        replaces_composer: whether a class replaces one of Composer's, whose state it can continue.
    """

    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = COMMON
    algorithms: ClassVar[Mapping[str, Algorithm]] = {}
    replaces_composer: ClassVar[bool] = False

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        algorithm: Choose,
        state_dtype: torch.dtype | str,
        max_lr: float | None,
        layout: FlatLayout | None,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._choose = algorithm
        self._index = ParamIndex()
        self._lost_layout = self._lost_process_group = False
        self.layout = layout
        self.process_group = process_group
        self._given: list[_Given] = []  # one per group until its first step: wrappers replace parameters before that
        self.state_dtype = state_dtype
        self.checks = GroupChecks(self.hyperparameters, defaults, _supported_hyperparameters, algorithm)
        self._values: list[GroupValues | None] = []  # values of each group when it was last stepped
        self.checks.check({"max_lr": max_lr} | defaults, "the optimizer's arguments", state_dtype)
        self._max_lr = None if max_lr is None else float(max_lr)
        check_iterable(params, "params")
        super().__init__(params, defaults)
        if not self.all_params():
            raise ValueError("params has no parameters, in any group; give the parameters of a model")
        param_groups.warn_of_high_decay(self.param_groups)

    @collector_paused()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group as torch does, with further checks.

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
            complete = self.defaults | param_group
            self.checks.check(complete, f"param_groups[{index}]", self.state_dtype)
            known = {id(p): n for g_index, g in enumerate(self.param_groups) for p, n in param_groups.named_params(g, g_index)}
            names = set(known.values())
            for param, name in named:
                if id(param) in known:
                    raise ValueError(f"parameter {name!r} appears twice, also as {known[id(param)]!r}; give each parameter once")
                if name in names:
                    raise ValueError(f"two parameters are named {name!r}; make the names unique, for example with a prefix per model")
                known[id(param)] = name
                names.add(name)
                if isinstance(param, Tensor):
                    if self.layout is None:
                        self.layout = find_layout(param, (each for each, _ in named if isinstance(each, Tensor)))
                    self._with_matrices(describe(param, name, self.layout), complete)
            param_groups.follow_names(param_group, self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[index]
        self._given.append(_Given.of(group))
        param_groups.set_reference_lr(group, self._max_lr)

    def describe_param(self, param: Tensor, name: str, group: dict[str, Any]) -> LocalParam:
        """Describe this rank's shard of a parameter.

        Args:
            name: the parameter's name, for error messages.
            group: its param group.

        Raises:
            ValueError: the parameter cannot be optimized, or its sharding is unknown.
        """
        if self._lost_layout:
            raise ValueError(
                "this optimizer was copied or unpickled, which drops its layout; set it again: optimizer.layout = "
                "so.fsdp1_layout(model), or so.deepspeed.attach(engine)"
            )
        if self.layout is None:  # the model may have been wrapped after construction
            self.layout = find_layout(param, chain.from_iterable(map(itemgetter("params"), self.param_groups)))
        if self.layout is None and self._stands_for_others(param, group):
            raise ValueError(
                f"parameter {name!r} of shape {tuple(param.shape)} has replaced the parameters that the optimizer was built with, as "
                f"wrappers that flatten parameters do, and nothing says which tensors it holds. Under DeepSpeed call "
                f"so.deepspeed.attach(engine) after deepspeed.initialize, or so.deepspeed.initialize instead of it; add your own "
                f"parameters with add_param_group"
            )
        return self._with_matrices(describe(param, name, self.layout), group)

    def _with_matrices(self, entry: LocalParam, group: Mapping[str, Any]) -> LocalParam:
        """Return the entry with the matrices that the algorithm of its group needs whole.

        Raises:
            ValueError: a tensor is not a matrix. If a wrapper has flattened several tensors into this parameter, all ranks raise.
        """
        matrix = self._choose(group).matrix
        if matrix is None:
            return entry
        held = None if self.layout is None else self.layout.flat.get(entry.param)
        shapes = {piece.segment.name: piece.segment.shape for piece in entry.pieces} if held is None else held.shapes
        matrices = {}
        for name, shape in shapes.items():
            try:
                matrices[name] = matrices_of(matrix, shape, group)
            except ValueError as error:
                raise ValueError(f"parameter {name!r} {error}{_way_out_of_flattening(shapes)}") from None
        pieces = [replace(piece, matrices=matrices[piece.segment.name]) for piece in entry.pieces]
        return replace(entry, pieces=tuple(pieces))

    def _stands_for_others(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Return whether a wrapper such as DeepSpeed has replaced the parameters of a group by one flat tensor before its first step."""
        given = next((given for given in self._given if given.group is group), None)
        return given is not None and given.is_replaced_by(param)

    @property
    def layout(self) -> FlatLayout | None:
        """The layout of parameters whose sharding cannot be detected from the tensors."""
        return self._layout

    @layout.setter
    def layout(self, layout: FlatLayout | None) -> None:
        inner = self._behind_wrapper
        inner._layout = layout
        inner._lost_layout = False

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that train this model together; None means all."""
        return self._process_group

    @process_group.setter
    def process_group(self, process_group: dist.ProcessGroup | None) -> None:
        inner = self._behind_wrapper
        inner._process_group = process_group
        inner._lost_process_group = False

    @property
    def _behind_wrapper(self) -> GroupedOptimizer:
        """This optimizer, or the wrapped one if this is Lightning's wrapper, which makes itself a subclass of the class that it wraps."""
        return vars(self).get("_optimizer", self)

    def own_group(self) -> dist.ProcessGroup | None:
        """Return the library's own process group over these ranks; None if this process is alone. A collective on the first call.

        Raises:
            ValueError: the optimizer is a copy that has lost its process group, or this rank is not in it.
        """
        if self._lost_process_group:
            raise ValueError("this optimizer was copied or unpickled, which drops its process_group; set it again")
        return own_process_group(self.process_group) if dist.is_initialized() else None

    def all_params(self) -> list[Tensor]:
        """Return the parameters of all groups, in order."""
        return list(chain.from_iterable(map(itemgetter("params"), self.param_groups)))

    def groups_of(self, params: Sequence[Tensor] | None) -> list[dict[str, Any]]:
        """Return the current param group of each parameter: users move parameters, and loading a state dict replaces the groups.

        Args:
            params: some of the parameters; None means all, in order.

        Raises:
            ValueError: a parameter is in none of the groups.
        """
        if params is None:
            groups: list[dict[str, Any]] = []
            for group in self.param_groups:
                groups += [group] * len(group["params"])
            return groups
        return [place.group for place in self._index.places_of(self.param_groups, params)]

    def values_of(self, groups: Iterable[dict[str, Any]]) -> dict[int, GroupValues]:
        """Return the values in this step of these groups and of groups without parameters, keyed by id(group).

        Raises:
            ValueError: a hyperparameter has a value that no step could use.
        """
        asked = {*map(id, groups), *(id(group) for group in self.param_groups if not group["params"])}
        values: dict[int, GroupValues] = {}
        del self._values[len(self.param_groups) :]  # groups may have been removed
        for index, group in enumerate(self.param_groups):
            known = self._values[index] if index < len(self._values) else None
            if id(group) in asked and (known is None or not known.are_of(group, self.state_dtype)):
                where = f"param_groups[{index}]"
                self.checks.check_complete(group, where)
                passed = () if known is None else known.unchanged(group)
                self.checks.check(group, where, self.state_dtype, scheduled=True, passed=passed)
                known = GroupValues(group, self.state_dtype, self.checks.compared)
            self._values[index : index + 1] = [known]
            if id(group) in asked and known is not None:
                values[id(group)] = known
        return values

    def learn_reference_lrs(self) -> bool:
        """Set the reference of groups that learn it to the largest learning rate so far; return whether any has changed."""
        changed = False
        for group in self.param_groups:
            if group["learns_reference_lr"] and (lr := float(on_host(group["lr"]))) > group["reference_lr"]:
                group["reference_lr"], changed = lr, True
        return changed

    def _group_with(self, param: Tensor) -> dict[str, Any] | None:
        place = self._index.place_of(self.param_groups, param)
        return None if place is None else place.group

    def __getstate__(self) -> dict[str, Any]:
        own = ("_choose", "state_dtype", "_max_lr")
        lost = {
            "_lost_layout": self._layout is not None or self._lost_layout,
            "_lost_process_group": self._process_group is not None or self._lost_process_group,
        }
        return super().__getstate__() | {name: getattr(self, name) for name in own} | lost

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_choose" in state:  # unpickled or copied; torch also calls this with the loaded state and groups alone
            self._index = ParamIndex()
            self.checks = GroupChecks(self.hyperparameters, self.defaults, _supported_hyperparameters, self._choose)
            self._values = []
            self._layout = self._process_group = None
            self._given = list(map(_Given.of, self.param_groups))


def _way_out_of_flattening(shapes: Mapping[str, Any]) -> str:
    """Return the remedy for one of several tensors that a wrapper has flattened into one parameter; "" for a parameter by itself."""
    if len(shapes) < 2:
        return ""
    return (
        f". A wrapper has flattened it with {len(shapes) - 1} others into one parameter, which is in one param group: have FSDP1 keep the "
        f"original parameters (use_orig_params=True), or flatten each param group separately"
    )


def matrices_of(matrix: Matrix, shape: tuple[int, ...], group: Mapping[str, Any]) -> Matrices:
    """Return the matrices that a tensor is stepped as with the hyperparameters of its param group.

    Raises:
        ValueError: the tensor is not a matrix.
    """
    shapes = tuple(matrix.shapes(shape, group))
    return Matrices(dtype=matrix.dtype, shapes=shapes, flops=tuple(matrix.flops(*each) for each in shapes))


def _supported_hyperparameters() -> list[Hyperparameter]:
    """Return all hyperparameters that any optimizer class in this process supports."""
    return [each for optimizer in optimizer_classes() for each in optimizer.hyperparameters if not isinstance(each, Unsupported)]


def optimizer_classes() -> list[type[GroupedOptimizer]]:
    """Return all optimizer classes that are defined in this process, subclasses of users included."""
    classes = [GroupedOptimizer]
    for each in classes:
        classes += each.__subclasses__()
    return classes
