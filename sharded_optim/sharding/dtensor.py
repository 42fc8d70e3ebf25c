"""DTensor parameters, which record how they are sharded: FSDP2, HSDP, tensor parallelism and their combinations.

Step and state work on the local tensors, as DTensor dispatch costs more than the arithmetic of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sharded_optim.sharding.layout import LocalParam, Piece
from sharded_optim.sharding.plain import check_dtype_and_layout, waited_for
from sharded_optim.sharding.segment import Segment
from sharded_optim.sharding.wrappers import Wrapper

__all__ = ["WRAPPER"]


def _describe(param: DTensor, name: str) -> LocalParam:
    check_dtype_and_layout(param, f"parameter {name!r}")
    _refuse_partial(param, f"parameter {name!r}")
    sizes, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    held = bool(offsets) or param.ndim == 0  # a rank outside the mesh gets no offsets
    segment = Segment.box(name, param.shape, offsets, sizes) if held else Segment.flat(name, param.shape, 0, 0)
    local_shape = tuple(param._local_tensor.shape)
    if segment.numel != param._local_tensor.numel():
        raise ValueError(
            f"parameter {name!r} has a local tensor of shape {local_shape}, but its placements {param.placements} say {tuple(sizes)}; "
            f"build it with distribute_tensor, or give DTensor.from_local its shape and stride"
        )
    mesh, placements, spec = param.device_mesh, _placements(param), param._spec

    def local(tensor: Tensor, role: str) -> Tensor:
        if tensor is not param and getattr(tensor, "_spec", None) is not spec:  # FSDP2's gradients share the parameter's spec object
            what = f"{role} of {name!r}"
            check_dtype_and_layout(tensor, what)
            if not isinstance(tensor, DTensor):
                raise ValueError(f"{what} is a plain tensor, the parameter a DTensor; wrap it with DTensor.from_local")
            _refuse_partial(tensor, what)
            if tensor.device_mesh != mesh or _placements(tensor) != placements:
                raise ValueError(
                    f"{what} is placed as {tensor.placements} on {tensor.device_mesh}, the parameter as {placements} on {mesh}; "
                    f"redistribute it: param.grad = param.grad.redistribute(param.device_mesh, param.placements)"
                )
        assert isinstance(tensor, DTensor)
        local_tensor = waited_for(tensor._local_tensor)
        if tuple(local_tensor.shape) != local_shape:
            raise ValueError(f"{role} of {name!r} has a local tensor of shape {tuple(local_tensor.shape)}, the parameter {local_shape}")
        return local_tensor

    return LocalParam(param=param, name=name, pieces=(Piece(segment=segment),), local=local)


def _partial_placements(grad: Tensor) -> tuple[Placement, ...] | None:
    """Return the placements of a Partial gradient; None for any other gradient.

    Tensor parallelism leaves some gradients Partial, such as those of a norm's replicated weights in a SequenceParallel region: these
    must be summed over the ranks.
    """
    if not isinstance(grad, DTensor) or not any(placement.is_partial() for placement in grad.placements):
        return None
    return tuple(grad.placements)


def _reduced(grad: Tensor | None, param: Tensor, placements: tuple[Placement, ...]) -> Tensor | None:
    """Reduce a Partial gradient to the placements of its parameter: a collective over the mesh axes on which it is Partial.

    Args:
        grad: this rank's gradient. With None, as only other ranks have one, the rank takes part with zeros; the result is then None.
        param: a DTensor.
        placements: the placements of the gradient.
    """
    assert isinstance(param, DTensor)
    mesh = param.device_mesh
    if grad is None:
        sizes, _ = compute_local_shape_and_global_offset(param.shape, mesh, placements)
        zeros = torch.zeros(sizes, dtype=param.dtype, device=param.device)
        DTensor.from_local(zeros, mesh, placements, run_check=False, shape=param.shape, stride=param.stride()).redistribute(
            mesh, param.placements
        ).to_local()
        return None
    assert isinstance(grad, DTensor)
    return grad.redistribute(mesh, param.placements) if grad.device_mesh == mesh else grad


def _refuse_partial(tensor: DTensor, what: str) -> None:
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"{what} is Partial ({tensor.placements}): its value is a sum that has not been reduced; "
            f"reduce it first, for a gradient by param.grad = param.grad.redistribute(placements=param.placements)"
        )


def _placements(tensor: DTensor) -> tuple[Placement, ...]:
    """Return the placements, with Replicate for every mesh axis of size 1, where all placements mean the same."""
    sizes = tensor.device_mesh.shape
    return tuple(Replicate() if size == 1 else placement for size, placement in zip(sizes, tensor.placements, strict=True))


WRAPPER = Wrapper(
    name="DTensor",
    claims=lambda tensor: isinstance(tensor, DTensor),
    describe=_describe,
    partial=_partial_placements,
    reduced=_reduced,
)
