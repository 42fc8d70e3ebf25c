"""All storage formats by name, and which one a parameter or a moment has.

To add one, write a file like `float_formats.py` and list it in `FORMATS`. A moment's format is chosen by its name
(`state_dtype="bf16_kahan"`), a parameter's by its dtype and by what the param group's options mean in `param_format`.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from sharded_optim.storage.float_formats import FLOAT_FORMATS
from sharded_optim.storage.format import Format

__all__ = ["FORMATS", "chosen_format", "extra_arrays", "format_beside", "format_of", "is_stored", "param_format", "state_formats"]

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (*FLOAT_FORMATS,)}
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


def state_formats() -> tuple[str, ...]:
    """Names of the formats that moments may have: not those in float16, where a second moment overflows or vanishes."""
    return tuple(name for name, fmt in FORMATS.items() if fmt.dtype != torch.float16)


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
