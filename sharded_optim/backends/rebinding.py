"""Compile a function of an algorithm or a storage format with another module as `xp`, so that all backends share one source of math.

Such functions use `+ - *`, numbers, the operations of a module that they call `xp`, and each other. A copy of the function with `xp` in its
globals replaced by a module with the same operations computes with torch tensors, or is compiled for a CPU or a GPU. Used by backends.
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
    """Compile a copy of a function with some of its globals replaced. Functions that it calls are compiled in the same way.

    Args:
        names: replacements of globals, keyed by name.
        compiler: compiles a Python function.
        number: converts a number among the globals to the form that the compiler takes.
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
