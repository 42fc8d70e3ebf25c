"""Optimizer state: per parameter, a step counter, the algorithm's moments and its format's further arrays, allocated when first asked for.

Used by the engine. The private names of torch and DeepSpeed that are relied on here are tried with torch 2.13 and guarded by tests.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sharded_optim import memory

__all__ = ["STEP", "State", "called_to_allocate", "new_state", "zeros"]

STEP = "step"


class State(defaultdict[Tensor, dict[str, Any]]):
    """`optimizer.state`: a missing parameter is given what `allocate(param)` returns.

    A plain dict would be silently wrong: torch.distributed.checkpoint asks `optimizer.state[param]` which state to load, and loads
    nothing where it finds nothing, as in an optimizer that has gradients but has not stepped.
    """

    def __init__(self, allocate: Callable[[Tensor], dict[str, Any]], content: Mapping[Tensor, dict[str, Any]]) -> None:
        super().__init__(dict, content)
        self._allocate = allocate

    def __missing__(self, param: Tensor) -> dict[str, Any]:
        self[param] = self._allocate(param)
        return self[param]

    def copy(self) -> State:
        return State(self._allocate, self)

    def __copy__(self) -> State:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        """A plain dict: the optimizer that is copied or unpickled makes a State of it again, with its own `allocate`."""
        return dict, (dict(self),)


def new_state(param: Tensor, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """Zeros like the parameter under each name of `dtypes`, and a step counter of 0."""
    return {STEP: torch.zeros((), dtype=torch.float32, device=param.device)} | {n: zeros(param, d) for n, d in dtypes.items()}


def zeros(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros that are shaped, strided and sharded like the parameter; on a CPU on large pages, see `memory.py`."""
    result = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    local = getattr(result, "_local_tensor", result)
    if local.device.type != "cpu" or type(local) is not Tensor:
        return result.zero_()
    local.data = memory.zeros(local.numel(), dtype).as_strided(local.shape, local.stride())
    return result


# Functions that step with zero gradients only to make the optimizer allocate its state: (module, name).
ALLOCATORS = {
    ("torch.distributed.checkpoint.state_dict", "_init_optim_state"),
    ("deepspeed.runtime.fp16.unfused_optimizer", "initialize_optimizer_states"),
}


def called_to_allocate() -> bool:
    """Whether a wrapper is stepping only to make the optimizer allocate its state.

    That step must not count (pytorch#164929): bias correction would be one step off in everything that follows, and DeepSpeed's would
    decay the weights. The gradients do not tell it from a real first step, on a rank whose shard happens to have only zeros; the caller
    does.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) in ALLOCATORS:
            return True
        frame = frame.f_back
    return False
