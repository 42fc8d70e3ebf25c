"""Memory of a rank by kind, and the bytes that a step moves for each element."""

from __future__ import annotations

from dataclasses import dataclass

from sharded_optim.formulas import Algorithm
from sharded_optim.storage.formats import FORMATS
from sharded_optim.tools.plan.setup import FP32, Setup

__all__ = ["KINDS", "Memory", "stepped_itemsize"]

KINDS = ("parameters", "gradients", "moments", "masters", "buckets")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of memory by kind, on the rank that holds most."""

    parameters: int  # between steps
    gradients: int  # after backward
    moments: int  # without the step counters, 4 bytes for each tensor
    masters: int  # or Kahan compensations
    buckets: int  # peak of all other buffers: DDP's copies, gathered parameters, gradients being reduced
    activations: int | None  # peak of activations and other tensors of forward and backward; None: unknown

    @property
    def total(self) -> int:
        """Bytes of all known kinds."""
        return sum(getattr(self, kind) for kind in KINDS) + (self.activations or 0)


def stepped_itemsize(
    setup: Setup,
    algorithm: Algorithm,
    grad: int,  # bytes of an element of the gradient
    *,
    steps_parameters: bool,  # whether the optimizer steps parameters, rather than masters
) -> int:
    """Return the bytes that a step moves for each element: it reads the gradient, and reads and writes the value and the moments."""
    value = 2 * (setup.itemsize + setup.master_itemsize)
    if setup.has_masters:
        value = 2 * FP32 + (0 if steps_parameters else setup.itemsize)  # parameters are only written, from their masters
    moved = grad + value + 2 * setup.moments_itemsize(algorithm)
    if algorithm.matrix is not None:
        moved += 2 * algorithm.matrix.dtype.itemsize  # the direction is written, and the result read
    if setup.agrees:
        moved += grad  # read once more, to check that it is finite; a statistic also reads the second moment
    return moved + (FORMATS[setup.state_dtype].itemsize if algorithm.statistic is not None else 0)
