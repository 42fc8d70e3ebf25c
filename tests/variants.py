"""What tests run over: classes whose options add state, the backends of a CPU, and examples."""

from __future__ import annotations

from hypothesis import settings

import sharded_optim as so
from sharded_optim.backends import MODULES

CPU_BACKENDS = tuple(name for name in MODULES if name != "triton")  # which has tests of its own, in its interpreter


def examples(count: int) -> int:
    """How many Hypothesis draws where `count` are enough for each run of the tests: more of them with --matrix."""
    return count * settings().max_examples // settings.get_profile("default").max_examples


class AmsgradAdamW(so.DecoupledAdamW):
    def __init__(self, params, lr, **options) -> None:
        super().__init__(params, lr, amsgrad=True, **options)


class MomentumSGDW(so.DecoupledSGDW):
    """With the strangest first step: it alone is not dampened."""

    def __init__(self, params, lr, **options) -> None:
        super().__init__(params, lr, **({"momentum": 0.9, "dampening": 0.1} | options))
