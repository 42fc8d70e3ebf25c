"""Whether DistributedDataParallel averages gradients already."""

from __future__ import annotations

import gc
from collections.abc import Iterable

from torch.nn.parallel import DistributedDataParallel

from sharded_optim.zero.bucket import Home

__all__ = ["are_under_ddp"]


def are_under_ddp(homes: Iterable[Home]) -> bool:
    """Whether DistributedDataParallel averages the gradients. It leaves no mark on parameters, so it is looked for among all objects.

    Raises:
        ValueError: it averages those of some of the parameters.
    """
    averaged = {
        id(param)
        for each in gc.get_objects()
        if DistributedDataParallel in type(each).__mro__  # issubclass is slow on half a million objects
        for name, param in each.module.named_parameters()
        if name not in each.parameters_to_ignore
    }
    inside = [id(home.param) in averaged for home in homes]
    if any(inside) and not all(inside):
        without = next(home.name for home, is_inside in zip(homes, inside, strict=True) if not is_inside)
        raise ValueError(
            f"DistributedDataParallel averages the gradients of some parameters, but not that of {without!r}; give what it does not "
            f"average to an optimizer of its own"
        )
    return any(inside)
