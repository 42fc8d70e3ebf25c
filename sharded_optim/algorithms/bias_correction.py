"""Bias correction of exponential moving averages (Adam, Kingma & Ba 2015, section 3): a moment divided by 1 - beta^t."""

from __future__ import annotations

from sharded_optim.algorithms.scalars import Number, Step, power

__all__ = ["bias_correction"]


def bias_correction(beta: float, step: Step) -> Number:
    """1 - beta**step, in float64.

    Args:
        beta: decay of the moving average, in [0, 1).
        step: 1 in the first step; an int, an int64 tensor of steps, or recorded. All give the same bits.
    """
    return 1.0 - power(beta, step)
