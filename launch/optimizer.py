"""The job's optimizer, and the schedule of its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from launch.config import OptimizerConfig
from sharded_optim.optimizers import OPTIMIZERS, Muon

__all__ = ["build_optimizer", "build_schedule"]

WARMUP_START = 0.01  # share of the peak learning rate in the first step: a step at 0 would be wasted


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: OptimizerConfig,
    dimensions: Mapping[str, int],  # `ndim` of each whole tensor by name, as wrappers flatten parameters
    constructor: Callable[..., torch.optim.Optimizer] | None = None,  # called as so.ShardedOptimizer is; None: the optimizer's class
    muon_groups: Sequence[Mapping[str, Any]] = (),  # `so.muon_param_groups` of the unwrapped model, for Muon and the rest
    **options: Any,  # further arguments of the constructor
) -> torch.optim.Optimizer:
    """Build the optimizer that the config names, with a param group of matrices and one of gains, or with Muon's groups.

    Gradients are not clipped: StableAdamW clips updates, per tensor.
    """
    named = list(named_parameters)  # the optimizer uses the names in errors and metrics
    matrices = [(name, param) for name, param in named if dimensions[name] >= 2]
    gains = [(name, param) for name, param in named if dimensions[name] < 2]  # gains of norms: decay would pull them from 1 to 0
    # Keys that are None are left out, so that the optimizer's own defaults apply.
    given: dict[str, Any] = {key: value for key, value in config.model_dump().items() if key != "name" and value is not None}
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    if config.name == Muon.__name__:
        params = dict(named)
        groups = [{**group, "params": [(name, params[name]) for name, _ in group["params"]]} for group in muon_groups]
    optimizer_class: Callable[..., torch.optim.Optimizer] = OPTIMIZERS[config.name]
    if constructor is None:
        return optimizer_class(groups, **given, **options)
    return constructor(groups, optimizer_class, **given, **options)


def build_schedule(optimizer: torch.optim.Optimizer, warmup_steps: int, steps: int) -> LRScheduler:
    """Build the schedule of the learning rate: linear warm-up to the optimizer's lr, then half a cosine down to 0 after the last step."""
    decay = CosineAnnealingLR(optimizer, T_max=steps - warmup_steps)
    if warmup_steps == 0:
        return decay
    warmup = LinearLR(optimizer, start_factor=WARMUP_START, total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, decay], milestones=[warmup_steps])
