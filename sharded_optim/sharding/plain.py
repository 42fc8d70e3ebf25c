"""Ordinary tensors, which a rank holds whole: in a single process, or under DDP, where every rank has a replica."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from sharded_optim.sharding.layout import LocalParam, Piece
from sharded_optim.sharding.segment import Segment
from sharded_optim.storage.formats import format_of, is_stored

__all__ = ["check_dtype_and_layout", "check_memory", "describe", "ordinary", "waited_for"]


def describe(param: Tensor, name: str) -> LocalParam:
    if not _is_usable(param):
        check_dtype_and_layout(param, f"parameter {name!r}")

    def local(tensor: Tensor, role: str) -> Tensor:
        if tensor is not param:
            tensor = ordinary(tensor, role, name)
            if tensor.shape != param.shape:
                raise ValueError(f"{role} of {name!r} has shape {tuple(tensor.shape)}, the parameter {tuple(param.shape)}")
        return tensor

    return LocalParam(param=param, name=name, pieces=(Piece(segment=Segment.whole(name, param.shape)),), local=local)


def ordinary(tensor: Tensor, role: str, name: str) -> Tensor:
    """Wait for a tensor, if it is the result of a functional collective, and check that it is an ordinary tensor that a step can use.

    Args:
        role, name: for error messages: the tensor's role, and the name of its parameter.
    """
    tensor = waited_for(tensor)
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"{role} of {name!r} is a {type(tensor).__name__}, the parameter an ordinary tensor; make both alike")
    if not _is_usable(tensor):
        check_dtype_and_layout(tensor, f"{role} of {name!r}")
    return tensor


def waited_for(tensor: Tensor) -> Tensor:
    """Wait for the result of a functional collective; return any other tensor unchanged."""
    collectives = sys.modules.get("torch.distributed._functional_collectives")  # imported, if there are such tensors
    if collectives is not None and isinstance(tensor, collectives.AsyncCollectiveTensor):
        return tensor.wait()  # pyright: ignore[reportAttributeAccessIssue]
    return tensor


def _is_usable(tensor: Tensor) -> bool:
    """Return whether `check_dtype_and_layout` would pass; faster, as it makes no text."""
    return tensor.layout is torch.strided and is_stored(tensor.dtype) and not tensor.is_neg()


def check_dtype_and_layout(tensor: Tensor, what: str) -> None:
    """Raise ValueError unless `tensor` is dense, real and of a dtype that a format stores."""
    if tensor.layout != torch.strided:
        raise ValueError(f"{what} is sparse ({tensor.layout}); only dense tensors are supported: build the layer with sparse=False")
    if tensor.is_neg():
        raise ValueError(f"{what} is a view that is negated when it is read; materialize it with .resolve_neg()")
    if tensor.is_complex():
        raise ValueError(f"{what} is complex ({tensor.dtype}); optimize torch.view_as_real(...) of it instead")
    if is_stored(tensor.dtype):
        return
    if not tensor.is_floating_point():
        raise ValueError(f"{what} has integer dtype {tensor.dtype}; only floating-point tensors can be optimized: leave it out")
    try:
        format_of(tensor.dtype)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def check_memory(local: Tensor, role: str, name: str, device: torch.device) -> Tensor:
    """Return the tensor if a kernel on the parameter's device may use its memory.

    Args:
        role, name: for error messages: the tensor's role, and the name of its parameter.

    Raises:
        ValueError: the tensor is on another device, or has elements but no memory.
    """
    if local.device == device and (local.data_ptr() or not local.numel() or local.device.type == "meta"):
        return local
    what = f"{role} of {name!r}"
    if local.device != device:
        raise ValueError(f"{what} is on {local.device}, the parameter on {device}; move it there with .to({str(device)!r})")
    raise ValueError(f"{what} has no memory: its storage was freed, or it is zeros that are not stored")
