"""A GPU that is not there, for which Triton compiles what would be launched on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget

from sharded_optim.backends import triton as backend
from sharded_optim.backends.triton import formulas as triton_formulas
from sharded_optim.backends.triton import verdict as triton_verdict

__all__ = ["TARGET", "launched"]

TARGET = GPUTarget("cuda", 90, 32)
KERNELS = (backend._update_kernel, backend._observe_kernel, triton_formulas._formula_kernel, triton_verdict._verdict_kernel)


class Driver:
    """As far as a launch asks for it before it launches."""

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: TARGET)


@contextmanager
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is launched in here is compiled instead. A launch derives types and options from the arguments."""
    found: list[Any] = []
    original = triton.runtime.JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(original(self, *arguments, grid=grid, warmup=True, **options))

    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.JITFunction, "run", run)
        patch.setattr(triton.runtime.driver, "_active", Driver())
        for kernels in KERNELS:
            kernels.cache_clear()
        try:
            yield found
        finally:
            for kernels in KERNELS:
                kernels.cache_clear()  # a driver that is there must not be given what was compiled here
