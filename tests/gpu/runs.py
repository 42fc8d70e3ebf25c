"""Runs of whole optimizers: the same parameters, gradients and schedule on any device, so that all bits can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from operand_cases import assert_same, random
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from variants import AmsgradAdamW, MomentumSGDW

import sharded_optim as so
from gpu.device import BACKEND, DEVICE, REHEARSAL

__all__ = ["CPU", "OPTIMIZERS", "STORAGES", "Run", "Storage", "assert_alike", "on_both"]

CPU = torch.device("cpu")
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "StableAdamW": so.StableAdamW,
    "AdamW": so.AdamW,
    "Adam": partial(so.Adam, weight_decay=0.1),
    "Adam-decoupled": partial(so.Adam, weight_decay=0.1, decay_form="decoupled"),
    "DecoupledAdamW": so.DecoupledAdamW,
    "amsgrad": AmsgradAdamW,
    "SGDW": partial(so.DecoupledSGDW, weight_decay=1e-4),
    "momentum": MomentumSGDW,
    "Nesterov": partial(so.DecoupledSGDW, momentum=0.9, nesterov=True, weight_decay=1e-4),
}


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How parameters are stored, and by which options."""

    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)


STORAGES = {
    "fp32": Storage(),
    "fp32-bf16_state": Storage(options={"state_dtype": torch.bfloat16}),
    "bf16": Storage(dtype=torch.bfloat16, options={"kahan_sum": False}),
    "bf16_kahan": Storage(dtype=torch.bfloat16),
    "bf16_kahan-bf16_state": Storage(dtype=torch.bfloat16, options={"state_dtype": torch.bfloat16}),
    "bf16_stochastic": Storage(dtype=torch.bfloat16, options={"stochastic_rounding": True, "rounding_seed": 7}),
    "bf16_kahan_stochastic": Storage(dtype=torch.bfloat16, options={"stochastic_rounding": True, "kahan_sum": True}),
    "fp16": Storage(dtype=torch.float16, options={"kahan_sum": False}),
    "fp16_kahan": Storage(dtype=torch.float16),
    "fp16_stochastic": Storage(dtype=torch.float16, options={"stochastic_rounding": True}),
}
SHAPES: list[tuple[int, ...]] = [(), (1,), (5,), (7, 3), (0,), (67,), (33, 5), (300_007,), (513, 512)]
if REHEARSAL:  # Triton's interpreter takes milliseconds for each tensor
    SHAPES = [(), (0,), (1,), (3, 2), (2,), (11,)]


class Run:
    """Parameters in two groups, their optimizer, and a schedule that changes both learning rates at every step.

    Args:
        optimizer: of `OPTIMIZERS`.
        storage: of `STORAGES`.
        device, backend: of the parameters, and what steps them.
        lr: of the first group; the other one has three times as much.
        options: of the optimizer.
    """

    def __init__(
        self,
        optimizer: str,
        storage: str = "fp32",
        device: torch.device = DEVICE,
        backend: str = BACKEND,
        *,
        lr: Any = 1e-2,
        **options: Any,
    ) -> None:
        self.device = device
        self.dtype = STORAGES[storage].dtype
        generator = torch.Generator().manual_seed(3)
        self.params = [nn.Parameter(random(generator, shape, 1.0).to(device, self.dtype)) for shape in SHAPES]
        groups = [{"params": self.params[::2]}, {"params": self.params[1::2], "lr": lr * 3}]
        self.optimizer = OPTIMIZERS[optimizer](groups, lr=lr, backend=backend, **STORAGES[storage].options | options)
        self.schedule = LambdaLR(self.optimizer, lambda step: 1.0 / (1.0 + 0.2 * step))

    def gradients(self, step: int) -> list[Tensor]:
        """Of a step: on the device, in the parameters' dtype."""
        generator = torch.Generator().manual_seed(1000 + step)
        return [random(generator, shape, 1.0).to(self.dtype).to(self.device) for shape in SHAPES]

    def give(self, grads: list[Tensor | None]) -> None:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad

    def fill(self, grads: list[Tensor]) -> None:
        """Write into the gradients that there are."""
        for param, grad in zip(self.params, grads, strict=True):
            param.grad.copy_(grad)

    def step(self, step: int) -> None:
        self.give(list(self.gradients(step)))
        self.optimizer.step()
        self.schedule.step()


def on_both(optimizer: str, storage: str = "fp32", **options: Any) -> tuple[Run, Run]:
    """A run on the device, and its reference: eagerly on the CPU."""
    return Run(optimizer, storage, **options), Run(optimizer, storage, CPU, "eager", **options)


def assert_alike(run: Run, reference: Run) -> None:
    """Parameters, state and step counters have the same bits, and the device's own backend has made them."""
    assert "backend: triton\n" in repr(run.optimizer), repr(run.optimizer)
    for index, (param, expected) in enumerate(zip(run.params, reference.params, strict=True)):
        assert param.device == run.device
        assert_same(param.detach(), expected.detach().cpu(), f"param {index}")
        state, other = run.optimizer.state.get(param, {}), reference.optimizer.state.get(expected, {})
        assert state.keys() == other.keys()
        for key, value in state.items():
            assert value.device == run.device, key
            assert_same(value, other[key].cpu(), f"{key} of param {index}")
    for group, other in zip(run.optimizer.param_groups, reference.optimizer.param_groups, strict=True):
        assert float(group["lr"]) == float(other["lr"])
