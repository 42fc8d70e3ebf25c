"""Means over seeds with confidence intervals. Both experiments use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

__all__ = ["Interval", "interval"]

# Quantiles 0.975 of Student's t, by degrees of freedom from 1; beyond the last, the normal distribution's is 5 % smaller or less.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101)
STUDENT_T += (2.093, 2.086)
NORMAL = 1.960


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the half width of its 95 % confidence interval; the half width of a single value is infinite."""

    mean: float
    half_width: float

    @property
    def positive(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.mean - self.half_width > 0

    def holds(self, value: float) -> bool:
        """Return whether `value` is in the interval."""
        return abs(value - self.mean) <= self.half_width

    def text(self, digits: int = 2) -> str:
        """Return it as '1.23 ± 0.04'."""
        return f"{round(self.mean, digits) + 0.0:.{digits}f} ± {self.half_width:.{digits}f}"  # + 0.0: not -0.00


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values with its 95 % interval by Student's t."""
    count = len(values)
    if count == 1:
        return Interval(mean=values[0], half_width=math.inf)
    quantile = STUDENT_T[count - 2] if count - 2 < len(STUDENT_T) else NORMAL
    return Interval(mean=mean(values), half_width=quantile * stdev(values) / math.sqrt(count))
