"""The stand-in for `param.grad` while the gradient is in a bucket, sharded over the ranks.

None would mean that there is no gradient: torch.nn.utils.clip_grad_norm_, which frameworks call by themselves, would silently clip
nothing. The placeholder has a shape and no memory, and raises an error in any computation.

Autograd adds to an existing gradient. What the next backward pass adds to a placeholder is stored in `added`, and the parameter's
post-accumulate-grad hook takes it from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["GRAD_SCALER", "GradientInBucket"]

GRAD_SCALER = (
    "GradScaler finds no gradients in the parameters, as they are in ShardedOptimizer's buckets; train in bfloat16 without it, or wrap the "
    "model with DistributedDataParallel, which leaves them there"
)
aten = torch.ops.aten
# Methods that access a tensor's memory, which a placeholder lacks: without an override, some would crash the process.
MEMORY = ("__dlpack__", "data_ptr", "numpy", "share_memory_", "tolist")  # torch.compile asks for storage, and takes an error


class GradientInBucket(Tensor):
    """A tensor without memory, shaped like the gradient for which it stands.

    Attributes:
        param_name: the parameter's name in errors.
        added: the gradient that autograd has added to the placeholder; None if it has added none.
    """

    param_name: str
    added: Tensor | None

    @staticmethod
    def __new__(cls, param: Tensor, param_name: str) -> GradientInBucket:
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, tuple(param.shape), dtype=param.dtype, device=param.device
        )
        made.param_name, made.added = param_name, None
        return made

    def take_added(self) -> Tensor | None:
        """Return `added`, and reset it to None."""
        added, self.added = self.added, None
        return added

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        if function in (aten.add_.Tensor, aten.add.Tensor) and type(args[0]) is cls and _is_called_by_autograd():
            if function is aten.add.Tensor:  # with create_graph=True
                return args[1].clone()
            args[0].added = args[1].clone()
            return args[0]
        if "unscale" in function.__name__:
            raise ValueError(GRAD_SCALER)
        placeholder = next(each for each in tree_leaves([args, kwargs]) if isinstance(each, GradientInBucket))
        raise ValueError(f"{function} cannot be computed: {placeholder!r}")

    def __repr__(self, **_: object) -> str:
        return (
            f"the gradient of {self.param_name!r} is in a bucket of ShardedOptimizer, cut over the ranks, and not in param.grad; clip with "
            f"optimizer.clip_grad_norm_(max_norm) instead of torch.nn.utils, drop it with optimizer.zero_grad(), or wrap the model with "
            f"DistributedDataParallel, which leaves gradients in the parameters"
        )


def _refused(name: str) -> Callable[..., Any]:
    def refused(placeholder: GradientInBucket, *_: Any, **options: Any) -> Any:
        raise ValueError(f"{name} has no memory to give: {placeholder!r}")

    return refused


for _name in MEMORY:
    setattr(GradientInBucket, _name, _refused(_name))


def _is_called_by_autograd() -> bool:
    """Return whether the computation was started by autograd itself, and not by a hook that autograd has called."""
    if torch._C._current_graph_task_id() < 0:
        return False
    caller = sys._getframe(1).f_back
    return caller is None or caller.f_globals.get("__name__") == "torch.autograd.graph"  # None: in a thread of a device
