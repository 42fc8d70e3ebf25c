"""Optimizer state: per parameter, a step counter, the algorithm's moments and its format's further arrays, allocated when first asked for.

Used by the engine. The private names of torch and DeepSpeed that are relied on here are tried with torch 2.11 and 2.13, and guarded by
tests.
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
    format: Format  # of the parameter
    state_formats: tuple[Format, ...]  # of each of algorithm.state


class Choice(_Choice):
    """The algorithm of a parameter, and the storage formats of it and of its moments."""

    @cached_property
    def entries(self) -> dict[str, torch.dtype]:
        """Arrays in the parameter's state, by name, with their dtypes; the step counter not among them."""
        return {key: dtype for _, _, entries in self.moments for key, dtype in entries.items()} | dict(self.format.extra)

    @cached_property
    def moments(self) -> list[tuple[str, Format, dict[str, torch.dtype]]]:
        """Each of algorithm.state, its format, and its entries."""
        return [(name, fmt, fmt.entries(name)) for name, fmt in zip(self.algorithm.state, self.state_formats, strict=True)]

    def may_begin(self, there: Collection[str]) -> set[str]:
        """Names of arrays that may begin as zeros at any step: those beside a parameter, and optional moments.

        Args:
            there: the entries that have begun. A moment of which some arrays have begun needs the others too.
        """
        late = [entries for name, _, entries in self.moments if name in self.algorithm.optional_state and entries.keys().isdisjoint(there)]
        return {array.name for array in self.format.extra}.union(*late)


class Allocator(Protocol):
    """The part of an optimizer that its state uses."""

    def new_state(self, param: Tensor) -> dict[str, Any]:
        """State of a parameter that has none yet."""
        ...


class State(defaultdict[Tensor, dict[str, Any]]):
    """`optimizer.state`, which creates the state of a missing parameter.

    A plain dict would be silently wrong: torch.distributed.checkpoint asks `optimizer.state[param]` which state to load, and loads
    nothing where it finds nothing, as in an optimizer that has gradients but has not stepped.

    The optimizer is held weakly, so that both are freed as soon as nobody uses the optimizer.
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
        """Pickle as a plain dict; the copied or unpickled optimizer makes a State of it again."""
        return dict, (dict(self),)


def new_state(param: Tensor, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """Create the state of a parameter: zeros like it under each name of `dtypes`, and a step counter of 0."""
    return {STEP: torch.zeros((), dtype=torch.float32, device=param.device)} | {n: zeros(param, d) for n, d in dtypes.items()}


def zeros(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Create zeros that are shaped, strided and sharded like the parameter; on a CPU on large pages, see `memory.py`."""
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
    """Return the local tensor of a DTensor; any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


# Functions that step with zero gradients only to make the optimizer allocate its state: (module, name).
ALLOCATORS = {
    ("torch.distributed.checkpoint.state_dict", "_init_optim_state"),
    ("deepspeed.runtime.fp16.unfused_optimizer", "initialize_optimizer_states"),
}
ALLOCATOR = "init_optim_state"  # torchtitan's, torchft's and other copies of torch's function, in whatever module, with lr 0


def called_to_allocate() -> bool:
    """Return whether a wrapper is stepping only to make the optimizer allocate its state.

    That step must not count (pytorch#164929): bias correction would be one step off in everything that follows, and DeepSpeed's would
    decay the weights. The gradients do not tell it from a real first step, on a rank whose shard happens to have only zeros; the caller
    does.
    """
    return any((_module_of(frame), frame.f_code.co_name) in ALLOCATORS for frame in _callers())


def steps_to_allocate(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a step of these groups, which have no state yet, is only to make the optimizer allocate it. Waits for the device if so."""
    if called_to_allocate():
        return True
    if not any(frame.f_code.co_name == ALLOCATOR for frame in _callers()):
        return False
    grads = [param.grad for group in groups for param in group["params"] if param.grad is not None]
    return all(float(group["lr"]) == 0.0 for group in groups) and not any(bool(local_of(grad).count_nonzero()) for grad in grads)


CHECKPOINT = "torch.distributed.checkpoint"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The form in which torch.distributed.checkpoint asks for optimizer state: see torch's StateDictOptions."""

    full: bool = False  # whole tensors
    cpu_offload: bool = False  # with `full`: on rank 0 alone
    flat: bool = False  # one level of keys
    template: bool = False  # what values are is of no interest: it is going to load others in their place


def asked_by_distributed_checkpoint() -> Asked | None:
    """Return the form that torch.distributed.checkpoint asks for, or None if it is not the caller.

    It calls `optimizer.state_dict` and `optimizer.state` as everybody does, but what it is given are the parts of one checkpoint of all
    ranks: it would save one rank's 1-D tensors and drop the others'.
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
    """Whether FullyShardedDataParallel.optim_state_dict asks for the state: whoever loads a checkpoint by it loads what is there then."""
    return any((_module_of(frame), frame.f_code.co_name) == (FSDP1, "optim_state_dict") for frame in _callers())


class AskedByFsdp1(NamedTuple):
    """A FullyShardedDataParallel model whose state torch is gathering."""

    model: nn.Module
    offloads_whole: bool  # to the CPU


def asked_for_state_of_fsdp1() -> AskedByFsdp1 | None:
    """Return whose state torch is gathering, if it is that of a FullyShardedDataParallel model."""
    for frame in _callers():
        caller = _module_of(frame), frame.f_code.co_name  # not the locals of any frame: what reads them keeps all in them alive
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
    """Frames of the callers of this module, the innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module_of(frame: FrameType) -> str | None:
    return frame.f_globals.get("__name__")
