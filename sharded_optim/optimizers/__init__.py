"""The public optimizers, a file for each: math, hyperparameters and class. The rest of the library gets them from `OPTIMIZERS`.

To add one, write its file, import its class here and list it in `__all__`. Options that all optimizers share are documented once, in
`CommonOptions`, `EngineOptions` and `SwitchOptions`; `spelled_out` copies them into each class's docstring and signature.
"""

from __future__ import annotations

from collections.abc import Mapping

from sharded_optim.optimizers.adam import Adam
from sharded_optim.optimizers.adamw import AdamW
from sharded_optim.optimizers.decoupled_adamw import DecoupledAdamW
from sharded_optim.optimizers.muon import Muon
from sharded_optim.optimizers.sgd import DecoupledSGDW
from sharded_optim.optimizers.stable_adamw import StableAdamW
from sharded_optim.step.engine import Engine

__all__ = ["Adam", "AdamW", "DecoupledAdamW", "DecoupledSGDW", "Muon", "StableAdamW"]

OPTIMIZERS: Mapping[str, type[Engine]] = {name: globals()[name] for name in __all__}
