"""Whether an optimizer treats the local part of a parameter as the whole: tried with a second one, which knows nothing of other ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharded_optim.step.engine import Engine
from sharded_optim.tools.verify.making import MakeOptimizer
from sharded_optim.zero import ShardedOptimizer

__all__ = ["LocalCopy"]


class LocalCopy:
    """An optimizer of the same class on copies of a rank's local tensors, stepped with the same local gradients.

    Where all ranks' copies end with the bits of the optimizer itself, it has computed from local parts alone.

    Args:
        optimizer: what steps the local tensors; of this library it is not copied, as it computes with other ranks.
        make: has made it.
    """

    def __init__(self, optimizer: Any, make: MakeOptimizer) -> None:
        self.is_equal: bool | None = None  # None: not tried
        self._make, self._copy, self._params = make, None, []
        if make.constructor is None or isinstance(optimizer, Engine | ShardedOptimizer) or not isinstance(optimizer, torch.optim.Optimizer):
            return
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if self._copy is None:
            copies = {id(param): _local(param).detach().clone().requires_grad_() for param in params}
            self._params = [(param, copies[id(param)]) for param in params]
            groups = [group | {"params": [copies[id(param)] for param in group["params"]]} for group in optimizer.param_groups]
            try:
                self._copy = self._make.of_groups(groups)
            except Exception:  # whatever a class refuses about local parts
                self._params = []
        for param, copy in self._params:
            copy.grad = None if param.grad is None else _local(param.grad).detach().clone().to(copy.dtype)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._copy is None:
            return
        try:
            self._copy.step()
        except Exception:  # likewise
            self._copy, self._params, self.is_equal = None, [], False
            return
        is_equal = all(torch.equal(_local(param), copy) for param, copy in self._params)
        self.is_equal = is_equal and self.is_equal is not False


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
