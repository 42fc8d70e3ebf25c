"""Bias correction of exponential moving averages (Adam, Kingma & Ba 2015, section 3): a moment divided by 1 - beta^t.

beta^t is computed by repeated squaring in float64. IEEE multiplication gives the same bits everywhere, a library's `pow` does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sharded_optim.algorithms import Number

__all__ = ["bias_correction"]

STEP_BITS = 25  # steps are counted in float32, as torch does: exact up to 2**24


def bias_correction(beta: float, step: int | Tensor) -> Number:
    """1 - beta**step, in float64.

    Args:
        beta: decay of the moving average, in [0, 1).
        step: 1 in the first step; an int, or an int64 tensor of steps. Both give the same bits.
    """
    return 1.0 - (_power_of_tensor(beta, step) if isinstance(step, Tensor) else _power_of_int(beta, step))


def _power_of_int(base: float, exponent: int) -> float:
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _power_of_tensor(base: float, exponent: Tensor) -> Tensor:
    result = torch.ones(exponent.shape, dtype=torch.float64, device=exponent.device)
    for bit in range(STEP_BITS):
        result = torch.where((exponent >> bit) & 1 == 1, result * base, result)
        base *= base
    return result
