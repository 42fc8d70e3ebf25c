"""Detect whether DistributedDataParallel averages the gradients already."""

from __future__ import annotations

from collections.abc import Iterable

from sharded_optim.sharding.ddp import averaged_params, ddp_modules
from sharded_optim.zero.bucket import ParamSlot

__all__ = ["are_under_ddp"]


def are_under_ddp(slots: Iterable[ParamSlot]) -> bool:
    """Return whether DistributedDataParallel averages the gradients of these parameters.

    Raises:
        ValueError: it averages those of some of the parameters.
    """
    slots = list(slots)
    averaged = averaged_params(ddp_modules())
    inside = [id(slot.param) in averaged for slot in slots]
    if any(inside) and not all(inside):
        without = next(slot.name for slot, is_inside in zip(slots, inside, strict=True) if not is_inside)
        raise ValueError(
            f"DistributedDataParallel averages the gradients of some parameters, but not that of {without!r}; give the parameters that it "
            f"does not average to an optimizer of their own"
        )
    return any(inside)
