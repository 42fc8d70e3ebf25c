"""Backends run an algorithm's math on a device, over many local parameters in one call.

All give the same bits as `eager`, the reference. To add one, write a module with a `BACKEND` and list it in `MODULES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from sharded_optim.algorithms import Algorithm, Statistic
from sharded_optim.formats import Format, format_of
from sharded_optim.segment import Segment

__all__ = ["AUTO", "Backend", "Operand", "available", "candidates", "choose"]

MODULES = ("eager", "cpu")  # in the order in which "auto" takes them; imported when asked for
EXTRAS = {"cpu": "cpu"}  # what a backend's packages are installed by
AUTO = "auto"
TRITON = "triton"


@dataclass(frozen=True, kw_only=True)
class Operand:
    """The local tensors of one parameter in one step: equal shapes, any dtypes that have a format, any strides."""

    segment: Segment  # which elements of which tensor these are, in the tensors' row-major order
    param: Tensor  # written by update
    extra: tuple[Tensor, ...]  # the further arrays of the parameter's format; written by update
    format: Format  # how the parameter is stored
    grad: Tensor  # read-only
    state: tuple[Tensor, ...]  # in the order of Algorithm.state, each in the plain format of its dtype; written by update

    @classmethod
    def whole(cls, param: Tensor, grad: Tensor, state: Sequence[Tensor], name: str = "param") -> Operand:
        """A whole tensor in the plain format of its dtype."""
        segment = Segment.whole(name, param.shape)
        return cls(segment=segment, param=param, extra=(), format=format_of(param.dtype), grad=grad, state=tuple(state))


class Backend(Protocol):
    """What the engine needs of a backend. Nothing here communicates, and nothing waits for the device."""

    name: str

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
        """None, or why this backend does not run on this device with these dtypes of parameters, gradients and state."""
        ...

    def observe(
        self,
        statistic: Statistic | None,
        operands: Sequence[Operand],
        coefficients: Tensor,  # fp32 (operands, coefficients of the statistic), on the operands' device
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
        noise_keys: Tensor | None,  # int64 (operands,), what `noise.uniform` draws with; None if no format is random
    ) -> None:
        """Write the new parameters and state."""
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
        if TRITON not in MODULES:
            raise ImportError(f"triton=True, but this version has no Triton backend, only {', '.join(MODULES)}; leave triton out")
        if find_spec("triton") is None:
            raise ImportError("triton=True needs the triton package, which is not installed: pip install triton, or leave triton out")
        return (TRITON,)
    if triton is False and backend == TRITON:
        raise ValueError("triton=False contradicts backend='triton'; give one of the two")
    names = MODULES if backend == AUTO else (backend,)
    return tuple(name for name in names if triton is None or name != TRITON)


def choose(names: Sequence[str], device: torch.device, dtypes: frozenset[torch.dtype]) -> Backend:
    """The first of the named backends that supports the device and dtypes.

    Raises:
        ValueError: all of them decline; says why.
    """
    reasons = []
    for name in names:
        try:
            backend: Backend = import_module(f"{__name__}.{name}").BACKEND
        except ImportError as error:
            reasons.append(f"{name}: {error} (pip install 'sharded-optim[{EXTRAS[name]}]')")
            continue
        reason = backend.supports(device, dtypes)
        if reason is None:
            return backend
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no backend for {device} and {', '.join(map(str, dtypes))}: {'; '.join(reasons)}; backend='auto' picks one that fits")
