"""Optimizer state: per parameter, the algorithm's moments and a step counter, allocated when first asked for.

Used by the engine. The private name of torch that is relied on here is tried with torch 2.13 and guarded by a test.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["STEP", "State", "called_to_allocate"]

STEP = "step"


class State(defaultdict[Tensor, dict[str, Any]]):
    """`optimizer.state`: a missing parameter is given zeros.

    A plain dict would be silently wrong: torch.distributed.checkpoint asks `optimizer.state[param]` which state to load, and loads
    nothing where it finds nothing, as in an optimizer that has gradients but has not stepped.
    """

    def __init__(self, names: tuple[str, ...], dtype: torch.dtype, content: Mapping[Tensor, dict[str, Any]]) -> None:
        super().__init__(dict, content)
        self._names = names
        self._dtype = dtype

    def __missing__(self, param: Tensor) -> dict[str, Any]:
        self[param] = {
            STEP: torch.zeros((), dtype=torch.float32, device=param.device),
            **{name: torch.zeros_like(param, dtype=self._dtype, memory_format=torch.preserve_format) for name in self._names},
        }
        return self[param]

    def copy(self) -> State:
        return State(self._names, self._dtype, self)

    def __copy__(self) -> State:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._names, self._dtype, dict(self))


def called_to_allocate() -> bool:
    """Whether torch.distributed.checkpoint is stepping with zero gradients and lr 0, only to make the optimizer allocate its state.

    That step must not count (pytorch#164929): bias correction would be one step off in everything that follows. The gradients do not tell
    it from a real first step, on a rank whose shard happens to have only zeros; the caller does.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state" and frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return True
        frame = frame.f_back
    return False
