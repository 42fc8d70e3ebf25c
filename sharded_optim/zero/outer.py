"""A torch optimizer of whole parameters around one of this rank's parts: the lowest layer of a ShardedOptimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_optim.step.engine import Engine
from sharded_optim.step.param_groups import follow_names
from sharded_optim.zero.bucket_layout import BucketLayout, Group, without_params

__all__ = ["OuterOptimizer", "groups_outside"]


class OuterOptimizer(torch.optim.Optimizer):
    """A torch optimizer of whole parameters whose steps another one does, inside, on this rank's parts of them.

    Owns the optimizer inside. Both have the same param groups. The hyperparameters are those of this one, but for what a step changes.

    Args:
        params: the param groups of the optimizer inside, but with whole parameters: see `groups_outside`.
        engine: the optimizer inside.
        bucket_layout: says which part of each parameter it steps.
    """

    def __init__(self, params: list[Group], engine: Engine, bucket_layout: BucketLayout) -> None:
        self._engine = engine
        self._bucket_layout = bucket_layout
        super().__init__(params, engine.defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group that the optimizer inside has already."""
        follow_names(param_group, self.param_groups)
        super().add_param_group(param_group)

    @property
    def inside(self) -> Engine:
        """The optimizer that steps this rank's parts."""
        return self._engine

    def _step_inside(self) -> None:
        """Step this rank's parts, with the current hyperparameters and GradScaler's values."""
        for outside, inside in zip(self.param_groups, self._engine.param_groups, strict=True):
            inside |= without_params(outside)
        passed = {name: getattr(self, name) for name in ("grad_scale", "found_inf") if hasattr(self, name)}
        for name, value in passed.items():
            setattr(self._engine, name, value)
        try:
            self._engine.step()
        finally:
            for name in passed:
                delattr(self._engine, name)
        self._follow_inside()

    def _follow_inside(self) -> None:
        """Take over the hyperparameters of the optimizer inside, which it learns in a step, or has loaded."""
        for outside, inside in zip(self.param_groups, self._engine.param_groups, strict=True):
            outside |= without_params(inside)

    # --------------------------------------------------------------------------------------------------------------------- reports

    @property
    def skipped_steps(self) -> int:
        """As of the optimizer inside."""
        return self._engine.skipped_steps

    def metrics(self) -> dict[str, float]:
        """Return metrics of the last step, reduced over all ranks; see the optimizer inside."""
        return self._engine.metrics()

    def non_finite_ranks(self) -> dict[str, list[int]]:
        """Return on which ranks a tensor was not finite in the last step; see the optimizer inside. A collective where one was."""
        return self._engine.non_finite_ranks()

    def performance(self) -> dict[str, float]:
        """Return what the last step took of this rank; see the optimizer inside. Gradients and parameters on their way are not in it."""
        return self._engine.performance()

    def report_per_parameter_metrics(self, param: Tensor, name: str, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """As of the optimizer inside, of the part of a parameter that this rank steps."""
        slot = self._bucket_layout.slots.get(param)
        if slot is None or slot.local is None:
            return optimizer_metrics
        return self._engine.report_per_parameter_metrics(slot.local, name, optimizer_metrics)

    def pre_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """As of the optimizer inside."""
        return self._engine.pre_reduce_metrics(optimizer_metrics)

    def dist_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """As of the optimizer inside: a collective."""
        return self._engine.dist_reduce_metrics(optimizer_metrics)


def groups_outside(groups: Sequence[Group], inside: Sequence[Group]) -> list[Group]:
    """Return param groups of whole parameters with the hyperparameters of the optimizer inside."""
    return [without_params(own) | {"params": group["params"]} for group, own in zip(groups, inside, strict=True)]
