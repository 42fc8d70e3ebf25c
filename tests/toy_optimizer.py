"""A new optimizer, as its one file would be: StableAdamW whose clipping begins at another RMS than 1.

lr' = lr / max(1, RMS / threshold)          RMS as of StableAdamW
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from sharded_optim.formulas.hyperparameters import Float
from sharded_optim.formulas.scalars import Number, divide, maximum, sqrt
from sharded_optim.formulas.weight_decay import COUPLED
from sharded_optim.optimizers import stable_adamw
from sharded_optim.optimizers.stable_adamw import STABLE_ADAMW
from sharded_optim.step.engine import Engine
from sharded_optim.step.options import Params, SwitchOptions

__all__ = ["THRESHOLD_ADAMW", "ThresholdAdamW"]


def lr_scale(group: Mapping[str, Any], mean: Number) -> Number:
    return divide(1.0, maximum(divide(sqrt(mean), group["threshold"]), 1.0))


assert STABLE_ADAMW.statistic is not None
THRESHOLD_ADAMW = replace(STABLE_ADAMW, name="threshold_adamw", statistic=replace(STABLE_ADAMW.statistic, lr_scale=lr_scale))


class ThresholdAdamW(Engine):
    """AdamW with the learning rate of each tensor divided by max(1, RMS of its update / threshold).

    Args:
        params, lr, betas, weight_decay: as of StableAdamW.
        eps: likewise, but at least 1e-12.
        threshold: RMS from which on a learning rate is lowered.
        options: see `EngineOptions` and `SwitchOptions`.
    """

    hyperparameters = (
        *stable_adamw.StableAdamW.hyperparameters,
        Float("threshold", least=1e-3),
        Float("eps", least=1e-12),  # StableAdamW's may be 0
    )
    algorithms: ClassVar = {"": THRESHOLD_ADAMW}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        eps: float = 1e-6,
        threshold: float = 1.0,
        **options: Unpack[SwitchOptions],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "threshold": threshold, "decay_form": COUPLED}
        super().__init__(params, defaults, algorithm=lambda group: THRESHOLD_ADAMW, **options)
