"""Compile generated source text, and the functions that all backends share, with Triton. Used by the kernels of the Triton backend."""

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
    """Return whether Triton runs kernels in its interpreter on the CPU, for tests (TRITON_INTERPRET=1)."""
    return knobs.runtime.interpret


# ----------------------------------------------------------------------------------------------------------------------- sources


def executed(name: str, source: str, names: dict[str, Any]) -> Any:
    """Execute source text and return the function `name` that it defines.

    The text is also put into `linecache`, where Triton reads the source of the function.
    """
    path = f"<sharded_optim {name}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    namespace = {"__name__": __name__, **names}
    exec(compile(source, path, "exec"), namespace)
    return namespace[name]


@cache
def compiled(function: Callable[..., Any], *, interpreted: bool) -> Any:
    names: dict[str, Any] = {"tl": tl}  # Triton's interpreter requires this global
    if "xp" in function.__globals__:
        names["xp"] = ModuleType("xp")  # Triton resolves attributes only of modules
        vars(names["xp"]).update(compiled_scalars(interpreted=interpreted))
    assert interpreted == knobs.runtime.interpret, "triton.jit reads this knob too"
    return rebound(function, names, triton.jit, (lambda number: number) if interpreted else tl.constexpr)


def compiled_scalars(*, interpreted: bool) -> dict[str, Any]:
    functions = {name: value for name, value in vars(triton_scalars).items() if isinstance(value, FunctionType)}
    if interpreted:
        functions = {name: functions.get(f"{name}_interpreted", value) for name, value in functions.items()}
    return {name: compiled(function, interpreted=interpreted) for name, function in functions.items()}
