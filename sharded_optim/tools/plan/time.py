"""Estimate the seconds of a step from a plan and rates: rates of its parts, or the utilization of the whole step (MFU)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sharded_optim.tools.plan.case import Plan

__all__ = ["Rates", "Time", "time_of"]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of compute, memory and links; None where unknown."""

    link: float | None = None  # bytes that a rank sends per second
    shard_link: float | None = None  # bytes per second inside of shard groups that are smaller than the world; None: as `link`
    memory: float | None = None  # bytes that a rank reads and writes per second
    flops: float | None = None  # FLOPs of a rank per second in forward and backward, recomputation included
    mfu: float | None = None  # model FLOPs of a whole step, as a fraction of those that `peak_flops` allows; instead of `flops`
    peak_flops: float | None = None  # peak FLOPs of a rank per second
    tokens: int | None = None  # tokens of a rank in a step

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"a rate is a finite number > 0, got {value} for {name}; leave it out if it is not known")
        if self.mfu is not None and self.mfu > 1:
            raise ValueError(f"model FLOPs utilization is a part of the peak, at most 1 (100 %), got {self.mfu}")
        if (self.mfu is None) != (self.peak_flops is None):
            raise ValueError(f"a utilization is of a peak, got {self.mfu} of {self.peak_flops} FLOP/s; give both")
        if self.mfu is not None and self.flops is not None:
            raise ValueError(
                f"utilization is of a whole step, FLOP/s of forward and backward, got {self.mfu} and {self.flops}; give one of them"
            )
        if (self.flops or self.mfu) is not None and self.tokens is None:
            raise ValueError("the time of forward and backward needs tokens and FLOP/s, got no tokens; give the tokens of a rank in a step")
        if self.shard_link is not None and self.link is None:
            raise ValueError("the link inside of shard groups is given beside the link of all ranks; give that too")


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of the parts of a step; None if a rate was not given."""

    communication: float | None
    optimizer: float | None
    matrices: float | None  # on the rank that computes most
    compute: float | None  # forward and backward
    whole: float | None = None  # seconds of the whole step, if the utilization is given

    @property
    def longest(self) -> float | None:
        """Seconds of a step if nothing overlaps: the sum of the known parts."""
        if self.whole is not None:
            return self.whole
        known = [part for part in (self.communication, self.optimizer, self.matrices, self.compute) if part is not None]
        return sum(known) if known else None

    @property
    def shortest(self) -> float | None:
        """Seconds of a step if communication overlaps completely with forward and backward."""
        if self.longest is None or self.whole is not None or self.compute is None or self.communication is None:
            return self.longest
        return max(self.compute, self.communication) + (self.optimizer or 0.0) + (self.matrices or 0.0)


def time_of(plan: Plan, rates: Rates) -> Time:
    """Estimate the time of a step at these rates, without latencies.

    Raises:
        ValueError: a utilization is given, but the model FLOPs of the plan are unknown.
    """
    communication = compute = matrices = whole = None
    if rates.link is not None:
        inside = rates.shard_link or rates.link
        communication = sum(each.sent / (inside if each.in_shard_group else rates.link) for each in plan.collectives)
    if rates.tokens is not None and rates.flops is not None:
        compute = plan.flops_per_token * rates.tokens / rates.flops
        matrices = plan.matrix_flops / rates.flops if plan.matrix_flops else None
    if rates.tokens is not None and rates.mfu is not None and rates.peak_flops is not None:
        if plan.workload.model_flops is None:
            raise ValueError(f"MFU counts the operations of attention, which are unknown: {plan.workload.unknown['attention']}")
        whole = plan.workload.model_flops * rates.tokens / (rates.mfu * rates.peak_flops)
    optimizer = None if rates.memory is None else plan.stepped / rates.memory
    return Time(communication=communication, optimizer=optimizer, matrices=matrices, compute=compute, whole=whole)
