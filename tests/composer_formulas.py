"""MosaicML Composer's DecoupledAdamW and DecoupledSGDW, written down from their formulas: references, as Composer cannot be installed here.

The same base classes (torch's), signatures, defaults, state keys and group keys, so that their state dicts are such as Composer saves. A
step is one loop over the parameters in the order of the formulas, in the parameter's dtype. Composer's own faults that a state dict can
tell are kept: the reference learning rate is `group["initial_lr"]`, which is written at construction alone and which schedulers overwrite;
at 0 every step decays by the whole `weight_decay`; without momentum the buffer that is stored is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["DecoupledAdamW", "DecoupledSGDW"]


class _Decoupled(torch.optim.Optimizer):
    """theta <- theta * (1 - weight_decay * lr / initial_lr), then what `_update` does."""

    def _set_initial_lr(self) -> None:
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            share = group["lr"] / group["initial_lr"] if group["initial_lr"] else 1.0
            for param in group["params"]:
                if param.grad is not None:
                    param.mul_(1.0 - group["weight_decay"] * share)
                    self._update(param, param.grad, self.state[param], group)
        return loss

    def _update(self, theta: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class DecoupledAdamW(_Decoupled, torch.optim.AdamW):
    """m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) g^2; theta <- theta - lr / bc1 * m / (sqrt(v) / sqrt(bc2) + eps).

    With `amsgrad` the largest v so far is in the place of v.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-5,
        amsgrad: bool = False,
    ) -> None:
        torch.optim.AdamW.__init__(self, params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
        self._set_initial_lr()

    def _update(self, theta: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(theta), torch.zeros_like(theta)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(theta)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        t = state["step"].item()
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        if group["amsgrad"]:
            v = torch.maximum(state["max_exp_avg_sq"], v, out=state["max_exp_avg_sq"])
        theta.sub_(group["lr"] / (1 - beta1**t) * m / (v.sqrt() / math.sqrt(1 - beta2**t) + group["eps"]))


class DecoupledSGDW(_Decoupled, torch.optim.SGD):
    """buffer <- mu buffer + (1 - dampening) g, at first g; theta <- theta - lr buffer, with `nesterov` theta - lr (g + mu buffer)."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
    ) -> None:
        torch.optim.SGD.__init__(self, params, lr, momentum, dampening, weight_decay, nesterov)
        self._set_initial_lr()

    def _update(self, theta: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        buffer, mu = state.get("momentum_buffer"), group["momentum"]
        if mu:
            buffer = g.clone() if buffer is None else mu * buffer + (1 - group["dampening"]) * g
            g = g + mu * buffer if group["nesterov"] else buffer
        state["momentum_buffer"] = buffer
        theta.sub_(group["lr"] * g)
