"""Estimate for every way of sharding the memory by kind, the bytes sent in a step, and the time at given rates.

Estimates are arithmetic on shapes, as fast for 65,536 ranks as for one. Memory is that of the rank that holds most. Tensors that exist at
different times of a step are added up, so a total is at least the peak. Unknown values are None, with a reason; they are never guessed.
Used by the command `sharded-optim plan`.

`setup.py` has the settings of a run, `shardings.py` every way of sharding; `case.py` makes a `Plan` of these, with `memory.py` and, for
Muon, `matrices.py`. `workload.py` has operations and activations of forward and backward, which `trace.py` counts on the meta device;
`time.py` converts a plan to seconds at given rates.
"""

from __future__ import annotations

from sharded_optim.tools.plan.case import Plan
from sharded_optim.tools.plan.memory import KINDS
from sharded_optim.tools.plan.setup import DTYPES, MASTERS, OPTIMIZERS, Setup
from sharded_optim.tools.plan.shardings import SHARDINGS, compare, plan
from sharded_optim.tools.plan.time import Rates, Time, time_of
from sharded_optim.tools.plan.trace import CHECKPOINTING
from sharded_optim.tools.plan.workload import Attention, Workload, measure

__all__ = [
    "CHECKPOINTING",
    "DTYPES",
    "KINDS",
    "MASTERS",
    "OPTIMIZERS",
    "SHARDINGS",
    "Attention",
    "Plan",
    "Rates",
    "Setup",
    "Time",
    "Workload",
    "compare",
    "measure",
    "plan",
    "time_of",
]
