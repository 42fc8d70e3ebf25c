"""The layouts of an optimizer's parameters, made when they are first stepped together and kept. Used by the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sharded_optim.param_groups import named_params
from sharded_optim.sharding import Layout, LocalParam, describe

__all__ = ["Layouts"]

Groups = list[dict[str, Any]]


class Layouts:
    """A layout for all parameters, and one for each set of them that is stepped alone."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...] | None, Layout] = {}  # by the ids of a set's parameters; None: all
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
        key = None if only is None else tuple(map(id, only))
        params = _params(groups) if only is None else only
        layout = self._kept.get(key)
        if layout is None or not layout.describes(params):
            if only is None:
                self._kept.clear()
            layout = self._make(groups, params, process_group) if agree else Layout.of_rank(_describe(groups, params))
            self._kept[key] = layout
        return layout

    def of_group(self, groups: Groups, *, agree: bool, process_group: dist.ProcessGroup | None) -> Layout:
        """The layout of all parameters of all ranks, also where no step needs one. A collective when it is made."""
        params = _params(groups)
        layout = self._of_group or (self._kept.get(None) if agree else None)
        if layout is None or not layout.describes(params):
            layout = self._of_group = self._make(groups, params, process_group)
        return layout

    def groups_of(self, groups: Groups, layout: Layout) -> Groups:
        """The param group of each local parameter. Groups are replaced when a state dict is loaded, so they are looked up anew."""
        if layout is self._kept.get(None):
            return [group for group in groups for _ in group["params"]]
        live = set(map(id, groups))
        found = [self._group_of.get(id(param)) for param in layout.params]
        if any(id(group) not in live for group in found):
            self._group_of = {id(param): group for group in groups for param in group["params"]}
        return [self._group_of[id(param)] for param in layout.params]

    def _make(self, groups: Groups, params: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> Layout:
        ids = set(map(id, params))
        # Later, replicas may have drifted in their last bits, where kernels are not deterministic.
        layout = Layout.of_group(lambda: _describe(groups, params), process_group, compare_values=self._compared.isdisjoint(ids))
        self._compared |= ids
        return layout


def _params(groups: Groups) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]


def _describe(groups: Groups, params: Sequence[Tensor]) -> list[LocalParam]:
    names = {id(param): name for index, group in enumerate(groups) for param, name in named_params(group, index)}
    if any(id(param) not in names for param in params):
        raise ValueError("a parameter to step is in none of the optimizer's param groups; add it with add_param_group")
    return [describe(param, names[id(param)]) for param in params]
