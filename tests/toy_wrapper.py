"""A new wrapper, as its one file would be: tensors with a row for every rank are cut into rows; others are whole on every rank.

Gradients of what is cut are averaged in the backward pass. Those of what is whole are not: what a rank has is its own, for the step to
average.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from sharded_optim.sharding import LocalParam, Piece, Wrapper
from sharded_optim.sharding.plain import check_dtype_and_layout
from sharded_optim.sharding.segment import Segment

__all__ = ["WRAPPER", "CutRows", "Unreduced"]


class RowShard(nn.Parameter):
    """Rows [start, start + len) of a tensor, or all of them.

    Attributes:
        whole: the shape of the tensor.
        start: the first of the rows; None: this is the whole tensor.
    """

    whole: torch.Size
    start: int | None

    @classmethod
    def of(cls, param: Tensor) -> RowShard:
        is_cut = param.ndim > 1 and len(param) >= dist.get_world_size()
        rows = torch.arange(len(param)).tensor_split(dist.get_world_size())[dist.get_rank()] if is_cut else slice(None)
        shard = cls(param.detach()[rows].clone())
        shard.whole, shard.start = param.shape, int(rows[0]) if is_cut else None
        return shard


class Unreduced(Tensor):
    """A gradient of this rank alone."""


class CutRows(nn.Module):
    """A model that is trained in parts. It replaces the parameters of `inner`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        for module in inner.modules():
            for name, param in module._parameters.items():
                if param is not None:
                    module._parameters[name] = shard = RowShard.of(param)
                    if shard.start is None:
                        shard.register_post_accumulate_grad_hook(_mark)

    def forward(self, *inputs: Tensor) -> Tensor:
        whole: dict[str, Any] = {name: _whole(param) for name, param in self.inner.named_parameters()}
        return functional_call(self.inner, whole, inputs)


def _mark(param: Tensor) -> None:
    assert param.grad is not None
    param.grad = param.grad.as_subclass(Unreduced)


def _whole(param: Tensor) -> Tensor:
    assert isinstance(param, RowShard)
    return param if param.start is None else _Gathered.apply(param, param.whole, param.start)  # pyright: ignore[reportReturnType]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, whole: torch.Size, start: int) -> Tensor:
        ctx.rows = slice(start, start + len(shard))
        gathered = shard.new_zeros(whole)
        gathered[ctx.rows] = shard
        dist.all_reduce(gathered)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _mean(grads[0])[ctx.rows].clone(), None, None


def _mean(grad: Tensor) -> Tensor:
    mean = grad.clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


# ------------------------------------------------------------------------------------------------------------- what the library is told


def _describe(param: RowShard, name: str) -> LocalParam:
    check_dtype_and_layout(param, f"parameter {name!r}")
    offsets = [param.start or 0] + [0] * (len(param.whole) - 1)
    segment = Segment.whole(name, param.whole) if param.start is None else Segment.box(name, param.whole, offsets, param.shape)

    def local(tensor: Tensor, role: str) -> Tensor:
        if tensor.shape != param.shape:
            raise ValueError(f"{role} of {name!r} has shape {tuple(tensor.shape)}, this rank's rows {tuple(param.shape)}")
        return tensor

    return LocalParam(param=param, name=name, pieces=(Piece(segment=segment),), local=local)


def _reduced(grad: Tensor | None, param: Tensor, partial: Any) -> Tensor | None:
    mean = _mean(torch.zeros_like(param) if grad is None else grad.as_subclass(Tensor))
    return None if grad is None else mean


def _units(model: nn.Module) -> Iterable[Sequence[Tensor]]:
    return [list(module.parameters()) for module in model.modules() if isinstance(module, CutRows)]


WRAPPER = Wrapper(
    name="CutRows",
    claims=lambda tensor: isinstance(tensor, RowShard),
    describe=_describe,
    partial=lambda grad: "mean" if isinstance(grad, Unreduced) else None,
    reduced=_reduced,
    inner=lambda module: "inner" if isinstance(module, CutRows) else None,
    units=_units,
)
