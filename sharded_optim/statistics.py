"""Per-tensor statistics of the whole model: an exact sum, and the only collective of a step.

Every rank contributes one int64 vector, `SECTIONS` values for each tensor of the model, and one all-reduce adds them up. Integers make the
result independent of the order and the grouping of the additions, that is of how the tensors are sharded:

    q = round_half_even(statistic * 2**k)  in int64, with k from `fraction_bits`

The same vector carries the consensus: where a gradient was not finite, where one was missing, and whether a rank met bad input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.algorithms.scalars import Sums, mean
from sharded_optim.consensus import (
    ABSENT,
    FOUND_INF,
    INVALID,
    KEY,
    NON_FINITE,
    PRESENT,
    REPLACES,
    SECTIONS,
    SQUARED_KEY,
    TAIL,
    Verdict,
)
from sharded_optim.devices import capturing, keep, on, send
from sharded_optim.ranks import named_ranks, naming_missing_ranks, ranks_where
from sharded_optim.sharding.layout import Layout, Places

__all__ = ["Agreement", "Contribution", "Deferred", "FixedPoint", "agree", "fraction_bits", "told_of_streak"]

# A float64 below 2**51 is rounded to an integer, half to even, by adding 1.5 * 2**52 and reading the low bits: processors without a
# conversion from floating point to 64-bit integers keep their full speed.
TERM_BITS = 51
SUM_BITS = 62  # of an int64: a sign bit, and one of headroom for roundings
HEADROOM = 1.001  # a computed statistic exceeds its mathematical bound by a few fp32 roundings, never by this much

MOST_NAMES = 8  # of tensors, in an error message


def fraction_bits(bound: float, numel: int) -> int:
    """k: how many fraction bits of a statistic in [0, bound] are summed over a tensor of `numel` elements without overflow.

    The error of the mean is at most 2**-(k+1). StableAdamW with beta2 = 0.99 has k = 44 up to 2**11 elements, 35 at 2**20 and 24 at 2**31.
    """
    integer_bits = math.frexp(bound * HEADROOM**2)[1]  # bound < 2**integer_bits, and the limit in fp32, which is below HEADROOM**2 * bound
    return min(TERM_BITS, SUM_BITS - max(numel - 1, 0).bit_length()) - integer_bits


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """How the statistics of several pieces of tensors are summed."""

    bits: Tensor  # int64 (n,) on the CPU, k of each
    limits: Tensor  # fp32 (n,) on the device, the largest value that is possible
    scales: Tensor  # fp32 (n,) on the device, 2**k
    units: Tensor  # float64 (n,) on the device, 2**-k
    numels: Tensor  # float64 (n,) on the device, of the whole tensors, but at least 1

    @classmethod
    def of(cls, bounds: Sequence[float], numels: Sequence[int], device: torch.device) -> FixedPoint:
        """For statistics in [0, bound], of tensors of these numbers of elements."""
        bits = [fraction_bits(bound, numel) for bound, numel in zip(bounds, numels, strict=True)]
        on_host = {"device": "cpu", "dtype": torch.float64}
        doubles = torch.tensor([[math.ldexp(1.0, -k) for k in bits], [max(numel, 1) for numel in numels]], **on_host)
        singles = torch.tensor([[HEADROOM * bound for bound in bounds], [math.ldexp(1.0, k) for k in bits]], **on_host).float()
        (units, numels_on_device), (limits, scales) = send(doubles, device), send(singles, device)
        return cls(bits=torch.tensor(bits, device="cpu"), limits=limits, scales=scales, units=units, numels=numels_on_device)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What all ranks know after the all-reduce; the same on each, but for `contributions`."""

    layout: Layout
    totals: Tensor  # int64 (SECTIONS * number of tensors + TAIL,), summed over ranks
    contributions: Sequence[Contribution]  # this rank's

    @property
    def vector(self) -> Tensor:
        """Int64 (SECTIONS, number of tensors)."""
        return self.totals[:-TAIL].view(SECTIONS, len(self.layout.names))

    def named_means(self) -> dict[str, float]:
        """Mean of the statistic over every tensor of the model that had a gradient. Waits for the device."""
        rows = zip(self.layout.names, self.means().tolist(), self.vector[PRESENT].tolist(), strict=True)
        return {name: mean for name, mean, present in rows if present}

    def means(self) -> Tensor:
        """Mean of the statistic over every tensor of the model: float64 (number of tensors,); NaN where not finite."""
        total, non_finite, _, present, bits, _, _ = self.vector.unbind()
        k = bits // present.clamp(min=1)
        unit = ((1023 - k) << 52).view(torch.float64)  # 2.0**-k by its bit pattern: exp2 and pow need not be exact
        means = mean(total.to(torch.float64), unit, self.layout.tensor_numels(total.device), non_finite)
        assert isinstance(means, Tensor)
        return means

    def sums(self, places: Places, fixed_point: FixedPoint) -> Sums:
        """What the pieces of this rank at some places became part of."""
        totals, non_finite = self.vector[: NON_FINITE + 1].to(fixed_point.units.device)
        return Sums(totals=totals, non_finite=non_finite, slots=places.slots, units=fixed_point.units, numels=fixed_point.numels)

    def names_where_not_finite_here(self) -> list[str]:
        """Tensors whose gradient was not finite on this rank. Waits for the device."""
        slots = {
            slot
            for each in self.contributions
            for slot, not_finite in zip(each.places.slots.tolist(), each.observed[1].tolist(), strict=True)
            if not_finite
        }
        return [self.layout.names[slot] for slot in sorted(slots)]

    def inconsistency(self) -> str:
        """Why ranks are not consistent, in words. Waits for the device."""
        if replacing := int(self.totals[REPLACES]):
            return f"the parameters to step have changed on {replacing} of the ranks alone; their own errors say how"
        if invalid := int(self.totals[INVALID]):
            return f"{invalid} other ranks met bad input; their own errors say which"
        rows = self.vector[[PRESENT, ABSENT, KEY, SQUARED_KEY]].tolist()
        for name, present, absent, key, squared_key in zip(self.layout.names, *rows, strict=True):
            if present and absent:
                return (
                    f"{name!r} has a gradient on {present} of the ranks that hold it and none on {absent}; a step needs it on all or on "
                    f"none: make every rank run the same part of the model, or set the missing gradients to zero"
                )
            if present * squared_key != key * key:
                return (
                    f"ranks use different hyperparameters (lr, betas, ...) or options (nonfinite, max_skipped_steps) for {name!r}, or are "
                    f"at different steps; make them the same"
                )
        raise AssertionError("the ranks are consistent")


def told_of_streak(agreement: Agreement, verdict: Verdict, process_group: dist.ProcessGroup | None) -> str:
    """What went wrong in steps that were skipped in a row, in words; the same on every rank. A collective, which waits for the device.

    Args:
        agreement, verdict: on the last of them.
        process_group: of the ranks that agreed; None: this process is alone.
    """
    names = agreement.layout.names
    found = [
        f"{name!r} on {ranks} rank{'s' if ranks > 1 else ''}" for name, ranks in zip(names, verdict.first.tolist(), strict=True) if ranks
    ]
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    holders = ranks_where(bool(agreement.names_where_not_finite_here()), process_group)
    last = f" In the last of them, gradients held by {named_ranks(holders)} were not finite." if holders else ""
    return (
        f"{int(verdict.length)} steps in a row were skipped, as gradients were not finite, or too large to square in fp32. In the first "
        f"of them: {', '.join(found[:MOST_NAMES])}{more}.{last} Parameters and state are as they were before it. Lower the learning rate, "
        f"or look at the loss and the data of that step; nonfinite='raise' stops in it, max_skipped_steps sets the limit (None: none)"
    )


class Deferred:
    """What an agreement says that stops the optimizer, read one step later, when the host hardly has to wait for it.

    Args:
        agreement: of all ranks.
        verdict: what it means.
        longest: how many steps in a row may be skipped; None: there is no limit.
    """

    def __init__(self, agreement: Agreement, verdict: Verdict, longest: int | None) -> None:
        self._agreement = agreement
        self._verdict = verdict
        self._longest = longest
        self._told = verdict.told.to("cpu", non_blocking=True)
        self._copied = torch.Event(verdict.told.device)
        with on(verdict.told.device):
            self._copied.record()

    def raise_if_due(self, process_group: Callable[[], dist.ProcessGroup | None]) -> None:
        """Raise, on every rank, ValueError if the ranks did not fit together, FloatingPointError if they skip step after step.

        It always looks at the step before, so that all ranks raise in the same one. The device has long had a forward and a backward pass
        queued behind what is waited for here, so it does not run dry.

        Args:
            process_group: gives that of the ranks that agreed.
        """
        self._copied.synchronize()
        consistent, finite, length = self._told.tolist()
        if not consistent:
            raise ValueError(self._agreement.inconsistency())
        if self._longest is not None and not finite and length >= self._longest:
            raise FloatingPointError(told_of_streak(self._agreement, self._verdict, process_group()))


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What this rank brings to an agreement about some of its pieces."""

    places: Places  # which they are
    bits: Tensor  # int64 (n,), k of each
    keys: Tensor  # int64 (n,), of the hyperparameters of each, 24 bits
    observed: Tensor  # int64 (2, n) on the device: each one's sum of q, and 1 where an element was not finite


def agree(
    layout: Layout,
    contributions: Sequence[Contribution],  # about the pieces of all local parameters that have a gradient
    *,
    device: torch.device,
    invalid: bool = False,  # this rank met bad input
    replaces: bool = False,  # its parameters are not those of the layout any more
    found_inf: Tensor | None = None,  # GradScaler's, any shape with one element
    process_group: dist.ProcessGroup | None,
) -> Agreement:
    """Add up all ranks' contributions. The one collective of a step; every rank of the group must call it, also with nothing to give."""
    tensors = len(layout.names)
    # Everything known on the host goes over in one copy; what the device computed is added there.
    host = torch.zeros(SECTIONS * tensors + TAIL, dtype=torch.int64, device="cpu")
    table = host[:-TAIL].view(SECTIONS, tensors)
    for each in contributions:
        told = torch.stack([torch.ones_like(each.bits), each.bits, each.keys, each.keys * each.keys])
        table[PRESENT:, each.places.held_slots] = told if each.places.held is None else told[:, each.places.held]
    if sum(len(each.bits) for each in contributions) < len(layout.slots):
        absent = layout.held.clone()
        for each in contributions:
            absent[each.places.indices] = False
        table[ABSENT, layout.slot_indices[absent]] = 1
    host[INVALID], host[REPLACES] = int(invalid), int(replaces)
    flat = _sent(layout, host, device)
    vector = flat[:-TAIL].view(SECTIONS, tensors)
    for each in contributions:
        observed = each.observed * each.places.counted
        vector[: NON_FINITE + 1].index_add_(1, each.places.slots.to(device), observed.to(device))  # parameters may be on several devices
    if found_inf is not None:
        flat[FOUND_INF] = (found_inf.to(device) != 0).reshape(())
    if process_group is not None:
        with naming_missing_ranks(process_group, f"a step of {layout.described_by_name}"):
            dist.all_reduce(flat, group=process_group)
    return Agreement(layout=layout, totals=flat, contributions=contributions)


_sent_before: WeakKeyDictionary[Layout, tuple[Tensor, Tensor]] = WeakKeyDictionary()


def _sent(layout: Layout, host: Tensor, device: torch.device) -> Tensor:
    """`host` on the device, to be written to. From step to step it seldom changes, and then the copy that is there already is copied."""
    if device.type == "cpu":
        return host
    before = _sent_before.get(layout)
    if before is None or before[1].device != device or not torch.equal(before[0], host):
        if capturing(device):  # then nothing is there yet
            return send(host, device)
        before = _sent_before[layout] = (host, send(host, device))
    keep(device, before)
    return before[1].clone()
