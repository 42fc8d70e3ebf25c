"""The names of dtypes in manifests and shard files, as safetensors defines them."""

from __future__ import annotations

import torch

from sharded_optim.checkpoint.errors import MismatchError

__all__ = ["dtype_named", "name_of"]

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def name_of(dtype: torch.dtype, what: str) -> str:
    """Return the name that safetensors has for a dtype.

    Raises:
        ValueError: safetensors has no such dtype; the message names `what`, the tensor.
    """
    if dtype not in NAMES:
        raise ValueError(f"{what} is of {dtype}, which checkpoints do not hold; they hold {', '.join(map(str, NAMES))}")
    return NAMES[dtype]


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype with a name of safetensors.

    Raises:
        MismatchError: this version of the library has no such dtype; a later one may have it.
        ValueError: the name is not a string.
    """
    if not isinstance(name, str):
        raise ValueError(f"{name!r} is not the name of a dtype")
    if name not in DTYPES:
        raise MismatchError(f"this version of the library has no dtype {name!r}, only {', '.join(DTYPES)}; upgrade sharded-optim")
    return DTYPES[name]
