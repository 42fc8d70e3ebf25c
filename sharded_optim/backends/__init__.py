"""Backends run an algorithm's math on a device, over many local parameters in one call.

All give the same bits as `eager`, the reference. To add one, write a module with a `BACKEND` and list it in `MODULES`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from sharded_optim.formulas import Algorithm, Statistic
from sharded_optim.formulas.scalars import Formula, Sums
from sharded_optim.formulas.verdict import Verdict
from sharded_optim.sharding.segment import Segment
from sharded_optim.storage.formats import Format, format_of

__all__ = [
    "AUTO",
    "EAGER",
    "Backend",
    "Column",
    "Judge",
    "Operands",
    "Tabulate",
    "addresses_of",
    "available",
    "candidates",
    "choose",
]

MODULES = ("cpu", "triton", "eager")  # in the order in which "auto" takes them; imported when asked for
PACKAGES = {"cpu": "numba", "triton": "triton"}  # what a backend needs beside torch
AUTO = "auto"
TRITON, EAGER = "triton", "eager"


class Column:
    """One tensor of each of several parameters: equal dtypes and devices, any shapes and strides.

    Attributes:
        wholes: the tensors that these are, or, where a wrapper flattens, are pieces of.
        addresses: of the memory of each: int64.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.wholes: Sequence[Tensor] = ()
        self.renew(tensors, addresses_of(tensors))

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Their shapes, strides and dtype never change; which memory they lie in may, between two calls of a backend."""
        return self.wholes

    def renew(self, wholes: Sequence[Tensor], addresses: array[int]) -> None:
        """Have other tensors, like those before, at these addresses."""
        self.wholes, self.addresses = wholes, addresses

    def release(self) -> None:
        """Let go of the tensors, whose memory may be wanted."""
        self.wholes = ()

    @property
    def dtype(self) -> torch.dtype:
        return self.wholes[0].dtype


def addresses_of(tensors: Iterable[Tensor]) -> array[int]:
    return array("q", list(map(Tensor.data_ptr, tensors)))  # a third faster than without the list


@dataclass(kw_only=True, eq=False)
class Operands:
    """Parameters of one process that a call of a backend steps, all stored alike, column by column.

    A backend may keep, as long as the object lives, what it derives from shapes, strides, dtypes and segments.
    """

    segments: Sequence[Segment]  # which elements of which tensor each parameter's are, in row-major order
    format: Format  # how the parameters are stored
    param: Column  # written by update
    extra: tuple[Column, ...]  # the further arrays of the format; written by update
    grad: Column  # in the plain format of its dtype; read-only
    state_formats: tuple[Format, ...]  # how each of Algorithm.state is stored
    state: tuple[Column, ...]  # the arrays of the first of them, of the second, ...; written by update

    @classmethod
    def whole(cls, params: Sequence[Tensor], grads: Sequence[Tensor], state: Sequence[Sequence[Tensor]]) -> Operands:
        """Whole tensors in the plain format of their dtype, the same for all."""
        columns = tuple(map(Column, state))
        return cls(
            segments=[Segment.whole("param", param.shape) for param in params],
            format=format_of(params[0].dtype),
            param=Column(params),
            extra=(),
            grad=Column(grads),
            state_formats=tuple(format_of(column.dtype) for column in columns),
            state=columns,
        )

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def grad_format(self) -> Format:
        return format_of(self.grad.dtype)

    @property
    def formats(self) -> tuple[Format, ...]:
        """Of the parameters and of each of their moments: what an update stores."""
        return (self.format, *self.state_formats)

    @property
    def written(self) -> tuple[Column, ...]:
        """The arrays of each of `formats`."""
        return (self.param, *self.extra, *self.state)

    @property
    def device(self) -> torch.device:
        return self.param.wholes[0].device


class Tabulate(Protocol):
    """Computes coefficients of operands in one launch."""

    def __call__(
        self,
        operands: Operands,
        formulas: Sequence[Formula],  # of inputs `step`, the next; those of `Sums`; and `lr`; with as many results each
        formula_of: Tensor | None,  # int64 (operands,), which of the formulas is each operand's; None if there is one
        steps: Tensor,  # fp32 (operands,), taken so far
        sums: Sums | None,
        lr: Tensor | None,  # float64 (formulas,)
    ) -> Tensor:
        """The results, rounded once: fp32 (operands, results)."""
        ...


class Judge(Protocol):
    """See `consensus.judge`."""

    def __call__(self, sums: Tensor, *, skips: bool) -> Verdict: ...


class Backend(Protocol):
    """What the engine needs of a backend. Nothing here communicates, and nothing waits for the device."""

    name: str

    @property
    def tabulate(self) -> Tabulate | None:
        """Computes coefficients on a device that the host must not wait for; None: they are computed there as tensors."""
        ...

    @property
    def judge(self) -> Judge:
        """`consensus.judge`, or the same in one launch."""
        ...

    def supports(self, device: torch.device, dtypes: frozenset[torch.dtype]) -> str | None:
        """None, or why this backend does not run on this device with these dtypes of parameters, gradients and state."""
        ...

    def prepare(self, algorithm: Algorithm, operands: Operands) -> None:
        """Do now what may fail and need not wait for the values: an update that fails on one rank alone would part it from the others."""
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
    """The first of the named backends that supports the device and the dtypes, and why those before it do not.

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
