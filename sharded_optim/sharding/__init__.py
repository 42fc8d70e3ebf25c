"""From a wrapper's parameters to segments: one file per wrapper.

Each has `describe(param, name) -> LocalParam`; `describe` here picks by the parameter's type. `layout.py` puts the local parameters of all
ranks together.
"""

from __future__ import annotations

import sys

from torch import Tensor

from sharded_optim.sharding import plain
from sharded_optim.sharding.layout import Layout, LocalParam
from sharded_optim.sharding.plain import check_memory

__all__ = ["Layout", "LocalParam", "check_memory", "describe"]


def describe(param: Tensor, name: str) -> LocalParam:
    """What this rank holds of tensor `name`.

    Raises:
        ValueError: the parameter cannot be optimized, or its sharding cannot be expressed; names the tensor, the rule and the way out.
    """
    # Who holds a DTensor has imported its module; a single process need not pay for that import.
    if "torch.distributed.tensor" in sys.modules:
        from sharded_optim.sharding import dtensor

        if isinstance(param, dtensor.DTensor):
            return dtensor.describe(param, name)
    return plain.describe(param, name)
