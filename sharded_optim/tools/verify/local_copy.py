"""Test whether an optimizer treats the local part of a parameter as the whole tensor, by a second optimizer that has local parts alone."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from sharded_optim.step.engine import Engine
from sharded_optim.tools.verify.making import MakeOptimizer, rebuilt, seed_all
from sharded_optim.zero import ShardedOptimizer

__all__ = ["LocalCopy"]


class LocalCopy:
    """An optimizer of the same class on copies of a rank's local tensors, stepped with the same local gradients.

    If the copies on all ranks end with the same bits as the optimizer's tensors, the optimizer has computed from local parts alone.

    Args:
        optimizer: the optimizer of the local tensors. An optimizer of this library is not copied, as it computes with other ranks.
        make: the maker of that optimizer.
    """

    def __init__(self, optimizer: Any, make: MakeOptimizer) -> None:
        self.is_equal: bool | None = None  # None: not tried
        self._make, self._copy, self._params = make, None, []
        self._steps = 0
        if isinstance(optimizer, Engine | ShardedOptimizer) or not isinstance(optimizer, torch.optim.Optimizer):
            return
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._steps == 0:
            copies = [[_local(param).detach().clone().requires_grad_() for param in group["params"]] for group in optimizer.param_groups]
            pairs = zip(optimizer.param_groups, copies, strict=True)
            self._params = [pair for group, of_group in pairs for pair in zip(group["params"], of_group, strict=True)]
            with suppress(Exception):  # the class may refuse local parts
                self._copy = rebuilt(optimizer, self._make, copies)
        for param, copy in self._params:
            copy.grad = None if param.grad is None else _local(param.grad).detach().clone().to(copy.dtype)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._steps += 1
        if self._copy is None:
            return
        try:
            with torch.random.fork_rng(devices=[]):
                seed_all(self._steps - 1)
                self._copy.step()
        except Exception:  # the class refuses local parts in the step
            self._copy, self._params, self.is_equal = None, [], False
            return
        is_equal = all(torch.equal(_local(param), copy) for param, copy in self._params)
        self.is_equal = is_equal and self.is_equal is not False


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
