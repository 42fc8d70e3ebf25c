"""Check the hyperparameters of param groups against the declarations of an optimizer class. Used by `GroupedOptimizer`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch

from sharded_optim.formulas import Choose
from sharded_optim.formulas.hyperparameters import Hyperparameter, Unsupported, by_name
from sharded_optim.step import param_groups

__all__ = ["GroupChecks"]


class GroupChecks:
    """The checks of an optimizer's param groups.

    Args:
        declared: hyperparameters that the optimizer's class declares.
        defaults: default hyperparameters of its groups. One without a declaration is checked and compared as a plain `Hyperparameter`.
        supported: returns the hyperparameters of all optimizers. A wrong value is an error even if this class does not declare it.
        choose: chooses the algorithm of a group.
    """

    def __init__(
        self,
        declared: Iterable[Hyperparameter],
        defaults: Mapping[str, Any],
        supported: Callable[[], Iterable[Hyperparameter]],
        choose: Choose,
    ) -> None:
        self._declared = {name: Hyperparameter(name) for name in defaults} | by_name(declared)
        self._defaults = tuple(defaults)
        self._supported = supported
        self._choose = choose

    @cached_property
    def compared(self) -> frozenset[str]:
        """Names of the hyperparameters that must be the same on all ranks of a step."""
        return frozenset(name for name, each in self._declared.items() if each.compared)

    @cached_property
    def foreign(self) -> dict[str, Hyperparameter]:
        """Hyperparameters that other optimizers support and this one does not declare, keyed by name."""
        return {name: each for name, each in by_name(self._supported()).items() if name not in self._declared}

    @cached_property
    def _known(self) -> dict[str, Hyperparameter]:
        return self.foreign | self._declared

    @cached_property
    def _required(self) -> list[str]:
        """Names of the hyperparameters that every param group must have."""
        names = (*self._defaults, "reference_lr", "learns_reference_lr")
        return [name for name in names if not isinstance(self._declared.get(name), Unsupported | None)]

    def check(
        self,
        group: dict[str, Any],
        where: str,
        state_dtype: torch.dtype | str,
        *,
        scheduled: bool = False,
        passed: Collection[str] = (),
    ) -> None:
        """Raise ValueError for hyperparameters that no step could use.

        Args:
            where: description of the group, for the error.
            scheduled: whether a scheduler may have written the group.
            passed: names of hyperparameters whose values were already checked.
        """
        for name, each in self._known.items():
            if name in group and name not in passed:
                each.check(group[name], where, scheduled=scheduled)
        try:
            self._choose(group)
        except ValueError as error:
            raise ValueError(f"{error} (in {where})") from None
        param_groups.check_state_dtype(state_dtype, group, where)

    def check_complete(self, group: Mapping[str, Any], where: str) -> None:
        """Raise ValueError if a hyperparameter was removed from a group."""
        if lost := [name for name in self._required if name not in group]:
            raise ValueError(f"{where} has lost {', '.join(map(repr, lost))}, which a step needs; set it again")
