"""Declarations of hyperparameters: the values of a param group that change the result of a step.

The declarations determine how values are checked (at construction, before a step and on loading), compared between ranks, and accepted by
the training job's config. An optimizer class declares each once: `hyperparameters = (*Engine.hyperparameters, Float("eps"), ...)`.
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

LR_ROUNDING = 1e-12  # schedulers may round a learning rate of 0 to a negative number above -LR_ROUNDING
LARGEST_EXACT = 2**53  # float64 represents all integers up to this one


@dataclass(frozen=True)
class Hyperparameter:
    """A hyperparameter of any type: a finite number, a string, or a list or dict of them. Subclasses are stricter.

    Attributes:
        name: its key in param groups.
        compared: whether all ranks of a step must have the same value.
    """

    name: str
    compared: bool = field(default=True, kw_only=True)

    @property
    def rule(self) -> str:
        """The rule for values, as text for error messages."""
        return "a finite number, a string, or a list or dict of them"

    def accepts(self, value: Any) -> bool:
        """Return whether a value on the host follows the rule. May raise an arithmetic, type, value or runtime error if it does not."""
        return all(map(math.isfinite, _numbers_in(comparable(value))))

    def check(self, value: Any, where: str = "", *, scheduled: bool = False) -> None:
        """Raise ValueError unless a step can use the value. Does not wait for a device.

        Args:
            where: description of the param group or argument with the value, for the error.
            scheduled: whether the value may come from a scheduler.
        """
        parts = value if isinstance(value, list | tuple) else (value,)
        device = next((each.device for each in parts if isinstance(each, Tensor) and not each.is_cpu), None)
        if device is not None:
            raise ValueError(f"{self.name} must be on the host, got a tensor on {device}{_in(where)}: only lr may be on a device")
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
    """A finite number >= 0, or a one-element tensor: the only hyperparameter that may be on a device.

    Attributes:
        optional: whether None is allowed.
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
            return  # CosineAnnealingLR ends at a rounding error below 0
        super().check(value, where)


@dataclass(frozen=True)
class Floats(Hyperparameter):
    """A non-empty list or tuple of numbers in [least, below); of exactly `count` numbers unless it is None."""

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
    """True or False. None means False, or a default that depends on other hyperparameters."""

    @property
    def rule(self) -> str:
        return "True or False"

    def accepts(self, value: Any) -> bool:
        return value is None or value in (False, True)


@dataclass(frozen=True)
class Unsupported(Switch):
    """A switch of other libraries that must be off.

    Attributes:
        by: name of the class that does not support it; "" for the whole library.
        way_out: the remedy, for the error message.
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
    """An integer, positive or negative."""

    @property
    def rule(self) -> str:
        return "a whole number"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, Real) and value % 1 == 0


COMMON: tuple[Hyperparameter, ...] = (  # hyperparameters of every optimizer
    LearningRate("lr"),
    LearningRate("max_lr", optional=True, compared=False),  # read when a group is added; schedulers write it later
    Float("weight_decay"),
    Choice("decay_form", FORMS),
    Float("reference_lr"),
    Switch("learns_reference_lr"),
    Switch("kahan_sum"),
    Switch("stochastic_rounding"),
    Int("rounding_seed"),
    Unsupported("maximize", way_out="negate the loss"),  # torch's keys; its other keys do not change the result
    Unsupported("differentiable", way_out="autograd cannot follow a step of this library; use torch.optim"),
)


def by_name(declared: Iterable[Hyperparameter]) -> dict[str, Hyperparameter]:
    """Index hyperparameters by name. The last declaration of a name wins, so that a class can override an inherited one."""
    return {each.name: each for each in declared}


def on_host(value: Any) -> Any:
    """Convert a one-element CPU tensor to a number; return anything else unchanged."""
    return value.detach().reshape(()).tolist() if isinstance(value, Tensor) and value.numel() == 1 and value.is_cpu else value


def comparable(value: Any) -> Any:
    """Convert a hyperparameter to numbers, strings and lists of them, whose text is equal on two ranks if the values are equal.

    Raises:
        TypeError: the value has another type.
    """
    if isinstance(value, Tensor) and not value.is_cpu:
        return -1.0  # placeholder: reading a device tensor would wait
    if isinstance(value, list | tuple):
        return list(map(comparable, value))
    if isinstance(value, dict):
        return [[key, comparable(value[key])] for key in sorted(value)]
    value = value.tolist() if hasattr(value, "tolist") else value  # torch and NumPy: numbers, or lists of them
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
