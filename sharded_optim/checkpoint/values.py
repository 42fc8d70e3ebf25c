"""Values in a manifest: JSON, with what JSON has not told by a mark. Nothing that is read here can run code.

True, 3, 0.1, "text", None, [..], {"key": ..}     as they are; floats come back to the last bit
inf, nan, (1, 2), b"..", {3: ..}, a tensor        {"$float": "inf"}, {"$tuple": [1, 2]}, {"$bytes": ..}, {"$items": ..}, {"$tensor": ..}
"""

from __future__ import annotations

import base64
import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharded_optim.checkpoint.dtypes import dtype_named, name_of

__all__ = ["decode", "encode"]

MARK = "$"
LARGEST_TENSOR = 2**20  # bytes


def encode(value: Any, where: str) -> Any:
    """A value as JSON has it.

    Args:
        where: it stands, for error messages.

    Raises:
        ValueError: a value of another type; names it.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):  # NumPy's too
        value = float(value)
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, list):
        return [encode(each, f"{where}[{index}]") for index, each in enumerate(value)]
    if type(value) is tuple:
        return {"$tuple": [encode(each, f"{where}[{index}]") for index, each in enumerate(value)]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith(MARK) for key in value):
            return {key: encode(each, f"{where}[{key!r}]") for key, each in value.items()}
        return {"$items": [[encode(key, f"a key of {where}"), encode(each, f"{where}[{key!r}]")] for key, each in value.items()]}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, Tensor):
        return {"$tensor": _encode_tensor(value, where)}
    raise ValueError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold; it holds None, bool, int, "
        f"float, str, bytes, tensors up to 1 MiB, and lists, tuples and dicts of these (for objects, what their state_dict() returns)"
    )


def decode(value: Any) -> Any:
    """The value that `encode` was given. Tensors are on the CPU.

    Raises:
        ValueError: an unknown mark.
    """
    if isinstance(value, list):
        return [decode(each) for each in value]
    if not isinstance(value, dict):
        return value
    mark = next(iter(value), "")
    if len(value) != 1 or not mark.startswith(MARK):
        return {key: decode(each) for key, each in value.items()}
    if mark not in DECODERS:
        raise ValueError(f"a value is marked {mark!r}, which this version does not know")
    return DECODERS[mark](value[mark])


def _encode_tensor(value: Tensor, where: str) -> Any:
    if type(value) not in (Tensor, torch.nn.Parameter) or value.numel() * value.element_size() > LARGEST_TENSOR:
        raise ValueError(
            f"{where} is a {type(value).__name__} of {value.numel() * value.element_size()} bytes; beside parameters, buffers and "
            f"optimizer state a checkpoint holds ordinary tensors up to {LARGEST_TENSOR} bytes: make it a buffer of the model"
        )
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return {
        "dtype": name_of(value.dtype, where),
        "shape": list(value.shape),
        "data": base64.b64encode(bytes(content.tolist())).decode(),
    }


def _decode_tensor(content: Any) -> Tensor:
    data = bytearray(base64.b64decode(content["data"]))
    dtype = dtype_named(content["dtype"])
    flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)
    return flat.clone().reshape(content["shape"])


DECODERS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$tuple": lambda content: tuple(decode(content)),
    "$items": lambda content: {decode(key): decode(each) for key, each in content},
    "$bytes": base64.b64decode,
    "$tensor": _decode_tensor,
}
