"""From a wrapper's parameters to segments: one file per wrapper.

Tensors that tell how they are sharded have a `describe(param, name) -> LocalParam`, and `describe` here picks by the parameter's type:
`plain.py`, `dtensor.py`. For wrappers whose tensors do not tell, `fsdp1.py` and `deepspeed.py` make a `FlatLayout` (`flat.py`). `layout.py`
puts the local parameters of all ranks together.
"""

from __future__ import annotations

import sys

from torch import Tensor

from sharded_optim.sharding import plain
from sharded_optim.sharding.flat import FlatLayout, FlatTensor
from sharded_optim.sharding.layout import GRADIENT, PARAMETER, Layout, LocalParam, Piece
from sharded_optim.sharding.plain import check_memory

__all__ = [
    "GRADIENT",
    "PARAMETER",
    "FlatLayout",
    "FlatTensor",
    "Layout",
    "LocalParam",
    "Piece",
    "check_memory",
    "describe",
    "gradients_of",
    "is_partial",
]


def describe(param: Tensor, name: str, flat_layout: FlatLayout | None = None) -> LocalParam:
    """What this rank holds of parameter `name`.

    Args:
        flat_layout: of the wrapped model whose parameter it is; None for parameters that tell how they are sharded.

    Raises:
        ValueError: the parameter cannot be optimized, or its sharding cannot be expressed; names the tensor, the rule and the way out.
    """
    if flat_layout is not None:
        return flat_layout.describe(param, name)
    if getattr(param, "_fsdp_flattened", False):  # torch's mark of FSDP1
        raise ValueError(
            f"parameter {name!r} is sharded by FullyShardedDataParallel, which does not tell how: pass layout=so.fsdp1_layout(model), or "
            f"wrap with fully_shard (FSDP2)"
        )
    # Who holds a DTensor has imported its module; a single process need not pay for that import.
    if "torch.distributed.tensor" in sys.modules:
        from sharded_optim.sharding import dtensor

        if isinstance(param, dtensor.DTensor):
            return dtensor.describe(param, name)
    return plain.describe(param, name)


def gradients_of(layout: Layout) -> list[Tensor | None]:
    """The gradients of a layout with DTensors, reduced where tensor parallelism has left them Partial.

    That is a collective, so call it before anything that a rank may raise alone. A rank without such a gradient takes part.
    """
    grads = [param.grad for param in layout.params]
    rows = list(zip(grads, layout.params, strict=True))
    if all(getattr(grad, "_spec", 0) is getattr(param, "_spec", 1) for grad, param in rows):  # so FSDP2 leaves them
        return grads
    from sharded_optim.sharding import dtensor

    for row, (grad, param) in enumerate(rows):
        placements = dtensor.partial_placements(grad) or (layout.partial.get(row) if grad is None else None)
        if placements is not None:
            layout.partial[row] = placements
            grads[row] = dtensor.reduced(grad, param, placements)
    return grads


def is_partial(grad: Tensor) -> bool:
    """Whether a gradient is a DTensor that is yet to be reduced."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from sharded_optim.sharding import dtensor

    return dtensor.partial_placements(grad) is not None
