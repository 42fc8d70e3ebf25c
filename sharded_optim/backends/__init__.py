"""Backends run an algorithm's math on a device, over many local parameters in one call.

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

MODULES = ("cpu", "triton", "eager")  # in the order in which "auto" takes them; imported when asked for
PACKAGES = {"cpu": "llvmlite", "triton": "triton"}  # what a backend needs beside torch
AUTO = "auto"
TRITON, EAGER = "triton", "eager"


class AgreementFunctions(Protocol):
    """The functions of `formulas/verdict.py`, or the same in one launch each."""

    @property
    def contribute(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]: ...

    @property
    def judge(self) -> Judge: ...


class Judge(Protocol):
    """See `formulas.verdict.judge`."""

    def __call__(self, sums: Tensor, *, skips: bool) -> Verdict: ...


class Backend(AgreementFunctions, Protocol):
    """The interface of a backend. Its methods neither communicate nor wait for the device."""

    name: str

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
        """Return None, or the reason why this backend does not run on this device with these dtypes of parameters, gradients and state."""
        ...

    def prepare(self, algorithm: Algorithm, operands: Operands, formulas: Sequence[Formulas] = ()) -> None:
        """Do everything that may fail before the ranks agree: an update that fails on one rank alone would leave it behind the others.

        Args:
            formulas: of the coefficients that are going to be computed.
        """
        ...

    def tabulate(
        self,
        operands: Operands,
        formulas: Formulas,  # of inputs `step`, the next; those of `Sums`; and `lr`
        formula_of: Tensor | None,  # int64 (operands,), which of the formulas is each operand's; None if there is one
        steps: Tensor,  # fp32 (operands,), taken so far
        sums: Sums | None,
        lr: Tensor,  # float64 (formulas,)
    ) -> Tensor:
        """Compute the coefficients of each operand in float64, rounded once: fp32 (operands, results)."""
        ...

    def observe(
        self,
        statistic: Statistic | None,
        operands: Operands,
        coefficients: Tensor,  # fp32 (operands, coefficients of the statistic), on the operands' device
        limits: Tensor,  # fp32 (operands,), the largest statistic that is possible
        scales: Tensor,  # fp32 (operands,), powers of two from 2**-60 on, with limits * scales < 2**51
        grad_scale: Tensor | None,  # fp32 (), multiplies every gradient
    ) -> Tensor:
        """Sum each operand's statistic in fixed point. Writes nothing.

        Returns:
            int64 (2, operands): the sums of round_half_even(statistic * scale); and 1 where an element is NaN or beyond the limit, or,
            without a statistic, where a gradient has no finite square. There the sum is anything.
        """
        ...

    def update(
        self,
        algorithm: Algorithm,
        operands: Operands,
        coefficients: Tensor,  # fp32 (operands, coefficients of algorithm.update)
        proceed: Tensor | None,  # bool (); where False nothing changes. None: always proceed
        grad_scale: Tensor | None,
        noise_keys: Tensor
        | None,  # int64 (operands, random ones of operands.formats), what `noise.uniform` draws with; None: there are none
    ) -> None:
        """Write the new parameters and state. Called with `prepare`d operands, or with others, which it prepares."""
        ...

    @property
    def advance(self) -> Callable[[Tensor, Tensor | None], None]:
        """See `formulas.verdict.advance`; on contiguous counters."""
        ...


def available() -> tuple[str, ...]:
    """Names that `backend=` accepts."""
    return (AUTO, *MODULES)


def candidates(backend: str, triton: bool | None) -> tuple[str, ...]:
    """Names of the backends that may run, the preferred first.

    Args:
        backend: one of `available()`.
        triton: optimi's switch: True wants the Triton backend, False any other, None leaves it to `backend`.

    Raises:
        ValueError: an unknown backend, or two options that contradict each other.
        ImportError: the Triton backend is wanted and cannot be had.
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
    """Return the first of the named backends that supports the device and the dtypes, and the reasons of those before it.

    Raises:
        ValueError: all of them decline; says why.
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
