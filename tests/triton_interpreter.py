"""Triton's interpreter runs kernels in Python, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

__all__ = ["interpreted", "mend"]


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels that are made in here run in it."""
    mend()
    knobs = import_module("triton").knobs
    with knobs.runtime.scope(), np.errstate(all="ignore"):
        knobs.runtime.interpret = True
        yield


@cache
def mend() -> None:
    """Triton 3.6 makes an integer of an array of one element, where a loop's bound is a tensor, which NumPy >= 2.4 refuses."""
    if not import_module("triton").__version__.startswith("3.6."):
        return
    interpreter = import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
