"""Whether DistributedDataParallel averages gradients already."""

from __future__ import annotations

from collections.abc import Iterable

from sharded_optim.sharding.ddp import averaged_params, ddp_modules
from sharded_optim.zero.bucket import Home

__all__ = ["are_under_ddp"]


def are_under_ddp(homes: Iterable[Home]) -> bool:
    """Whether DistributedDataParallel averages the gradients.

    Raises:
        ValueError: it averages those of some of the parameters.
    """
    homes = list(homes)
    averaged = averaged_params(ddp_modules())
    inside = [id(home.param) in averaged for home in homes]
    if any(inside) and not all(inside):
        without = next(home.name for home, is_inside in zip(homes, inside, strict=True) if not is_inside)
        raise ValueError(
            f"DistributedDataParallel averages the gradients of some parameters, but not that of {without!r}; give what it does not "
            f"average to an optimizer of its own"
        )
    return any(inside)
