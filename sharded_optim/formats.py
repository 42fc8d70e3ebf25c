"""How a logically-fp32 value (a parameter or a moment) is stored.

Algorithms compute on fp32 values and never see a storage: a backend loads through the format, calls the algorithm, and stores the whole
new value through the format. So every algorithm has every storage, with weight decay inside it. A new storage is one new entry here, and
the option that chooses it in `param_format`. Backends that compile know the formats of this file; others are stepped by the eager backend.

    fp32, bf16, fp16               rounded to nearest, ties to even (IEEE 754 roundTiesToEven)
    bf16_kahan, fp16_kahan         with a second array for what rounding lost (Kahan 1965): value = param + kahan_comp
    bf16_stochastic, ...           rounded up or down at random, so that the expected value is the value
    bf16_kahan_stochastic, ...     with a second array that is rounded so
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

__all__ = ["FORMATS", "KAHAN_COMP", "Format", "compiled_format", "format_of", "param_format"]

KAHAN_COMP = "kahan_comp"
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, kw_only=True)
class Format:
    """One storage of fp32 values.

    `load(*arrays)` gives the fp32 value of what is stored; `store(value, uniform)` gives what is to be stored of an fp32 value: the main
    array, then the extra ones. `uniform` has a random number in [0, 1) for each element where `is_random`, else it is None.
    """

    name: str
    dtype: torch.dtype  # of every array
    extra: tuple[str, ...] = ()  # names of the arrays besides the main one, as they are called in an optimizer's state
    is_random: bool = False
    load: Callable[..., Tensor]
    store: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]


def _load(stored: Tensor) -> Tensor:
    return stored.to(torch.float32)


def _load_sum(stored: Tensor, compensation: Tensor) -> Tensor:
    return stored.to(torch.float32) + compensation.to(torch.float32)


def _store_nearest(value: Tensor, uniform: Tensor | None, *, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (value.to(dtype),)


def _store_sum(value: Tensor, uniform: Tensor | None, *, dtype: torch.dtype) -> tuple[Tensor, ...]:
    stored = value.to(dtype)
    return stored, (value - stored.to(torch.float32)).to(dtype)


def _store_stochastic_sum(value: Tensor, uniform: Tensor | None, *, dtype: torch.dtype) -> tuple[Tensor, ...]:
    stored = value.to(dtype)
    return stored, *_store_stochastic(value - stored.to(torch.float32), uniform, dtype=dtype)


def _store_stochastic(value: Tensor, uniform: Tensor | None, *, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Round up in magnitude with a probability equal to the distance from the lower neighbour, in units of the neighbours' distance."""
    assert uniform is not None, "the format says that it is random"
    limits = torch.finfo(dtype)
    magnitude = value.abs()
    power = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32)  # the largest power of two that is not above the magnitude
    spacing = (power * limits.eps).clamp(min=limits.smallest_normal * limits.eps)  # a power of two: nothing below rounds
    scaled = magnitude / spacing
    below = scaled.floor()
    rounded = (below + (uniform < scaled - below)) * spacing
    return (torch.where(value.isfinite(), torch.copysign(rounded, value), value).to(dtype),)


def _formats() -> list[Format]:
    formats = []
    for dtype, name in _NAMES.items():
        nearest = partial(_store_nearest, dtype=dtype)
        formats.append(Format(name=name, dtype=dtype, load=_load, store=nearest))
        if dtype != torch.float32:
            kahan, stochastic = partial(_store_sum, dtype=dtype), partial(_store_stochastic, dtype=dtype)
            both = partial(_store_stochastic_sum, dtype=dtype)
            formats += [
                Format(name=f"{name}_kahan", dtype=dtype, extra=(KAHAN_COMP,), load=_load_sum, store=kahan),
                Format(name=f"{name}_stochastic", dtype=dtype, is_random=True, load=_load, store=stochastic),
                Format(name=f"{name}_kahan_stochastic", dtype=dtype, extra=(KAHAN_COMP,), is_random=True, load=_load_sum, store=both),
            ]
    return formats


_OWN = tuple(_formats())
FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in _OWN}


def compiled_format(fmt: Format) -> Format | None:
    """The format of this file that stores the same bits, whatever `fmt` and its arrays are called; None if there is none.

    Backends that compile know what these do with `dtype`, `extra` and `is_random`, but not what is in other functions `load` and `store`.
    """
    return next((own for own in _OWN if own.load is fmt.load and own.store is fmt.store and len(own.extra) == len(fmt.extra)), None)


def format_of(dtype: torch.dtype) -> Format:
    """The format that stores values in one array of `dtype`, rounded to nearest.

    Raises:
        ValueError: values of this dtype cannot be computed in fp32 and stored back.
    """
    if dtype not in _NAMES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _NAMES)
        raise ValueError(f"dtype {dtype} is not supported (the step computes in float32 and stores {known}); convert with .to(...)")
    return FORMATS[_NAMES[dtype]]


def param_format(dtype: torch.dtype, *, kahan_sum: bool | None, stochastic_rounding: bool) -> Format:
    """The format of a parameter; the options matter in low precision only.

    Args:
        dtype: of the parameter.
        kahan_sum: None is what `stochastic_rounding` is not.
        stochastic_rounding: of the parameter, or with `kahan_sum=True` of its compensation.
    """
    plain = format_of(dtype)
    if dtype == torch.float32:
        return plain
    kahan = not stochastic_rounding if kahan_sum is None else kahan_sum
    return FORMATS[plain.name + ("_kahan" if kahan else "") + ("_stochastic" if stochastic_rounding else "")]
