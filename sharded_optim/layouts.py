"""The layouts of an optimizer's parameters, made when they are first stepped together and kept. Used by the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sharded_optim.devices import refuse_to_capture
from sharded_optim.param_groups import named_params
from sharded_optim.sharding import Layout, LocalParam

__all__ = ["Layouts"]

Groups = list[dict[str, Any]]
Describe = Callable[[Tensor, str, dict[str, Any]], LocalParam]  # (parameter, its name, its group) -> what this rank holds of it


class Layouts:
    """A layout for all parameters, and one for each set of them that is stepped alone.

    Args:
        describe: describes a parameter.
        in_turns: a wrapper steps one set of parameters after the other by putting each into the groups.
    """

    def __init__(self, describe: Describe, *, in_turns: bool) -> None:
        self._describe = describe
        self._in_turns = in_turns
        self._kept: dict[tuple[int, ...] | None, Layout] = {}  # by the ids of a set's parameters; None: all
        self._all: Layout | None = None  # the last that was of all parameters in the groups
        self._compared: set[int] = set()  # ids of the parameters whose values the ranks have compared
        self._group_of: dict[int, dict[str, Any]] = {}  # by a parameter's id
        self._of_group: Layout | None = None  # of all parameters of all ranks, where no step needs it

    def current(self, groups: Groups, only: Sequence[Tensor] | None, *, agree: bool, process_group: dist.ProcessGroup | None) -> Layout:
        """The layout of the parameters as they are now (wrappers replace them after construction), or of some alone.

        Args:
            groups: the optimizer's param groups.
            only: some of their parameters; None means all.
            agree: whether it must be of all ranks. It is made by a collective then.
            process_group: of these ranks.
        """
        params = _params(groups) if only is None else only
        key = None if only is None and not self._in_turns else tuple(map(id, params))
        layout = self._kept.get(key)
        if layout is None or not layout.describes(params):
            for param in params[:1]:
                refuse_to_capture(param.device)
            if key is None:
                self._kept.clear()
            layout = self._make(groups, params, process_group) if agree else Layout.of_rank(self._describe_all(groups, params))
            self._kept[key] = layout
        if only is None:
            self._all = layout
        return layout

    @property
    def last(self) -> Layout | None:
        """The last that was of all parameters; None before the first."""
        return self._all

    def of_group(self, groups: Groups, *, agree: bool, process_group: dist.ProcessGroup | None) -> Layout:
        """The layout of all parameters of all ranks, also where no step needs one. A collective when it is made."""
        params = _params(groups)
        layout = self._of_group or (self._kept.get(None) if agree else None)
        if layout is None or not layout.describes(params):
            layout = self._of_group = self._make(groups, params, process_group)
        return layout

    def groups_of(self, groups: Groups, layout: Layout) -> Groups:
        """The param group of each local parameter. Groups are replaced when a state dict is loaded, so they are looked up anew."""
        if layout is self._all:
            return [group for group in groups for _ in group["params"]]
        live = set(map(id, groups))
        found = [self._group_of.get(id(param)) for param in layout.params]
        if any(id(group) not in live for group in found):
            self._group_of = {id(param): group for group in groups for param in group["params"]}
        return [self._group_of[id(param)] for param in layout.params]

    def _make(self, groups: Groups, params: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> Layout:
        ids = set(map(id, params))
        # Later, replicas may have drifted in their last bits, where kernels are not deterministic.
        describe = partial(self._describe_all, groups, params)
        layout = Layout.of_group(describe, process_group, compare_values=self._compared.isdisjoint(ids))
        self._compared |= ids
        return layout

    def _describe_all(self, groups: Groups, params: Sequence[Tensor]) -> list[LocalParam]:
        named = {id(param): (name, group) for index, group in enumerate(groups) for param, name in named_params(group, index)}
        if any(id(param) not in named for param in params):
            raise ValueError("a parameter to step is in none of the optimizer's param groups; add it with add_param_group")
        if not params:
            raise ValueError(
                "the optimizer's param groups are empty, as DeepSpeed's ZeRO stage 3 leaves them between steps; step through the wrapper"
            )
        return [self._describe(param, *named[id(param)]) for param in params]


def _params(groups: Groups) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]
