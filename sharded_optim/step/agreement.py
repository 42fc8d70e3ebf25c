"""The all-reduce of a step: its input vector, its result, and the errors that the result implies.

Every rank contributes one int64 vector with two values for each tensor of the model, and one all-reduce sums the vectors. They carry the
statistics, non-finite gradients, disagreements between ranks, and bad input. Errors are raised on every rank: in the same step if the host
has the sums, one step later if only the device has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.backends import AgreementFunctions
from sharded_optim.formulas import verdict
from sharded_optim.formulas.scalars import Sums, mean
from sharded_optim.formulas.verdict import (
    DIFFERENCE,
    FOUND_INF,
    INVALID,
    NON_FINITE,
    NON_FINITE_PIECE,
    REPLACES,
    SECTIONS,
    TAIL,
    TOTAL,
    Verdict,
)
from sharded_optim.sharding.layout import Layout, Slots
from sharded_optim.sharding.ranks import gather_messages, naming_missing_ranks
from sharded_optim.step.disagreement import inconsistency, non_finite, skipped_in_a_row
from sharded_optim.step.options import NonFinite
from sharded_optim.step.statistics import Contribution, FixedPoint
from sharded_optim.storage.devices import capturing, known_on_host, on, send

__all__ = ["Agreement", "Rules", "Scaler", "Streak", "agree", "confirm_replacement"]

_numbers = count()


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The options of an optimizer that determine what the ranks agree on in a step."""

    agrees: bool  # whether a step has an all-reduce
    nonfinite: NonFinite
    max_skipped_steps: int | None
    state_format: str  # name of the moments' storage format

    @cached_property
    def options(self) -> tuple[tuple[str, NonFinite | int | str | None], ...]:
        """(name, value) of the options that must be the same on all ranks."""
        return ("nonfinite", self.nonfinite), ("max_skipped_steps", self.max_skipped_steps), ("state_dtype", self.state_format)

    @cached_property
    def longest_streak(self) -> int | None:
        """The number of consecutive steps that may be skipped; None means any number."""
        return self.max_skipped_steps if self.nonfinite == "skip" else None


@dataclass(frozen=True)
class Scaler:
    """The attributes that GradScaler sets on an optimizer during a step. Only this class reads them."""

    scale: Tensor | None = None  # the factor that the gradients are still multiplied by; one element
    found_inf: Tensor | None = None  # nonzero if a gradient was not finite; one element

    @classmethod
    def of(cls, optimizer: Any) -> Scaler:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and not isinstance(found_inf, Tensor):  # a plain number on a rank without gradients
            found_inf = torch.tensor(float(found_inf), device="cpu")
        scale = getattr(optimizer, "grad_scale", None)
        return NO_SCALER if scale is None and found_inf is None else cls(scale, found_inf)

    def inverse(self, device: torch.device) -> Tensor | None:
        """Return the factor that unscales the gradients: fp32 () on the device; None if they are not scaled."""
        return None if self.scale is None else self.scale.to(device).double().reciprocal().float().reshape(())


NO_SCALER = Scaler()


@dataclass
class Streak:
    """Counts consecutive steps that were skipped because a gradient was not finite.

    A step skipped for another reason, such as an inf that GradScaler found outside these gradients, neither extends nor ends the streak.
    """

    length: int = 0
    first: Tensor | None = None  # int64 (tensors,): number of non-finite pieces of each tensor in the first skipped step

    def count(self, agreement: Agreement, *, finite: bool, no_inf: bool) -> None:
        """Extend the streak by a non-finite step, or end it with one that was not skipped."""
        if not finite:
            self.first = self.first if self.length else agreement.non_finite_pieces()
            self.length += 1
        elif no_inf:
            self.end()

    def end(self) -> None:
        """Reset the streak to 0."""
        self.length, self.first = 0, None


class Agreement:
    """The result of the all-reduce: the same on every rank, except for `contributions`.

    Attributes:
        totals: the vector summed over ranks: int64 (SECTIONS * number of tensors + TAIL,); see `formulas/verdict.py`.
        contributions: this rank's contributions.
        verdict: the decision whether the step happens.
        is_on_host: whether the result can be read without waiting for a device.
        number: a sequence number, which increases with every agreement.
    """

    def __init__(self, layout: Layout, totals: Tensor, contributions: Sequence[Contribution], verdict: Verdict, rules: Rules) -> None:
        self.layout = layout
        self.totals = totals
        self.contributions = contributions
        self.verdict = verdict
        self.is_on_host = known_on_host(totals)
        self.number = next(_numbers)
        self._rules = rules
        self._flags = _HostCopy(verdict.flags)

    def named_means(self) -> dict[str, float]:
        """Return the mean of the statistic by tensor name, for tensors with a statistic and a gradient. Waits for the device."""
        summed = (self._bits_plus_1() > 1).tolist()
        return {name: mean for name, mean, has in zip(self.layout.names, self.means().tolist(), summed, strict=True) if has}

    def means(self) -> Tensor:
        """Return the mean of the statistic over every tensor of the model: float64 (number of tensors,); NaN where not finite."""
        k = (self._bits_plus_1() - 1).clamp(min=0)
        unit = ((1023 - k) << 52).view(torch.float64)  # 2.0**-k from its bit pattern: exp2 and pow need not be exact
        numels = self.layout.tensor_numels(self.totals.device)
        means = mean(self._row(TOTAL).to(torch.float64), unit, numels, self._row(NON_FINITE))
        assert isinstance(means, Tensor)
        return means

    def non_finite_pieces(self) -> Tensor:
        """Return the number of non-finite pieces of every tensor, over all ranks: int64 (number of tensors,)."""
        return (self._row(NON_FINITE) + self._bits_plus_1()) // NON_FINITE_PIECE

    def has_gradients(self) -> bool:
        """Return whether any tensor had a gradient. Waits for the device."""
        return bool((self._bits_plus_1() > 0).any())

    def _bits_plus_1(self) -> Tensor:
        """Return 1 + the fraction bits of every tensor's statistic: int64 (tensors,); 1 without a statistic, 0 without a gradient."""
        return -self._row(NON_FINITE) % NON_FINITE_PIECE

    def sums(self, places: Slots, fixed_point: FixedPoint) -> Sums:
        """Return the sums over all ranks for the tensors that contain these pieces of this rank."""
        vector = self.totals
        if vector.device != places.slots.device:  # parameters may be on several devices
            vector = vector.to(places.slots.device)
        units, numels = fixed_point.units, fixed_point.numels
        return Sums(vector=vector, tensors=len(self.layout.names), slots=places.slots, units=units, numels=numels)

    def _row(self, number: int) -> Tensor:
        """Return a row of the vector, numbered as in `formulas/verdict.py`: int64 (number of tensors,), a view."""
        return self.totals[:-TAIL].view(SECTIONS, -1)[number]

    def raise_inconsistency(self, failure: Exception | None) -> None:
        """Raise ValueError on every rank if the ranks are inconsistent. If only the device has the result, raise on the failed ranks alone.

        Args:
            failure: the error that kept this rank from contributing; None if it contributed.
        """
        if not self.is_on_host:
            if failure is not None:
                raise failure
            return
        if failure is None and self._flags.read()[0]:
            return
        if failure is not None or self.totals[INVALID].tolist() or self.totals[REPLACES].tolist():
            raise ValueError(gather_messages(failure, self.layout.process_group)) from failure
        raise ValueError(inconsistency(self.layout, self.totals, self.contributions))

    def raise_non_finite(self) -> None:
        """Raise FloatingPointError on every rank if a gradient was not finite. Waits for the device, to raise in the same step."""
        if capturing(self.totals.device):
            raise ValueError("nonfinite='raise' waits for each step, which a CUDA graph cannot record; use nonfinite='skip'")
        if not self._flags.read()[1]:
            raise FloatingPointError(non_finite(self.layout, self.contributions))

    def raise_pending(self, streak: Streak) -> None:
        """Read the verdict and raise its errors on every rank: inconsistent ranks, or too many consecutive skipped steps.

        On a device this runs when the next step begins, the same step on all ranks. By then a forward and a backward pass are queued
        behind the verdict, so the device stays busy while the host waits.

        Raises:
            ValueError: the ranks were inconsistent.
            FloatingPointError: the number of consecutive skipped steps has reached the limit.
        """
        consistent, finite, no_inf = self._flags.read()
        if not consistent:
            raise ValueError(inconsistency(self.layout, self.totals, self.contributions))
        longest = self._rules.longest_streak
        if longest is None:
            streak.end()
            return
        if not finite or streak.length:
            streak.count(self, finite=bool(finite), no_inf=bool(no_inf))
        if not finite and streak.length >= longest:
            assert streak.first is not None, "count sets it with the first skipped step"
            raise FloatingPointError(skipped_in_a_row(streak.length, streak.first, self.layout, self.contributions))


class _HostCopy:
    """An asynchronous copy of a small tensor to the host, read later, when it has usually arrived."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        self._read: list[int] | None = None
        if not known_on_host(values) and not capturing(values.device):
            self._values = values.to("cpu", non_blocking=True)
            self._copied = torch.Event(values.device)
            with on(values.device):
                self._copied.record()

    def read(self) -> list[int]:
        if self._read is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._read = self._values.tolist()
        return self._read


def agree(
    layout: Layout,  # the layout of all ranks
    contributions: Sequence[Contribution],  # for the pieces of all local parameters that have a gradient
    rules: Rules,
    *,
    invalid: bool = False,  # this rank had bad input
    replaces: bool = False,  # this rank's parameters are no longer those of the layout
    found_inf: Tensor | None = None,  # GradScaler's flag; any shape with one element
    device: torch.device | None = None,  # device of the all-reduce; None: the layout's
    backend: AgreementFunctions = verdict,  # the implementation for this device
) -> Agreement:
    """Sum all ranks' contributions in one all-reduce. Every rank of the group must call it, even with nothing to contribute."""
    device = layout.device if device is None else device
    vector = _contributed(layout, contributions, device, backend, invalid=invalid, replaces=replaces)
    if found_inf is not None:
        vector[FOUND_INF] = (found_inf.to(vector.device) != 0).reshape(())
    process_group = layout.process_group
    if process_group is not None:
        with naming_missing_ranks(process_group, f"a step of {layout.described_by_name}"):
            dist.all_reduce(vector, group=process_group)
    return Agreement(layout, vector, contributions, backend.judge(vector, skips=rules.nonfinite == "skip"), rules)


def _contributed(
    layout: Layout,
    contributions: Sequence[Contribution],
    device: torch.device,
    backend: AgreementFunctions,
    *,
    invalid: bool,
    replaces: bool,
) -> Tensor:
    """Build this rank's vector: int64 (SECTIONS * number of tensors + TAIL,) on the device."""
    tensors = len(layout.names)

    def make() -> Tensor:
        host = torch.zeros(SECTIONS * tensors + TAIL, dtype=torch.int64, device="cpu")
        for each in contributions:
            firsts = each.places.first_slots
            host[NON_FINITE * tensors + firsts[firsts >= 0]] = -1 - each.fixed_point.bits[firsts >= 0].clamp(min=0)
        return send(host, device)

    # Cloned, because the cached vector is added to below.
    vector = layout.sent.of([(each.places, each.fixed_point) for each in contributions], device, make).clone()
    for each in contributions:
        inputs = (each.observed, each.places.counted, each.places.slots)
        if each.observed.device != device:  # parameters may be on several devices
            inputs = tuple(tensor.to(device) for tensor in inputs)
        backend.contribute(vector, *inputs)
        if each.difference:
            vector[DIFFERENCE] += each.difference
    for index, flag in ((INVALID, invalid), (REPLACES, replaces)):
        if flag:
            vector[index] = 1
    return vector


def confirm_replacement(layout: Layout, change: str, rules: Rules, device: torch.device) -> None:
    """Confirm that all ranks replace the same layout. Other ranks may still be stepping it, so this is the all-reduce of such a step.

    Waits for the device, which is acceptable because parameters rarely change.

    Args:
        layout: the layout of all ranks that this rank replaces.
        change: how this rank's parameters differ from it, for the error.
        device: the device of this rank's parameters.

    Raises:
        ValueError: some ranks still use the layout. Raised on all ranks; on a device, the others raise one step later.
    """
    assert layout.process_group is not None, "only a layout of several ranks needs confirmation"
    agreement = agree(layout, (), rules, replaces=True, device=device)
    if int(agreement.totals[REPLACES]) == dist.get_world_size(layout.process_group):
        return
    message = (
        f"the parameters to step have changed since the last step, but not on all ranks: here they are {change}; add, remove or "
        f"replace parameters on every rank, before the same step"
    )
    raise ValueError(gather_messages(message, layout.process_group) if agreement.is_on_host else message)
