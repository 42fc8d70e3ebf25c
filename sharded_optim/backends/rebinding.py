"""Compile a function of an algorithm or a storage format with another meaning of `xp`: one source of math for all backends.

Such functions use `+ - *`, numbers, the operations of a module that they call `xp`, and each other. In a copy of such a function's globals
`xp` can be another module of the same operations, so that the same code computes with torch's tensors, or is compiled for a CPU or a GPU.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

__all__ = ["argument_count", "rebound"]


def rebound(
    function: Callable[..., Any],
    names: Mapping[str, Any],
    compiler: Callable[[FunctionType], Any],
    number: Callable[[float], Any],
) -> Any:
    """Compile a function with other values for these names in its globals.

    Functions that it calls are compiled too, and `number` says what a compiler takes for a number among the globals.
    """
    own: dict[str, Any] = {**function.__globals__, **names}
    for name in {each.argval for each in dis.get_instructions(function) if each.opname == "LOAD_GLOBAL"}:
        value = own.get(name)
        if isinstance(value, FunctionType):
            own[name] = rebound(value, names, compiler, number)
        elif isinstance(value, int | float):
            own[name] = number(value)
    return compiler(FunctionType(function.__code__, own, function.__name__))


def argument_count(function: Callable[..., Any]) -> int:
    return function.__code__.co_argcount
