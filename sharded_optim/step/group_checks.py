"""Check the hyperparameters of param groups by what an optimizer class declares of them. Used by `GroupedOptimizer`."""

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
        defaults: hyperparameters of its groups. What is not declared is checked and compared as any value.
        supported: hyperparameters that any optimizer supports. A wrong value of one that this optimizer does not declare is a mistake too.
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
        """Names of the hyperparameters that must be the same on all ranks that agree on a step."""
        return frozenset(name for name, each in self._declared.items() if each.compared)

    @cached_property
    def foreign(self) -> dict[str, Hyperparameter]:
        """Hyperparameters that other optimizers support, and this one does not declare."""
        return {name: each for name, each in by_name(self._supported()).items() if name not in self._declared}

    @cached_property
    def _known(self) -> dict[str, Hyperparameter]:
        return self.foreign | self._declared

    @cached_property
    def _required(self) -> list[str]:
        """Hyperparameters that every param group has."""
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
            where: where the group stands, for the error.
            scheduled: a scheduler may have written the group.
            passed: names of hyperparameters whose values have passed such a check.
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
        """Raise ValueError for a group that has lost a hyperparameter."""
        if lost := [name for name in self._required if name not in group]:
            raise ValueError(f"{where} has lost {', '.join(map(repr, lost))}; a step needs it: set it again")
