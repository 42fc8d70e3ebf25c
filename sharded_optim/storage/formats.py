"""Storage formats of logically-fp32 values: parameters and moments.

Algorithms compute on fp32 values and never see a storage: a backend loads through the format, calls the algorithm, and stores the whole
new value through the format. So every algorithm has every storage, with weight decay inside it.

    fp32, bf16, fp16               rounded to nearest, ties to even (IEEE 754 roundTiesToEven)
    bf16_kahan, fp16_kahan         with a second array for what rounding lost (Kahan 1965): value = param + kahan_comp
    bf16_stochastic, ...           rounded up or down at random, so that the expected value is the value
    bf16_kahan_stochastic, ...     with a second array that is rounded so

To add one, write its `load` and `store`, and give `FORMATS` an entry. Every backend compiles the two from the same source, under the rules
of an algorithm's `update` (see `formulas/__init__.py`). A moment's format is chosen by its name (`state_dtype="bf16_kahan"`), a
parameter's by its dtype and by what the param group's options mean in `param_format`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sharded_optim.formulas import operations as xp

__all__ = [
    "FORMATS",
    "KAHAN_COMP",
    "Array",
    "Format",
    "chosen_format",
    "extra_arrays",
    "format_beside",
    "format_of",
    "is_stored",
    "param_format",
]

KAHAN_COMP = "kahan_comp"
MAIN = ""


class Array(NamedTuple):
    """One array of a format."""

    name: str  # MAIN of the first: the parameter itself, or the moment's own entry in the optimizer's state
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class Format:
    """A way to store fp32 values, in one or several arrays of equal shape.

    Elements of arrays of 16 bits are read and made by operations such as `xp.from_bf16` and `xp.to_bf16`. Those of any other array are
    numbers; an array of integers takes whole ones.

    Zeros in all arrays are the value 0, with which moments begin. Zeros in the further arrays of a parameter leave the value of the first:
    so they begin, and so they are set when others have written the parameter. Formats with the same arrays load alike.
    """

    name: str
    arrays: tuple[Array, ...]
    load: Callable[..., Any]  # (*stored), an element of each array -> the value
    store: Callable[[Any, Any], tuple[Any, ...]]  # (value, uniform) -> an element of each array
    is_random: bool = False  # whether `store` uses `uniform`, a random number in [0, 1)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first array."""
        return self.arrays[0].dtype

    @property
    def extra(self) -> tuple[Array, ...]:
        """The arrays beside the first: a parameter's state has them under their names."""
        return self.arrays[1:]

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return sum(array.dtype.itemsize for array in self.arrays)

    def entries(self, moment: str) -> dict[str, torch.dtype]:
        """Keys of a moment's arrays in a parameter's state, with their dtypes."""
        return {f"{moment}.{array.name}" if array.name else moment: array.dtype for array in self.arrays}


# ----------------------------------------------------------------------------------------------------------------- load and store


def load_fp32(stored):
    return stored


def store_fp32(value, uniform):
    return (value,)


def load_bf16(stored):
    return xp.from_bf16(stored)


def store_bf16(value, uniform):
    return (xp.to_bf16(value),)


def store_bf16_stochastic(value, uniform):
    return (xp.to_bf16(xp.stochastic_bf16(value, uniform)),)


def load_bf16_kahan(stored, compensation):
    return xp.from_bf16(stored) + xp.from_bf16(compensation)


def store_bf16_kahan(value, uniform):
    stored = xp.to_bf16(value)
    return stored, xp.to_bf16(value - xp.from_bf16(stored))


def store_bf16_kahan_stochastic(value, uniform):
    stored = xp.to_bf16(value)
    return stored, xp.to_bf16(xp.stochastic_bf16(value - xp.from_bf16(stored), uniform))


def load_fp16(stored):
    return xp.from_fp16(stored)


def store_fp16(value, uniform):
    return (xp.to_fp16(value),)


def store_fp16_stochastic(value, uniform):
    return (xp.to_fp16(xp.stochastic_fp16(value, uniform)),)


def load_fp16_kahan(stored, compensation):
    return xp.from_fp16(stored) + xp.from_fp16(compensation)


def store_fp16_kahan(value, uniform):
    stored = xp.to_fp16(value)
    return stored, xp.to_fp16(value - xp.from_fp16(stored))


def store_fp16_kahan_stochastic(value, uniform):
    stored = xp.to_fp16(value)
    return stored, xp.to_fp16(xp.stochastic_fp16(value - xp.from_fp16(stored), uniform))


FP32 = (Array(MAIN, torch.float32),)
BF16 = (Array(MAIN, torch.bfloat16),)
BF16_KAHAN = (*BF16, Array(KAHAN_COMP, torch.bfloat16))
FP16 = (Array(MAIN, torch.float16),)
FP16_KAHAN = (*FP16, Array(KAHAN_COMP, torch.float16))

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format(name="fp32", arrays=FP32, load=load_fp32, store=store_fp32),
        Format(name="bf16", arrays=BF16, load=load_bf16, store=store_bf16),
        Format(name="bf16_kahan", arrays=BF16_KAHAN, load=load_bf16_kahan, store=store_bf16_kahan),
        Format(name="bf16_stochastic", arrays=BF16, load=load_bf16, store=store_bf16_stochastic, is_random=True),
        Format(name="bf16_kahan_stochastic", arrays=BF16_KAHAN, load=load_bf16_kahan, store=store_bf16_kahan_stochastic, is_random=True),
        Format(name="fp16", arrays=FP16, load=load_fp16, store=store_fp16),
        Format(name="fp16_kahan", arrays=FP16_KAHAN, load=load_fp16_kahan, store=store_fp16_kahan),
        Format(name="fp16_stochastic", arrays=FP16, load=load_fp16, store=store_fp16_stochastic, is_random=True),
        Format(name="fp16_kahan_stochastic", arrays=FP16_KAHAN, load=load_fp16_kahan, store=store_fp16_kahan_stochastic, is_random=True),
    )
}

# ---------------------------------------------------------------------------------------------------------------------- choosing

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def format_of(dtype: torch.dtype) -> Format:
    """The format that stores values in one array of `dtype`, rounded to nearest.

    Raises:
        ValueError: values of this dtype cannot be computed in fp32 and stored back.
    """
    if dtype not in _NAMES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _NAMES)
        raise ValueError(f"dtype {dtype} is not supported (the step computes in float32 and stores {known}); convert with .to(...)")
    return FORMATS[_NAMES[dtype]]


def is_stored(dtype: torch.dtype) -> bool:
    """Return whether any format has an array of this dtype."""
    return dtype in _NAMES or any(array.dtype == dtype for fmt in FORMATS.values() for array in fmt.arrays)


def chosen_format(choice: torch.dtype | str) -> Format:
    """Return the format of this name, or the plain format of this dtype.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(choice, str):
        return format_of(choice)
    if choice not in FORMATS:
        raise ValueError(f"there is no storage format {choice!r}; there are {', '.join(FORMATS)}")
    return FORMATS[choice]


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


def format_beside(dtype: torch.dtype, entries: Collection[str]) -> Format:
    """Return the format of a parameter, inferred from its dtype and from the entries of its state."""
    fitting = [fmt for fmt in FORMATS.values() if fmt.dtype == dtype and all(array.name in entries for array in fmt.extra)]
    return max(fitting, key=lambda fmt: len(fmt.extra))


def extra_arrays() -> set[str]:
    """Names of the arrays that any format stores beside a parameter, in the optimizer's state."""
    return {array.name for fmt in FORMATS.values() for array in fmt.extra}
