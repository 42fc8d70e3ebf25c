"""Classes whose options add state, for tests that take classes."""

from __future__ import annotations

import sharded_optim as so


class AmsgradAdamW(so.DecoupledAdamW):
    def __init__(self, params, lr, **options) -> None:
        super().__init__(params, lr, amsgrad=True, **options)


class MomentumSGDW(so.DecoupledSGDW):
    """With the strangest first step: it alone is not dampened."""

    def __init__(self, params, lr, **options) -> None:
        super().__init__(params, lr, **({"momentum": 0.9, "dampening": 0.1} | options))
