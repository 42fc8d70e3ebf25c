"""Look up the param group of a parameter in constant time, even if users and wrappers edit the groups at any time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sharded_optim.step.param_groups import name_of_param

__all__ = ["ParamIndex", "Place"]

Group = dict[str, Any]


class Place(NamedTuple):
    """The position of a parameter: `groups[group_index]["params"][row]`."""

    group_index: int
    group: Group
    row: int

    @property
    def name(self) -> str:
        """The name of the parameter, or its position if it has none."""
        return name_of_param(self.group, self.group_index, self.row)


class ParamIndex:
    """Caches the positions of parameters. A cached position is verified before use, because ids are reused."""

    def __init__(self) -> None:
        self._places: dict[int, Place] = {}  # keyed by id(param)

    def place_of(self, groups: Sequence[Group], param: Tensor) -> Place | None:
        """Return the position of a parameter; None if it is in none of the groups."""
        place = self._known_place(groups, param)
        if place is None:
            key = id(param)
            if not any(key in map(id, group["params"]) for group in groups):  # faster than rebuilding the index
                return None
            self.look_up(groups)
            place = self._known_place(groups, param)
        return place

    def look_up(self, groups: Sequence[Group]) -> None:
        """Rebuild the cache with the positions of all parameters."""
        self._places = {id(p): Place(i, group, k) for i, group in enumerate(groups) for k, p in enumerate(group["params"])}

    def places_of(self, groups: Sequence[Group], params: Sequence[Tensor]) -> list[Place]:
        """Return the positions of parameters.

        Raises:
            ValueError: a parameter is in none of the groups.
        """
        places = []
        for param in params:
            place = self.place_of(groups, param)
            if place is None:
                raise ValueError("a parameter to step is in none of the optimizer's param groups; add it with add_param_group")
            places.append(place)
        return places

    def __contains__(self, param: Tensor) -> bool:
        """Return whether a parameter, still alive, was in a group when the cache was last rebuilt."""
        return id(param) in self._places

    def _known_place(self, groups: Sequence[Group], param: Tensor) -> Place | None:
        place = self._places.get(id(param))
        if place is None or place.group_index >= len(groups) or groups[place.group_index] is not place.group:
            return None
        params = place.group["params"]
        return place if place.row < len(params) and params[place.row] is param else None
