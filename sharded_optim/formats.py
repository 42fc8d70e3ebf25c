"""How a logically-fp32 value (a parameter or a moment) is stored.

Algorithms compute on fp32 values and never see a storage dtype: a backend loads through the format, calls the algorithm, and stores the
whole new value through the format. A new storage is one new entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FORMATS", "Format", "format_of"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One storage of fp32 values.

    `load` gives the fp32 value of what is stored, exactly; `store` rounds an fp32 value to what can be stored.
    """

    name: str
    dtype: torch.dtype
    load: Callable[[Tensor], Tensor]
    store: Callable[[Tensor], Tensor]


def _nearest(name: str, dtype: torch.dtype) -> Format:
    """Plain storage in `dtype`, rounded to nearest, ties to even (IEEE 754 roundTiesToEven)."""
    return Format(name=name, dtype=dtype, load=lambda stored: stored.to(torch.float32), store=lambda value: value.to(dtype))


FORMATS: dict[torch.dtype, Format] = {
    fmt.dtype: fmt for fmt in (_nearest("fp32", torch.float32), _nearest("bf16", torch.bfloat16), _nearest("fp16", torch.float16))
}


def format_of(dtype: torch.dtype) -> Format:
    """The format that stores values in `dtype`.

    Raises:
        ValueError: values of this dtype cannot be computed in fp32 and stored back.
    """
    if dtype not in FORMATS:
        known = ", ".join(str(known).removeprefix("torch.") for known in FORMATS)
        raise ValueError(f"dtype {dtype} is not supported (the step computes in float32 and stores {known}); convert with .to(...)")
    return FORMATS[dtype]
