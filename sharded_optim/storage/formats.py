"""All storage formats by name, and the choice of the format of a parameter or a moment.

To add formats, write a file like `float_formats.py` and list them in `FORMATS`. A moment's format is chosen by name or dtype
(`state_dtype="bf16_kahan"`), a parameter's by its dtype and the param group's options (`param_format`).
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
    """Return the format that stores values in one array of `dtype`, rounded to nearest.

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
    """Return the format of a name, or the one-array format of a dtype.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(choice, str):
        return format_of(choice)
    if choice not in FORMATS:
        raise ValueError(f"there is no storage format {choice!r}; there are {', '.join(FORMATS)}")
    return FORMATS[choice]


def state_formats() -> tuple[str, ...]:
    """Return the names of the formats for moments: all but those in float16, where a second moment overflows or underflows."""
    return tuple(name for name, fmt in FORMATS.items() if fmt.dtype != torch.float16)


def param_format(dtype: torch.dtype, *, kahan_sum: bool | None, stochastic_rounding: bool) -> Format:
    """Return the format of a parameter. The options matter only in low precision.

    Args:
        dtype: the parameter's dtype.
        kahan_sum: whether to store a compensation; None means True unless `stochastic_rounding`.
        stochastic_rounding: whether to round the parameter at random; with `kahan_sum=True`, its compensation instead.
    """
    plain = format_of(dtype)
    if dtype == torch.float32:
        return plain
    kahan = not stochastic_rounding if kahan_sum is None else kahan_sum
    return FORMATS[plain.name + ("_kahan" if kahan else "") + ("_stochastic" if stochastic_rounding else "")]


def format_beside(dtype: torch.dtype, entries: Collection[str]) -> Format:
    """Return the format of a parameter with this dtype whose state has these entries, of several the one with the most arrays."""
    fitting = [fmt for fmt in FORMATS.values() if fmt.dtype == dtype and all(array.name in entries for array in fmt.extra)]
    return max(fitting, key=lambda fmt: len(fmt.extra))


def extra_arrays() -> set[str]:
    """Return the names of all arrays that formats store beside a parameter, in the optimizer's state."""
    return {array.name for fmt in FORMATS.values() for array in fmt.extra}
