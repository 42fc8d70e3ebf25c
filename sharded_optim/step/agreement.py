"""The only collective of a step: its contents, the meaning of its result, and the errors that follow from it.

Every rank contributes one int64 vector, two values for each tensor of the model, and one all-reduce adds them up: sums of the statistic,
where a gradient was not finite, and whether ranks differ or one met bad input. An error is raised on every rank: in the same step where the
host knows the sums, one step later where only a device does.
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
    """The options of an optimizer that decide what ranks agree on in a step."""

    agrees: bool  # whether a step is a collective
    nonfinite: NonFinite
    max_skipped_steps: int | None
    state_format: str  # the name of the moments' format

    @cached_property
    def options(self) -> tuple[tuple[str, NonFinite | int | str | None], ...]:
        """Names and values of the options that must be the same on all ranks."""
        return ("nonfinite", self.nonfinite), ("max_skipped_steps", self.max_skipped_steps), ("state_dtype", self.state_format)

    @cached_property
    def longest_streak(self) -> int | None:
        """The number of consecutive steps that may be skipped; None means any number."""
        return self.max_skipped_steps if self.nonfinite == "skip" else None


@dataclass(frozen=True)
class Scaler:
    """The values that GradScaler sets on an optimizer for the time of a step. Only this class reads them."""

    scale: Tensor | None = None  # what the gradients are multiplied by, one element
    found_inf: Tensor | None = None  # not 0 if a gradient was not finite, one element

    @classmethod
    def of(cls, optimizer: Any) -> Scaler:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and not isinstance(found_inf, Tensor):  # of a rank without a gradient
            found_inf = torch.tensor(float(found_inf), device="cpu")
        scale = getattr(optimizer, "grad_scale", None)
        return NO_SCALER if scale is None and found_inf is None else cls(scale, found_inf)

    def inverse(self, device: torch.device) -> Tensor | None:
        """The factor for the gradients: fp32 () on the device; None if they are not scaled."""
        return None if self.scale is None else self.scale.to(device).double().reciprocal().float().reshape(())


NO_SCALER = Scaler()


@dataclass
class Streak:
    """Counts consecutive steps that were skipped because a gradient was not finite.

    A step that does not happen for another reason, as GradScaler has found something that is not in these gradients, neither counts nor
    ends it.
    """

    length: int = 0
    first: Tensor | None = None  # int64 (tensors,), pieces of each that were not finite in the first of them

    def count(self, agreement: Agreement, *, finite: bool, no_inf: bool) -> None:
        """Count a step."""
        if not finite:
            self.first = self.first if self.length else agreement.non_finite_pieces()
            self.length += 1
        elif no_inf:
            self.end()

    def end(self) -> None:
        """Start again from 0."""
        self.length, self.first = 0, None


class Agreement:
    """The result of the all-reduce: the same on every rank, except for `contributions`.

    Attributes:
        totals: int64 (SECTIONS * number of tensors + TAIL,), summed over ranks.
        contributions: this rank's.
        verdict: whether the step happens.
        is_on_host: whether reading it waits for nothing.
        number: larger than that of any agreement before.
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
        """Mean of the statistic over every tensor of the model that has one and had a gradient. Waits for the device."""
        summed = (self._bits_plus_1() > 1).tolist()
        return {name: mean for name, mean, has in zip(self.layout.names, self.means().tolist(), summed, strict=True) if has}

    def means(self) -> Tensor:
        """Mean of the statistic over every tensor of the model: float64 (number of tensors,); NaN where not finite."""
        k = (self._bits_plus_1() - 1).clamp(min=0)
        unit = ((1023 - k) << 52).view(torch.float64)  # 2.0**-k by its bit pattern: exp2 and pow need not be exact
        numels = self.layout.tensor_numels(self.totals.device)
        means = mean(self._row(TOTAL).to(torch.float64), unit, numels, self._row(NON_FINITE))
        assert isinstance(means, Tensor)
        return means

    def non_finite_pieces(self) -> Tensor:
        """Number of pieces of every tensor, over all ranks, that were not finite: int64 (number of tensors,)."""
        return (self._row(NON_FINITE) + self._bits_plus_1()) // NON_FINITE_PIECE

    def has_gradients(self) -> bool:
        """Return whether any tensor had a gradient. Waits for the device."""
        return bool((self._bits_plus_1() > 0).any())

    def _bits_plus_1(self) -> Tensor:
        """Number of fraction bits of every tensor's statistic plus 1, which is 1 without a statistic; 0 without a gradient."""
        return -self._row(NON_FINITE) % NON_FINITE_PIECE

    def sums(self, places: Slots, fixed_point: FixedPoint) -> Sums:
        """Return the sums over all ranks for the tensors that these pieces of this rank belong to."""
        vector = self.totals
        if vector.device != places.slots.device:  # parameters may be on several
            vector = vector.to(places.slots.device)
        units, numels = fixed_point.units, fixed_point.numels
        return Sums(vector=vector, tensors=len(self.layout.names), slots=places.slots, units=units, numels=numels)

    def _row(self, number: int) -> Tensor:
        """One of the rows of `formulas/verdict.py`: int64 (number of tensors,), a view."""
        return self.totals[:-TAIL].view(SECTIONS, -1)[number]

    def raise_inconsistency(self, failure: Exception | None) -> None:
        """Raise ValueError on every rank if the ranks are inconsistent; where only the device knows that, on the ranks that have failed.

        Args:
            failure: why this rank brought nothing to the agreement.
        """
        if not self.is_on_host:
            if failure is not None:
                raise failure
            return
        if failure is None and self._flags.read()[0]:
            return
        if failure is not None or self.totals[INVALID].tolist() or self.totals[REPLACES].tolist():
            message = None if failure is None else str(failure) if isinstance(failure, ValueError) else repr(failure)
            raise ValueError(gather_messages(message, self.layout.process_group)) from failure
        raise ValueError(inconsistency(self.layout, self.totals, self.contributions))

    def raise_non_finite(self) -> None:
        """Raise FloatingPointError on every rank if a gradient was not finite. Waits for the device: the price of raising in the step."""
        if capturing(self.totals.device):
            raise ValueError("nonfinite='raise' waits for each step, which a CUDA graph cannot record; use nonfinite='skip'")
        if not self._flags.read()[1]:
            raise FloatingPointError(non_finite(self.layout, self.contributions))

    def raise_left_over(self, streak: Streak) -> None:
        """Raise the errors for which the host reads the verdict, on every rank: inconsistent ranks, too many skipped steps in a row.

        On a device this is called when the next step begins, on all ranks in the same one. The device has long had a forward and a backward
        pass queued behind what is waited for here, so it does not run dry.

        Raises:
            ValueError: the ranks did not fit together.
            FloatingPointError: so many steps in a row were skipped as the options allow.
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
            assert streak.first is not None, "it has begun"
            raise FloatingPointError(skipped_in_a_row(streak.length, streak.first, self.layout, self.contributions))


class _HostCopy:
    """A copy of a small tensor to the host, which is read later, when it has arrived or nearly so."""

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
    layout: Layout,  # of all ranks
    contributions: Sequence[Contribution],  # about the pieces of all local parameters that have a gradient
    rules: Rules,
    *,
    invalid: bool = False,  # this rank met bad input
    replaces: bool = False,  # its parameters are not those of the layout any more
    found_inf: Tensor | None = None,  # GradScaler's, any shape with one element
    device: torch.device | None = None,  # on which ranks agree; None: the layout's
    backend: AgreementFunctions = verdict,  # on this device
) -> Agreement:
    """Add up all ranks' contributions. The one collective of a step; every rank of the group must call it, also with nothing to give."""
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
    """Build this rank's vector."""
    tensors = len(layout.names)

    def make() -> Tensor:
        host = torch.zeros(SECTIONS * tensors + TAIL, dtype=torch.int64, device="cpu")
        for each in contributions:
            firsts = each.places.first_slots
            host[NON_FINITE * tensors + firsts[firsts >= 0]] = -1 - each.fixed_point.bits[firsts >= 0].clamp(min=0)
        return send(host, device)

    vector = layout.sent.of([(each.places, each.fixed_point) for each in contributions], device, make).clone()
    for each in contributions:
        given = (each.observed, each.places.counted, each.places.slots)
        if each.observed.device != device:  # parameters may be on several
            given = tuple(tensor.to(device) for tensor in given)
        backend.contribute(vector, *given)
        if each.difference:
            vector[DIFFERENCE] += each.difference
    for index, is_so in ((INVALID, invalid), (REPLACES, replaces)):
        if is_so:
            vector[index] = 1
    return vector


def confirm_replacement(layout: Layout, change: str, rules: Rules, device: torch.device) -> None:
    """Ask all ranks whether they too are about to replace a layout. Some may be in a step of it, so this is the collective of that step.

    Waits for the device: parameters seldom change.

    Args:
        layout: of all ranks.
        change: how this rank's parameters differ from it.
        device: of this rank's parameters.

    Raises:
        ValueError: not all of them are; on all ranks, or on a device one step later on the others.
    """
    assert layout.process_group is not None, "ranks agree"
    agreement = agree(layout, (), rules, replaces=True, device=device)
    if int(agreement.totals[REPLACES]) == dist.get_world_size(layout.process_group):
        return
    message = (
        f"the parameters to step have changed since the last step, but not on all ranks: here they are {change}; add, remove or "
        f"replace parameters on every rank, before the same step"
    )
    raise ValueError(gather_messages(message, layout.process_group) if agreement.is_on_host else message)
