"""The same optimizer in one process, on ordinary tensors, given the gradients that the ranks had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sharded_optim.tools.verify.making import MakeOptimizer, named

__all__ = ["Grouping", "Reference", "relative_error"]


class Reference:
    """An optimizer of a whole model.

    Args:
        model: built as on the ranks.
        initial: what the ranks' parameters are before the first step.
        build: makes the optimizer.
    """

    def __init__(self, model: nn.Module, initial: Mapping[str, Tensor], build: Callable[[nn.Module], Any]) -> None:
        self.params = named(model)
        self._assign(initial)
        self.optimizer = build(model)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, param in self.params.items():
            param.copy_(values[name])

    def step(self, grads: Mapping[str, Tensor]) -> None:
        for name, param in self.params.items():
            grad = grads.get(name)
            param.grad = None if grad is None else grad.clone()  # some optimizers write to it
        self.optimizer.step()

    def errors(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return how far each of the ranks' parameters is from these; see `relative_error`."""
        return {name: relative_error(params[name].detach(), param.detach()) for name, param in self.params.items()}


class Grouping:
    """Whether an optimizer's result depends on how parameters are grouped.

    Steps all parameters by one optimizer, and each by one of its own. One of them lacks a gradient in the first step, as one of a frozen or
    unused layer does, and is not stepped alone then: a step counter of a whole group has counted one step more than the parameter.
    """

    def __init__(self, model: nn.Module, initial: Mapping[str, Tensor], make: MakeOptimizer) -> None:
        self.together = Reference(model, initial, make)
        self.alone = {name: nn.Parameter(param.detach().clone()) for name, param in self.together.params.items()}
        self._optimizers = {name: make.of_groups([{"params": [param]}]) for name, param in self.alone.items()}
        self.late = max(self.alone, key=lambda name: self.alone[name].numel())
        self._is_first = True

    def step(self, grads: Mapping[str, Tensor]) -> None:
        if self._is_first:
            grads = {name: grad for name, grad in grads.items() if name != self.late}
        self._is_first = False
        self.together.step(grads)
        for name, grad in grads.items():
            self.alone[name].grad = grad.clone()
            self._optimizers[name].step()

    def errors(self) -> dict[str, float]:
        """Return how far the parameters of the two are apart."""
        return self.together.errors(self.alone)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return max |value - reference| / max |reference|; 0.0 for equal bits, inf where one of them is not finite."""
    if torch.equal(value, reference) or value.numel() == 0:
        return 0.0
    difference, scale = (value.double() - reference.double()).abs().max().item(), reference.double().abs().max().item()
    if not (difference < float("inf") and scale < float("inf")):
        return float("inf")
    return difference / scale if scale else float("inf")
