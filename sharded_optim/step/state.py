"""Optimizer state, allocated on first access: per parameter a step counter, the algorithm's moments and its format's extra arrays.

Used by the engine. It relies on private names of torch and DeepSpeed, which were tested with torch 2.11 and 2.13, and are guarded by tests.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from sharded_optim.formulas import Algorithm
from sharded_optim.storage import memory
from sharded_optim.storage.format import Format

__all__ = [
    "STEP",
    "Asked",
    "Choice",
    "State",
    "asked_by_distributed_checkpoint",
    "asked_by_fsdp1",
    "asked_for_state_of_fsdp1",
    "called_to_allocate",
    "local_of",
    "new_state",
    "steps_to_allocate",
    "zeros",
]

STEP = "step"


class _Choice(NamedTuple):
    algorithm: Algorithm
    format: Format  # storage format of the parameter
    state_formats: tuple[Format, ...]  # storage format of each moment in algorithm.state


class Choice(_Choice):
    """The algorithm of a parameter, and the storage formats of the parameter and its moments."""

    @cached_property
    def entries(self) -> dict[str, torch.dtype]:
        """Dtypes of the arrays in the parameter's state, keyed by name, without the step counter."""
        return {key: dtype for _, _, entries in self.moments for key, dtype in entries.items()} | dict(self.format.extra)

    @cached_property
    def moments(self) -> list[tuple[str, Format, dict[str, torch.dtype]]]:
        """(name, format, entries) of each moment in algorithm.state; the entries are the dtypes of its arrays, keyed by name."""
        return [(name, fmt, fmt.entries(name)) for name, fmt in zip(self.algorithm.state, self.state_formats, strict=True)]

    def may_begin(self, existing: Collection[str]) -> set[str]:
        """Return the names of arrays that may start as zeros at any step: the extra arrays of a parameter, and optional moments.

        Args:
            existing: names of the existing entries. A moment with some but not all of its arrays is incomplete, and may not start.
        """
        late = [
            entries for name, _, entries in self.moments if name in self.algorithm.optional_state and entries.keys().isdisjoint(existing)
        ]
        return {array.name for array in self.format.extra}.union(*late)


class Allocator(Protocol):
    """The part of an optimizer that its state uses."""

    def new_state(self, param: Tensor) -> dict[str, Any]:
        """Create the state of a parameter that has none yet."""
        ...


class State(defaultdict[Tensor, dict[str, Any]]):
    """The dict `optimizer.state`, which creates the state of a missing parameter on access.

    A plain dict would be silently wrong: torch.distributed.checkpoint reads from `optimizer.state[param]` which state to load, and loads
    nothing into an optimizer that has gradients but has not stepped.

    The reference to the optimizer is weak, so that both are freed as soon as the optimizer is no longer used.
    """

    def __init__(self, optimizer: Allocator, content: Mapping[Tensor, dict[str, Any]]) -> None:
        super().__init__(dict, content)
        self._optimizer = ref(optimizer)

    def __missing__(self, param: Tensor) -> dict[str, Any]:
        optimizer = self._optimizer()
        if optimizer is None:
            raise KeyError(param)
        self[param] = optimizer.new_state(param)
        return self[param]

    def copy(self) -> dict[Tensor, dict[str, Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        optimizer = self._optimizer()
        return dict(self) if optimizer is None else State(optimizer, self)

    def __copy__(self) -> dict[Tensor, dict[str, Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a plain dict; the copied or unpickled optimizer turns it into a State again."""
        return dict, (dict(self),)


def new_state(param: Tensor, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """Create the state of a parameter: zeros in its shape for each entry of `dtypes`, and a step counter of 0, fp32 ()."""
    return {STEP: torch.zeros((), dtype=torch.float32, device=param.device)} | {n: zeros(param, d) for n, d in dtypes.items()}


def zeros(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Create zeros with the shape, strides and sharding of the parameter; on a CPU in large pages, see `memory.py`."""
    is_plain = type(param) in (Tensor, nn.Parameter) and param.device.type == "cpu"
    if is_plain and param.numel() * dtype.itemsize < memory.LARGE_PAGE:
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    result = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    local = local_of(result)
    if local.device.type != "cpu" or type(local) is not Tensor:
        return result.zero_()
    local.data = memory.zeros(local.numel(), dtype).as_strided(local.shape, local.stride())
    return result


def local_of(tensor: Tensor) -> Tensor:
    """Return the local tensor of a DTensor; return any other tensor unchanged."""
    return getattr(tensor, "_local_tensor", tensor)


# (module, name) of functions that call step with zero gradients only to make the optimizer allocate its state.
ALLOCATORS = {
    ("torch.distributed.checkpoint.state_dict", "_init_optim_state"),
    ("deepspeed.runtime.fp16.unfused_optimizer", "initialize_optimizer_states"),
}
ALLOCATOR = "init_optim_state"  # name of copies of torch's function (torchtitan, torchft), in any module; they step with lr 0


def called_to_allocate() -> bool:
    """Return whether a wrapper calls step only to make the optimizer allocate its state.

    Such a step must not count (pytorch#164929): bias correction would be off by one step from then on, and DeepSpeed's call would decay
    the weights. Gradients cannot distinguish it from a real first step on a rank whose shard has only zeros, so the call stack decides.
    """
    return any((_module_of(frame), frame.f_code.co_name) in ALLOCATORS for frame in _callers())


def steps_to_allocate(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a step of these groups, which have no state yet, only allocates it. Waits for the device if a caller is ALLOCATOR."""
    if called_to_allocate():
        return True
    if not any(frame.f_code.co_name == ALLOCATOR for frame in _callers()):
        return False
    grads = [param.grad for group in groups for param in group["params"] if param.grad is not None]
    return all(float(group["lr"]) == 0.0 for group in groups) and not any(bool(local_of(grad).count_nonzero()) for grad in grads)


CHECKPOINT = "torch.distributed.checkpoint"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The form of optimizer state that torch.distributed.checkpoint requests; see torch's StateDictOptions."""

    full: bool = False  # whole tensors
    cpu_offload: bool = False  # with `full`: only on rank 0
    flat: bool = False  # one level of keys
    template: bool = False  # only names and shapes matter, because loaded values will replace these


def asked_by_distributed_checkpoint() -> Asked | None:
    """Return the form of state that torch.distributed.checkpoint requests, or None if it is not among the callers.

    It calls `optimizer.state_dict` and `optimizer.state` like any other caller, but takes the result as this rank's part of one checkpoint
    of all ranks: of ordinary 1-D shards it would save one rank's and drop the others'.
    """
    frames = [frame for frame in _callers() if f"{_module_of(frame)}.".startswith(f"{CHECKPOINT}.")]
    if not frames:
        return None
    info = frames[0].f_locals.get("info")
    return Asked(
        full=getattr(info, "full_state_dict", False),
        cpu_offload=getattr(info, "cpu_offload", False),
        flat=getattr(info, "flatten_optimizer_state_dict", False),
        template=any(frame.f_code.co_name == "_load_optim_state_dict" for frame in frames),
    )


FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"


def asked_by_fsdp1() -> bool:
    """Return whether FullyShardedDataParallel.optim_state_dict is a caller: loading with it fills only state that exists by then."""
    return any((_module_of(frame), frame.f_code.co_name) == (FSDP1, "optim_state_dict") for frame in _callers())


class AskedByFsdp1(NamedTuple):
    """A FullyShardedDataParallel model whose optimizer state torch is gathering."""

    model: nn.Module
    offloads_whole: bool  # whether torch gathers whole tensors on the CPU


def asked_for_state_of_fsdp1() -> AskedByFsdp1 | None:
    """Return the FullyShardedDataParallel model whose optimizer state torch is gathering; None if it gathers none."""
    for frame in _callers():
        caller = _module_of(frame), frame.f_code.co_name  # match by name first: reading f_locals keeps a frame's locals alive
        if caller == (f"{CHECKPOINT}.state_dict", "_get_optim_state_dict"):
            info, model = frame.f_locals["info"], frame.f_locals["model"]
            return AskedByFsdp1(model, info.full_state_dict and info.cpu_offload) if info.fsdp_modules else None
        if caller == (FSDP1, "optim_state_dict"):
            settings = frame.f_locals["state_dict_settings"]
            is_whole = settings.state_dict_type.name == "FULL_STATE_DICT"
            return AskedByFsdp1(frame.f_locals["model"], is_whole and settings.optim_state_dict_config.offload_to_cpu)
        if caller == (FSDP1, "full_optim_state_dict"):
            return AskedByFsdp1(frame.f_locals["model"], True)
    return None


def _callers() -> Iterator[FrameType]:
    """Yield the stack frames of the callers, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module_of(frame: FrameType) -> str | None:
    return frame.f_globals.get("__name__")
