"""The layouts of an optimizer's parameters, made when they are first stepped together and kept. Used by the engine."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sharded_optim.devices import refuse_to_capture
from sharded_optim.param_index import ParamIndex
from sharded_optim.sharding import Layout, LocalParam

__all__ = ["Layouts"]

Group = dict[str, Any]
Groups = list[Group]
Describe = Callable[[Tensor, str, Group], LocalParam]  # (parameter, its name, its group) -> what this rank holds of it
Key = tuple[int, ...] | None  # of a set: the ids of its parameters, which its layout keeps alive; None: all parameters

SETS_PER_PARAM = 8  # layouts that are kept of sets with the same first parameter
SHOWN = 3  # names in a message


class Layouts:
    """A layout for all parameters, and one for each set of them that is stepped alone.

    Args:
        index: finds the groups of parameters.
        in_turns: a wrapper steps one set of parameters after the other by putting each into the groups.

    Attributes:
        last: the last that was of all parameters; None before the first.
        dropped: layouts that were replaced or are no longer kept, until the owner of this takes them from the list.
    """

    def __init__(self, index: ParamIndex, *, in_turns: bool) -> None:
        self._index = index
        self._present: list[int] = []  # ids of the parameters in the groups, when a layout was made last
        self._in_turns = in_turns
        self.last: Layout | None = None
        self.dropped: list[Layout] = []
        self._kept: dict[Key, Layout] = {}
        self._keys_of: defaultdict[int, list[Key]] = defaultdict(list)  # of sets, by their first parameter; the last made is last
        self._key_of_names: dict[tuple[str, ...], Key] = {}  # of sets, by the names of their parameters; the last made
        self._compared: dict[int, Tensor] = {}  # by id: parameters of which the ranks have compared the values
        self._compared_over: weakref.ref[dist.ProcessGroup] | None = None  # the ranks that have
        self._of_group: Layout | None = None  # of all parameters of all ranks, where no step needs it

    def current(
        self,
        groups: Groups,
        only: Sequence[Tensor] | None,
        describe: Describe,
        *,
        agree: bool,
        process_group: dist.ProcessGroup | None,
        confirm: Callable[[Layout, str], None],
    ) -> Layout:
        """Return the layout of all parameters as they are now, or of some. Users and wrappers replace parameters and groups.

        Args:
            groups: the optimizer's param groups.
            only: some of their parameters; None means all.
            describe: describes a parameter.
            agree: whether it must be of all ranks. It is made by a collective then.
            process_group: of these ranks.
            confirm: called before that collective if all ranks had a layout of this set before, with that layout and with what has changed.
                Raises ValueError, on all ranks, unless all replace theirs.

        Raises:
            ValueError: see `Layout.of_group`; or a parameter is in none of the groups.
        """
        params = _params(groups) if only is None else only
        key = None if only is None and not self._in_turns else tuple(map(id, params))
        layout = self._kept.get(key)
        if layout is None or layout.is_global != agree or not self._fits(layout, params, process_group):
            for param in params[:1]:
                refuse_to_capture(param.device)
            before = layout
            if layout is None and agree and only is not None:  # other ranks may step the set that this one was before
                names = self._names(groups, only)
                before = self._kept.get(self._key_of_names[names]) if names in self._key_of_names else None
            if before is not None and agree and process_group is not None and before.is_global_over(process_group):
                confirm(before, self._change(groups, params, before))
            layout = self._replace(key, groups, params, describe, agree=agree, process_group=process_group)
        if only is None:
            self.last = layout
        return layout

    def of_group(self, groups: Groups, describe: Describe, *, process_group: dist.ProcessGroup | None) -> Layout:
        """Return the layout of all parameters of all ranks, also where no step needs one. A collective when it is made."""
        params = _params(groups)
        for layout in (self._of_group, self._kept.get(None)):
            if layout is not None and layout.is_global and self._fits(layout, params, process_group):
                return layout
        self._of_group = self._make(groups, params, describe, process_group)
        return self._of_group

    def groups_of(self, groups: Groups, layout: Layout) -> Groups:
        """The param group in which each local parameter is now: they are moved, and groups are replaced when a state dict is loaded.

        Raises:
            ValueError: a parameter is in none of them.
        """
        if layout is self.last:
            return [group for group in groups for _ in group["params"]]
        return [place.group for place in self._index.places_of(groups, layout.params)]

    def _fits(self, layout: Layout, params: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> bool:
        return (not layout.is_global or layout.is_global_over(process_group)) and layout.describes(params)

    def _replace(
        self,
        key: Key,
        groups: Groups,
        params: Sequence[Tensor],
        describe: Describe,
        *,
        agree: bool,
        process_group: dist.ProcessGroup | None,
    ) -> Layout:
        if agree:
            layout = self._make(groups, params, describe, process_group)
        else:
            layout = Layout.of_rank(self._describe_all(groups, params, describe))
        self._prune(groups)
        if key is None:
            self._drop(list(self._kept))
        elif key in self._kept:
            self._drop([key])
        elif key:  # the same on all ranks, as they step the same sets in the same order
            self._drop(self._keys_of[key[0]][: 1 - SETS_PER_PARAM])
        self._kept[key] = layout
        if key:
            self._keys_of[key[0]].append(key)
            self._key_of_names[tuple(entry.name for entry in layout.local_params)] = key
        return layout

    def _drop(self, keys: Sequence[Key]) -> None:
        for key in keys:
            layout = self._kept.pop(key)
            self.dropped.append(layout)
            if key:
                self._key_of_names.pop(tuple(entry.name for entry in layout.local_params), None)
                self._keys_of[key[0]].remove(key)
                if not self._keys_of[key[0]]:
                    del self._keys_of[key[0]]

    def _make(self, groups: Groups, params: Sequence[Tensor], describe: Describe, process_group: dist.ProcessGroup | None) -> Layout:
        """Make a layout of all ranks: a collective. Values of replicas are compared once: later, they may have drifted in their last bits,
        where kernels are not deterministic.
        """
        over = None if process_group is None else weakref.ref(process_group)
        if over != self._compared_over:
            self._compared.clear()
            self._compared_over = over
        layout = Layout.of_group(
            partial(self._describe_all, groups, params, describe),
            process_group,
            compares_values=lambda param: id(param) not in self._compared,
        )
        self._compared |= {id(param): param for param in params}
        return layout

    def _describe_all(self, groups: Groups, params: Sequence[Tensor], describe: Describe) -> list[LocalParam]:
        if not params:
            raise ValueError(
                "the optimizer's param groups are empty, as DeepSpeed's ZeRO stage 3 leaves them between steps; step through the wrapper"
            )
        found = zip(params, self._index.places_of(groups, params), strict=True)
        return [describe(param, place.name, place.group) for param, place in found]

    def _names(self, groups: Groups, only: Sequence[Tensor]) -> tuple[str, ...]:
        """The names of a set, by which its layout is found when one rank alone has replaced some of its parameters."""
        return tuple(place.name for place in self._index.places_of(groups, only))

    def _prune(self, groups: Groups) -> None:
        """Let go of what is known of parameters that have left the groups: on all ranks in the same step, as they step the same."""
        present = [id(param) for group in groups for param in group["params"]]
        if present == self._present or self._in_turns:  # then they come back
            return
        self._present = present
        self._index.look_up(groups)
        self._compared = {key: param for key, param in self._compared.items() if param in self._index}
        self._drop([key for key, layout in self._kept.items() if key and not all(param in self._index for param in layout.params)])

    def _change(self, groups: Groups, params: Sequence[Tensor], layout: Layout) -> str:
        """How parameters differ from those of a layout, for an error message."""
        before, now = set(map(id, layout.params)), set(map(id, params))
        if added := [param for param in params if id(param) not in before]:
            names = [place.name for place in self._index.places_of(groups, added)]
            return f"{len(added)} new ones, {', '.join(map(repr, names[:SHOWN]))}{', ...' if len(names) > SHOWN else ''}"
        if gone := [entry.name for entry in layout.local_params if id(entry.param) not in now]:
            return f"without {len(gone)}, {', '.join(map(repr, gone[:SHOWN]))}{', ...' if len(gone) > SHOWN else ''}"
        return "the same in another order, or of other shapes, dtypes, devices or placements"


def _params(groups: Groups) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]
