"""Backends: run an algorithm's math on a device, over many local parameters in one call. Used by kernel calls.

All give the same bits as `eager`, the reference. To add one, write a module with a `BACKEND` and list it in `MODULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from sharded_optim.backends.operands import Column, Operands
from sharded_optim.formulas import Algorithm, Statistic
from sharded_optim.formulas.recording import Formulas
from sharded_optim.formulas.scalars import Sums
from sharded_optim.formulas.verdict import Verdict

__all__ = [
    "AUTO",
    "EAGER",
    "AgreementFunctions",
    "Backend",
    "Column",
    "Operands",
    "available",
    "candidates",
    "choose",
]

MODULES = ("cpu", "triton", "eager")  # in the order of preference of "auto"; imported on demand
PACKAGES = {"cpu": "llvmlite", "triton": "triton"}  # package that a backend needs besides torch
AUTO = "auto"
TRITON, EAGER = "triton", "eager"


class AgreementFunctions(Protocol):
    """Implementation of `formulas/verdict.py` for a device: the functions themselves, or kernels that do the same in one launch."""

    @property
    def contribute(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]: ...

    @property
    def judge(self) -> Judge: ...


class Judge(Protocol):
    """Signature of `formulas.verdict.judge`."""

    def __call__(self, sums: Tensor, *, skips: bool) -> Verdict: ...


class Backend(AgreementFunctions, Protocol):
    """The interface of a backend. Its methods neither communicate nor wait for the device."""

    name: str

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
        """Return None, or the reason why this backend does not run on this device with these dtypes of parameters, gradients and state."""
        ...

    def prepare(self, algorithm: Algorithm, operands: Operands, formulas: Sequence[Formulas] = ()) -> None:
        """Do everything that may fail, before the ranks agree: an update that fails on one rank only would leave it behind the others.

        Args:
            formulas: the formulas that `tabulate` will be called with.
        """
        ...

    def tabulate(
        self,
        operands: Operands,
        formulas: Formulas,  # their inputs are `step` (number of the coming step), `lr`, and the inputs of `Sums`
        formula_of: Tensor | None,  # int64 (operands,), index of each operand's formula; None if there is only one
        steps: Tensor,  # fp32 (operands,), steps taken so far
        sums: Sums | None,  # None: no formula has its inputs
        lr: Tensor,  # float64 (formulas,), learning rate of each formula
    ) -> Tensor:
        """Compute the coefficients of each operand in float64, rounded once: fp32 (operands, results)."""
        ...

    def observe(
        self,
        statistic: Statistic | None,
        operands: Operands,
        coefficients: Tensor,  # fp32 (operands, coefficients of the statistic), on the operands' device
        limits: Tensor,  # fp32 (operands,), largest possible statistic
        scales: Tensor,  # fp32 (operands,), powers of two >= 2**-60, with limits * scales < 2**51
        grad_scale: Tensor | None,  # fp32 (), factor of every gradient; None means 1
    ) -> Tensor:
        """Sum each operand's statistic in fixed point. Writes to none of the operands.

        Returns:
            int64 (2, operands): the sum of round_half_even(statistic * scale), and a flag: 1 if an element is NaN or above the limit, or,
            without a statistic, if a gradient has no finite square. The sum of a flagged operand is undefined.
        """
        ...

    def update(
        self,
        algorithm: Algorithm,
        operands: Operands,
        coefficients: Tensor,  # fp32 (operands, coefficients of algorithm.update)
        proceed: Tensor | None,  # bool (); if False nothing changes. None: always proceed
        grad_scale: Tensor | None,  # fp32 (), factor of every gradient; None means 1
        noise_keys: Tensor | None,  # int64 (operands, random formats in operands.formats), keys of `noise.uniform`; None: no such format
    ) -> None:
        """Write the new parameters and state in place. Operands need not be `prepare`d before, except to fail early."""
        ...

    @property
    def advance(self) -> Callable[[Tensor, Tensor | None], None]:
        """Implementation of `formulas.verdict.advance` for contiguous counters."""
        ...


def available() -> tuple[str, ...]:
    """Return the names that `backend=` accepts."""
    return (AUTO, *MODULES)


def candidates(backend: str, triton: bool | None) -> tuple[str, ...]:
    """Return the names of the backends that may run, in order of preference.

    Args:
        backend: one of `available()`.
        triton: optimi's switch: True requires the Triton backend, False excludes it, None leaves the choice to `backend`.

    Raises:
        ValueError: an unknown backend, or two options that contradict each other.
        ImportError: the Triton backend is required and not installed.
    """
    if backend not in available():
        raise ValueError(f"backend must be one of {', '.join(available())}, got {backend!r}")
    if triton:
        if backend not in (AUTO, TRITON):
            raise ValueError(f"triton=True contradicts backend={backend!r}; give one of the two")
        if find_spec("triton") is None:
            raise ImportError("triton=True needs the triton package: pip install triton, or leave triton out")
        return (TRITON,)
    if triton is False and backend == TRITON:
        raise ValueError("triton=False contradicts backend='triton'; give one of the two")
    names = MODULES if backend == AUTO else (backend,)
    return tuple(name for name in names if triton is None or name != TRITON)


def choose(names: Sequence[str], device: torch.device, dtypes: frozenset[torch.dtype]) -> tuple[Backend, list[str]]:
    """Return the first of the named backends that supports the device and dtypes, and the reasons why the backends before it do not.

    Raises:
        ValueError: no backend supports them; gives the reasons.
    """
    reasons = []
    for name in names:
        try:
            backend: Backend = import_module(f"{__name__}.{name}").BACKEND
        except ImportError as error:
            reasons.append(f"{name}: {error} (pip install {PACKAGES[name]})")
            continue
        reason = backend.supports(device, dtypes)
        if reason is None:
            return backend, reasons
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no backend for {device} and {', '.join(map(str, dtypes))}: {'; '.join(reasons)}; backend='auto' picks one that fits")
