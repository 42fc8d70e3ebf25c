"""Python values as JSON, with marks for types that JSON lacks. Reading them cannot run code.

True, 3, 0.1, "text", None, [..], {"key": ..}     as they are; floats keep every bit
inf, nan, (1, 2), b"..", {3: ..}, a tensor        {"$float": "inf"}, {"$tuple": [1, 2]}, {"$bytes": ..}, {"$items": ..}, {"$tensor": ..}
OrderedDict, Counter, defaultdict(list)           {"$OrderedDict": [[key, value], ..]}, {"$Counter": ..}, {"$defaultdict": ["list", ..]}
what a module's state_dict() returns              {"$state_dict": [[[key, value], ..], its _metadata]}
a Parameter                                       {"$parameter": {fields of a tensor, "requires_grad": true}}
NumPy's scalars and arrays                        {"$scalar": ["<f4", ".."]}, {"$array": ["<u4", [624], ".."]}

Types are restored exactly or refused: a subclass of a list, a dict or a number is not saved as its base class. The requires_grad
of a tensor that is no Parameter is not saved. Used for `extra`, hyperparameters, step counters and a wrapper's state in manifests.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharded_optim.checkpoint.dtypes import dtype_named, name_of
from sharded_optim.checkpoint.errors import MismatchError

__all__ = ["LATER_MARKS", "decode", "encode", "marks_in"]

MARK = "$"
MAX_TENSOR_BYTES = 2**20
MAX_INT_BITS = 10_000  # 3,011 digits; Python parses 4,300
MAX_DEPTH = 100  # nested containers, so that reading a value does not exhaust the stack
# Marks that the first readers of version 1.0 do not know; a manifest lists those it uses in "requires".
LATER_MARKS = frozenset({"$OrderedDict", "$Counter", "$defaultdict", "$state_dict", "$parameter", "$array", "$scalar"})
FACTORIES: dict[str, Callable[[], Any] | None] = {
    "None": None,
    **{factory.__name__: factory for factory in (bool, int, float, str, bytes, list, tuple, dict)},
}
ARRAY_DTYPES = {f"{order}{code}" for order in "<>|" for code in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")}


def encode(value: Any, where: str, depth: int = 0) -> Any:
    """Convert a value to JSON's types.

    Args:
        where: the name of the value in error messages, such as extra['key'].
        depth: the number of containers around the value.

    Raises:
        ValueError: the value, or a value inside of it, has an unsupported type; the message names it.
    """
    kind = type(value)
    if value is None or kind in (bool, str) or (kind is int and value.bit_length() <= MAX_INT_BITS):
        return value
    if kind is int:
        raise _unsupported(f"{where} is an int of {value.bit_length()} bits")
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is bytes:
        return {"$bytes": _base64(value)}
    if isinstance(value, Tensor):
        content = _encode_tensor(value, where)
        if kind is not torch.nn.Parameter:
            return {"$tensor": content}
        return {"$parameter": content | {"requires_grad": value.requires_grad}}
    if depth > MAX_DEPTH:
        raise ValueError(f"{where[:100]}... is nested more than {MAX_DEPTH} deep, which a checkpoint cannot hold, or contains itself")
    if kind in (list, tuple):
        items = [encode(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if kind is dict and all(type(key) is str and not key.startswith(MARK) for key in value):
        return {key: encode(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if kind in (dict, OrderedDict, Counter, defaultdict):
        return _encode_mapping(value, where, depth)
    if kind is np.ndarray or issubclass(kind, np.generic):
        return _encode_array(value, where)
    raise _unsupported(f"{where} is a {kind.__module__}.{kind.__qualname__}")


def _encode_mapping(value: Any, where: str, depth: int) -> Any:
    """Encode a dict with keys other than plain strings, or an instance of one of the classes of `collections`."""
    kind = type(value)
    items = [[encode(key, f"a key of {where}", depth + 1), encode(item, f"{where}[{key!r}]", depth + 1)] for key, item in value.items()]
    attributes = getattr(value, "__dict__", {})
    if kind is OrderedDict and attributes.keys() == {"_metadata"}:
        return {"$state_dict": [items, encode(attributes["_metadata"], f"{where}._metadata", depth + 1)]}
    if attributes:
        raise _unsupported(f"{where} is a {kind.__qualname__} with the attribute {next(iter(attributes))!r}")
    if kind is defaultdict:
        return {"$defaultdict": [_factory_name(value.default_factory, where), items]}
    return {"$items" if kind is dict else f"{MARK}{kind.__name__}": items}


def _unsupported(what: str) -> ValueError:
    return ValueError(
        f"{what}, which a checkpoint cannot hold; it holds None, bool, int up to {MAX_INT_BITS} bits, float, str, bytes, tensors and "
        f"arrays up to 1 MiB, and lists, tuples, dicts, OrderedDicts, Counters and defaultdicts of these (for objects, what "
        f"their state_dict() returns)"
    )


def _factory_name(factory: Any, where: str) -> str:
    for name, known in FACTORIES.items():
        if factory is known:
            return name
    raise _unsupported(f"{where} is a defaultdict of {factory!r}")


def decode(value: Any) -> Any:
    """Restore a value from the result of `encode`. Tensors are on the CPU.

    Raises:
        MismatchError: this version of the library cannot read the value, which may be valid.
        ValueError: the content of a mark is invalid.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    mark = next(iter(value), "")
    if len(value) != 1 or not mark.startswith(MARK):
        return {key: decode(item) for key, item in value.items()}
    if mark not in DECODERS:
        raise _unknown(f"marked {mark!r}")
    return DECODERS[mark](value[mark])


def _unknown(how: str) -> MismatchError:
    return MismatchError(f"a value is {how}, which this version of the library does not know; upgrade sharded-optim")


def marks_in(encoded: Any) -> set[str]:
    """Collect the marks in a value that `encode` returned."""
    marks: set[str] = set()
    pending = [encoded]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            marks.update(key for key in value if key.startswith(MARK))
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return marks


def _decode_items(content: Iterable[Any]) -> dict[Any, Any]:
    pairs = [(decode(key), decode(item)) for key, item in content]
    items = dict(pairs)
    if len(items) < len(pairs):
        raise ValueError("a value is marked as a dict, and has a key twice")
    return items


def _decode_defaultdict(content: Any) -> Any:
    factory, items = content
    if factory not in FACTORIES:
        raise _unknown(f"marked as a defaultdict of {factory!r}")
    return defaultdict(FACTORIES[factory], _decode_items(items))


def _decode_float(content: Any) -> float:
    if content not in ("inf", "-inf", "nan"):
        raise ValueError(f"a value is marked as a float that JSON lacks, and is {content!r}")
    return float(content)


def _encode_array(value: Any, where: str) -> Any:
    """Encode a NumPy scalar or array as JSON; `where` names it in errors."""
    dtype = value.dtype.str
    if dtype not in ARRAY_DTYPES or value.nbytes > MAX_TENSOR_BYTES:
        raise _unsupported(f"{where} is a {type(value).__module__}.{type(value).__qualname__} of {value.dtype} with {value.nbytes} bytes")
    data = _base64(value.tobytes())
    return {"$array": [dtype, list(value.shape), data]} if type(value) is np.ndarray else {"$scalar": [dtype, data]}


def _decode_array(content: Any) -> Any:
    dtype, shape, data = content
    if dtype not in ARRAY_DTYPES:
        raise _unknown(f"marked as an array of {dtype!r}")
    return np.frombuffer(bytearray(_bytes(data)), dtype=dtype).reshape(_shape(shape))


def _shape(value: Any) -> list[int]:
    if not all(type(size) is int and size >= 0 for size in value):
        raise ValueError(f"a value is marked as a tensor or an array, and has shape {value!r}")
    return value


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(content: Any) -> bytes:
    return base64.b64decode(content, validate=True)


def _encode_tensor(value: Tensor, where: str) -> dict[str, Any]:
    dtype = name_of(value.dtype, where)
    if value.layout != torch.strided or value.is_meta or value.is_nested:
        what = "nested" if value.is_nested else "on the device meta" if value.is_meta else f"of {value.layout}"
        raise _unsupported(f"{where} is a tensor {what}")
    if type(value) not in (Tensor, torch.nn.Parameter) or value.nbytes > MAX_TENSOR_BYTES:
        raise ValueError(
            f"{where} is a {type(value).__name__} of {value.nbytes} bytes; besides parameters, buffers and optimizer state a checkpoint "
            f"holds ordinary tensors up to {MAX_TENSOR_BYTES} bytes: make it a buffer of the model"
        )
    content = value.detach().cpu().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return {"dtype": dtype, "shape": list(value.shape), "data": _base64(bytes(content.tolist()))}


def _decode_tensor(content: Any) -> Tensor:
    data = bytearray(_bytes(content["data"]))
    dtype = dtype_named(content["dtype"])
    flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype, device="cpu")
    return flat.clone().reshape(_shape(content["shape"]))


def _decode_parameter(content: Any) -> Tensor:
    if type(content["requires_grad"]) is not bool:
        raise ValueError(f"requires_grad of a parameter is {content['requires_grad']!r}")
    return torch.nn.Parameter(_decode_tensor(content), requires_grad=content["requires_grad"])


def _decode_state_dict(content: Any) -> Any:
    items, metadata = content
    state_dict: Any = OrderedDict(_decode_items(items))
    state_dict._metadata = decode(metadata)
    return state_dict


DECODERS: dict[str, Callable[[Any], Any]] = {
    "$float": _decode_float,
    "$tuple": lambda content: tuple(decode(content)),
    "$items": _decode_items,
    "$OrderedDict": lambda content: OrderedDict(_decode_items(content)),
    "$Counter": lambda content: Counter(_decode_items(content)),
    "$defaultdict": _decode_defaultdict,
    "$state_dict": _decode_state_dict,
    "$parameter": _decode_parameter,
    "$bytes": _bytes,
    "$tensor": _decode_tensor,
    "$array": _decode_array,
    "$scalar": lambda content: _decode_array([content[0], [], content[1]])[()],
}
