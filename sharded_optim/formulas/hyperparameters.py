"""Hyperparameters: the values of a param group that change what a step computes. An optimizer declares each of its own once.

By what is declared they are checked (where groups are made, before a step, when something is loaded), compared between ranks, and accepted
by the training job's config. A class declares `hyperparameters = (*Engine.hyperparameters, Float("eps"), ...)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from torch import Tensor

from sharded_optim.formulas.weight_decay import FORMS

__all__ = [
    "COMMON",
    "Choice",
    "Float",
    "Floats",
    "Hyperparameter",
    "Int",
    "LearningRate",
    "Switch",
    "Unsupported",
    "by_name",
    "comparable",
    "on_host",
]

LR_ROUNDING = 1e-12
LARGEST_EXACT = 2**53  # of integers as floats


@dataclass(frozen=True)
class Hyperparameter:
    """A value of any kind: a finite number, a string, or a list or dict of them. Subclasses allow less.

    Attributes:
        name: its key in param groups.
        compared: whether ranks that agree on a step must have the same value.
    """

    name: str
    compared: bool = field(default=True, kw_only=True)

    @property
    def rule(self) -> str:
        """The rule for values, in words for error messages."""
        return "a finite number, a string, or a list or dict of them"

    def accepts(self, value: Any) -> bool:
        """Return whether a value that the host knows follows the rule, or raise an arithmetic, type, value or runtime error."""
        return all(map(math.isfinite, _numbers_in(comparable(value))))

    def check(self, value: Any, where: str = "", *, scheduled: bool = False) -> None:
        """Raise ValueError unless a step can use the value. Does not wait for a device.

        Args:
            where: where the value stands, for the error.
            scheduled: it may come from a scheduler.
        """
        parts = value if isinstance(value, list | tuple) else (value,)
        there = next((each.device for each in parts if isinstance(each, Tensor) and not each.is_cpu), None)
        if there is not None:
            raise ValueError(f"{self.name} must be known on the host, got a tensor on {there}{_in(where)}: only lr may lie on a device")
        try:
            accepted = self.accepts(on_host(value))
        except (ArithmeticError, TypeError, ValueError, RuntimeError):
            accepted = False
        if not accepted:
            raise ValueError(f"{self.name} must be {self.rule}, got {value!r}{_in(where)}")


@dataclass(frozen=True)
class Float(Hyperparameter):
    """A finite number in [least, below)."""

    least: float = 0.0
    below: float = math.inf

    @property
    def rule(self) -> str:
        if self.below < math.inf:
            return f"a number in [{self.least:g}, {self.below:g})"
        return "a finite number" if self.least == -math.inf else f"a finite number >= {self.least:g}"

    def accepts(self, value: Any) -> bool:
        number = math.nan if isinstance(value, str) else float(value)
        return math.isfinite(number) and self.least <= number < self.below


@dataclass(frozen=True)
class LearningRate(Float):
    """A finite number >= 0, or a tensor of one element, which alone may lie on a device.

    Attributes:
        optional: whether it may be None.
    """

    optional: bool = False

    def check(self, value: Any, where: str = "", *, scheduled: bool = False) -> None:
        if value is None and self.optional:
            return
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"a tensor {self.name} must have one element, got shape {tuple(value.shape)}{_in(where)}")
            if not value.is_cpu:
                return
        number = on_host(value)
        if scheduled and isinstance(number, Real) and -LR_ROUNDING < float(number) < 0:
            return  # CosineAnnealingLR rounds to just below 0 at its end
        super().check(value, where)


@dataclass(frozen=True)
class Floats(Hyperparameter):
    """A list or tuple of numbers in [least, below); exactly `count` of them if it is given."""

    least: float = 0.0
    below: float = 1.0
    count: int | None = None

    @property
    def rule(self) -> str:
        return f"numbers in [{self.least:g}, {self.below:g})" + ("" if self.count is None else f", {self.count} of them")

    def accepts(self, value: Any) -> bool:
        each = Float(self.name, self.least, self.below)
        return isinstance(value, list | tuple) and self.count in (None, len(value)) and bool(value) and all(map(each.accepts, value))


@dataclass(frozen=True)
class Switch(Hyperparameter):
    """True or False; None is False, or a default that depends on other hyperparameters."""

    @property
    def rule(self) -> str:
        return "True or False"

    def accepts(self, value: Any) -> bool:
        return value is None or value in (False, True)


@dataclass(frozen=True)
class Unsupported(Switch):
    """A switch of other libraries that must be off.

    Attributes:
        by: who does not support it; "" for the whole library.
        way_out: what to do instead.
    """

    by: str = ""
    way_out: str = "leave it out"
    compared: bool = field(default=False, kw_only=True)

    def check(self, value: Any, where: str = "", *, scheduled: bool = False) -> None:
        if value:
            by = f" by {self.by}" if self.by else ""
            raise ValueError(f"{self.name}={value!r} is not supported{by}{_in(where)}; {self.way_out}")


@dataclass(frozen=True)
class Choice(Hyperparameter):
    """One of several strings."""

    options: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        return f"one of {', '.join(self.options)}"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.options


@dataclass(frozen=True)
class Int(Hyperparameter):
    """An integer of any sign."""

    @property
    def rule(self) -> str:
        return "a whole number"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, Real) and value % 1 == 0


COMMON: tuple[Hyperparameter, ...] = (  # of every optimizer
    LearningRate("lr"),
    LearningRate("max_lr", optional=True, compared=False),  # read when a group is added; schedulers write it later
    Float("weight_decay"),
    Choice("decay_form", FORMS),
    Float("reference_lr"),
    Switch("learns_reference_lr"),
    Switch("kahan_sum"),
    Switch("stochastic_rounding"),
    Int("rounding_seed"),
    Unsupported("maximize", way_out="negate the loss"),  # torch's; others of its keys do not change the result
    Unsupported("differentiable", way_out="autograd cannot follow a step of this library; use torch.optim"),
)


def by_name(declared: Iterable[Hyperparameter]) -> dict[str, Hyperparameter]:
    """Index hyperparameters by name. The last one of a name counts, so that a class may narrow what it inherits."""
    return {each.name: each for each in declared}


def on_host(value: Any) -> Any:
    """Convert a one-element tensor that the host knows to a number; return anything else as it is."""
    return value.detach().reshape(()).tolist() if isinstance(value, Tensor) and value.numel() == 1 and value.is_cpu else value


def comparable(value: Any) -> Any:
    """Convert a hyperparameter to numbers, strings and lists of them, which are equal on two ranks if the values are.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, Tensor) and not value.is_cpu:
        return -1.0  # a device's is not waited for
    if isinstance(value, list | tuple):
        return list(map(comparable, value))
    if isinstance(value, dict):
        return [[key, comparable(value[key])] for key in sorted(value)]
    value = value.tolist() if hasattr(value, "tolist") else value  # of torch and NumPy: numbers, or lists of them
    if value is None or isinstance(value, str | list):
        return value
    if isinstance(value, int) and abs(value) > LARGEST_EXACT:
        return value
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{type(value).__name__} cannot be compared between ranks")


def _numbers_in(values: Any) -> Iterator[float]:
    if isinstance(values, list):
        for item in values:
            yield from _numbers_in(item)
    elif values is not None and not isinstance(values, str):
        yield values


def _in(where: str) -> str:
    return f" in {where}" if where else ""
