"""Describe which elements of which tensor each rank holds, under every wrapper: one file per wrapper, registered in `wrappers.py`.

DTensors record their own sharding, which `dtensor.py` reads; ordinary tensors are whole (`plain.py`). Flattened tensors record nothing, so
`fsdp1.py` and `deepspeed.py` make a `FlatLayout` (`flat.py`) of what the wrapper knows. `exchange.py` combines the local parameters of all
ranks to a `Layout` (`layout.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from sharded_optim.sharding.flat import FlatLayout, FlatTensor
from sharded_optim.sharding.layout import GRADIENT, PARAMETER, Layout, LocalParam, Piece
from sharded_optim.sharding.plain import check_memory
from sharded_optim.sharding.wrappers import Wrapper, partial_of, used_wrappers, wrapper_of

__all__ = [
    "GRADIENT",
    "PARAMETER",
    "FlatLayout",
    "FlatTensor",
    "Layout",
    "LocalParam",
    "Piece",
    "Wrapper",
    "check_memory",
    "describe",
    "find_layout",
    "fsdp1_layout",
    "partial_of",
    "reduced_gradients",
    "used_wrappers",
]


def describe(param: Tensor, name: str, flat_layout: FlatLayout | None = None) -> LocalParam:
    """Describe which elements of which tensors this rank holds in a parameter.

    Args:
        flat_layout: the layout of a model whose parameters a wrapper has flattened; None for DTensors and ordinary tensors.

    Raises:
        ValueError: the parameter cannot be optimized, or its sharding cannot be expressed; names the tensor, the rule and the way out.
    """
    return wrapper_of(param).describe(param, name) if flat_layout is None else flat_layout.describe(param, name)


def find_layout(param: Tensor, among: Iterable[Tensor]) -> FlatLayout | None:
    """Find the layout of the FullyShardedDataParallel model that has flattened a parameter; None if there is none, or for other wrappers.

    Args:
        among: all parameters of the optimizer.
    """
    layout_holding = wrapper_of(param).layout_holding
    return None if layout_holding is None else layout_holding(list(among))


def fsdp1_layout(model: nn.Module) -> FlatLayout:
    """Return how FullyShardedDataParallel (FSDP1) has sharded a model, for the `layout=` of an optimizer. No communication.

    Args:
        model: wrapped, or with wrapped modules inside; use_orig_params True or False, any sharding strategy, mixed precision.

    Raises:
        ValueError: nothing is wrapped, or the model cannot be described: parameters that were not contiguous, tensor parallelism inside.
    """
    from sharded_optim.sharding import fsdp1  # its import takes time

    return fsdp1.layout_of(model)


def reduced_gradients(params: Sequence[Tensor], partials: dict[int, Any]) -> list[Tensor | None]:
    """Return the gradients of parameters, and reduce those that tensor parallelism has left Partial. A collective.

    Call it before any code that may raise on one rank alone. A rank that lacks a gradient which is Partial on others takes part.

    Args:
        partials: the placements of Partial gradients seen so far, by index of the parameter; updated.
    """
    grads = [param.grad for param in params]
    rows = list(zip(grads, params, strict=True))
    if all(getattr(grad, "_spec", 0) is getattr(param, "_spec", 1) for grad, param in rows):  # as FSDP2 leaves them: none is Partial
        return grads
    used = used_wrappers()
    for row, (grad, param) in enumerate(rows):
        partial = partials.get(row) if grad is None else partial_of(grad, used)
        if partial is not None:
            partials[row] = partial
            grads[row] = wrapper_of(param).reduced(grad, param, partial)
    return grads
