"""Compile text, and functions that other backends compile too, by Triton."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import triton
import triton.language as tl
from triton import knobs

from sharded_optim.backends.rebinding import rebound
from sharded_optim.backends.triton import scalars as triton_scalars

__all__ = ["compiled", "compiled_scalars", "executed", "interpreted"]

# ------------------------------------------------------------------------------------------------------------------------ devices


def interpreted() -> bool:
    """Return whether Triton runs kernels in Python, on the CPU, to test them (TRITON_INTERPRET=1)."""
    return knobs.runtime.interpret


# ----------------------------------------------------------------------------------------------------------------------- sources


def executed(name: str, source: str, names: dict[str, Any]) -> Any:
    """Execute text and return the function that it defines. Triton reads the text again, from the cache that tracebacks use."""
    path = f"<sharded_optim {name}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    namespace = {"__name__": __name__, **names}
    exec(compile(source, path, "exec"), namespace)
    return namespace[name]


@cache
def compiled(function: Callable[..., Any], *, interpreted: bool) -> Any:
    names: dict[str, Any] = {"tl": tl}  # Triton's interpreter insists on it
    if "xp" in function.__globals__:
        names["xp"] = ModuleType("xp")  # Triton looks up names in nothing but modules
        vars(names["xp"]).update(compiled_scalars(interpreted=interpreted))
    assert interpreted == knobs.runtime.interpret, "triton.jit looks at this too"
    return rebound(function, names, triton.jit, (lambda number: number) if interpreted else tl.constexpr)


def compiled_scalars(*, interpreted: bool) -> dict[str, Any]:
    functions = {name: value for name, value in vars(triton_scalars).items() if isinstance(value, FunctionType)}
    if interpreted:
        functions = {name: functions.get(f"{name}_interpreted", value) for name, value in functions.items()}
    return {name: compiled(function, interpreted=interpreted) for name, function in functions.items()}
