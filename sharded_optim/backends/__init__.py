"""Backends run an algorithm's math on a device, over many local parameters in one call.

All give the same bits as `eager`, the reference. To add one, write a module with a `BACKEND` and list it in `MODULES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from sharded_optim.algorithms import Algorithm

__all__ = ["AUTO", "Backend", "Operand", "available", "choose"]

MODULES = ("eager",)  # fastest first; imported when asked for
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Operand:
    """The local tensors of one parameter in one step: equal shapes, any dtypes that have a format, any strides."""

    param: Tensor  # written by update
    grad: Tensor  # read-only
    state: tuple[Tensor, ...]  # in the order of Algorithm.state; written by update


class Backend(Protocol):
    """What the engine needs of a backend. Nothing here communicates, and nothing waits for the device."""

    name: str

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
        """None, or why this backend does not run on this device with these dtypes of parameters, gradients and state."""
        ...

    def observe(
        self,
        algorithm: Algorithm,
        operands: Sequence[Operand],
        coefficients: Tensor,  # fp32 (operands, coefficients of algorithm.statistic), on the operands' device
        limits: Sequence[float],  # the largest statistic that is possible, of each operand
        bits: Sequence[int],  # fraction bits of the fixed-point sum, of each operand
        grad_scale: Tensor | None,  # fp32 (), multiplies every gradient
    ) -> tuple[Tensor, Tensor]:
        """Sum each operand's statistic in fixed point. Writes nothing.

        Returns:
            sums: int64 (operands,), the sum of round_half_even(statistic * 2**bits) over the elements that are finite.
            non_finite: int64 (operands,), how many elements are not: NaN, or beyond the limit. Without a statistic, how many gradients
                have no finite square.
        """
        ...

    def update(
        self,
        algorithm: Algorithm,
        operands: Sequence[Operand],
        coefficients: Tensor,  # fp32 (operands, coefficients of algorithm.update)
        proceed: Tensor | None,  # bool (); where False nothing changes. None: always proceed
        grad_scale: Tensor | None,
    ) -> None:
        """Write the new parameters and state."""
        ...


def available() -> tuple[str, ...]:
    """Names that `backend=` accepts."""
    return (AUTO, *MODULES)


def choose(requested: str, device: torch.device, dtypes: frozenset[torch.dtype]) -> Backend:
    """The requested backend, or for "auto" the first that supports the device and dtypes.

    Raises:
        ValueError: the requested backend declines; says why.
    """
    reasons = []
    for name in MODULES if requested == AUTO else (requested,):
        backend: Backend = import_module(f"{__name__}.{name}").BACKEND
        reason = backend.supports(device, dtypes)
        if reason is None:
            return backend
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no backend for {device} and {', '.join(map(str, dtypes))}: {'; '.join(reasons)}; backend='auto' picks one that fits")
