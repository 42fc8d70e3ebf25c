"""Error messages for steps in which the ranks disagree, or skip too often. All functions here wait for the device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sharded_optim.formulas.verdict import ABSENT, INVALID, KEY, PRESENT, REPLACES, SECTIONS, SQUARED_KEY, TAIL
from sharded_optim.sharding.layout import Layout
from sharded_optim.sharding.ranks import gather_messages, named_ranks, ranks_where
from sharded_optim.step.statistics import Contribution

__all__ = ["inconsistency", "non_finite", "non_finite_here", "skipped_in_a_row"]

MOST_NAMES = 8  # of tensors, in an error message


def inconsistency(
    names: Sequence[str],  # of all tensors of the model
    totals: Tensor,  # see `Agreement`
) -> str:
    """Say why the ranks are inconsistent."""
    if replacing := int(totals[REPLACES]):
        return f"the parameters to step have changed on {replacing} of the ranks alone; their own errors say how"
    if invalid := int(totals[INVALID]):
        return f"{invalid} other ranks met bad input; their own errors say which"
    rows = totals[:-TAIL].view(SECTIONS, len(names))[[PRESENT, ABSENT, KEY, SQUARED_KEY]].tolist()
    for name, present, absent, key, squared_key in zip(names, *rows, strict=True):
        if present and absent:
            return (
                f"{name!r} has a gradient on {present} of the ranks that hold it and none on {absent}; a step needs it on all or on "
                f"none: make every rank run the same part of the model, or set the missing gradients to zero"
            )
        if present * squared_key != key * key:
            return (
                f"ranks use different hyperparameters (lr, betas, ...) or options (nonfinite, max_skipped_steps, state_dtype) for "
                f"{name!r}, or are at different steps; make them the same"
            )
    raise AssertionError("the ranks are consistent")


def non_finite(layout: Layout, contributions: Sequence[Contribution]) -> str:
    """Say which gradients were not finite on which ranks. A collective."""
    names = non_finite_here(layout, contributions)
    message = f"gradient not finite, or too large to square in fp32: {', '.join(map(repr, names))}" if names else None
    return gather_messages(message, layout.process_group)


def skipped_in_a_row(
    steps: int,
    first: Tensor,  # int64 (tensors,), on how many ranks each was not finite in the first of these steps
    layout: Layout,
    contributions: Sequence[Contribution],  # of the last of them
) -> str:
    """Say which gradients made consecutive steps fail; the same text on every rank. A collective."""
    rows = zip(layout.names, first.tolist(), strict=True)
    found = [f"{name!r} on {ranks} rank{'s' if ranks > 1 else ''}" for name, ranks in rows if ranks]
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    holders = ranks_where(bool(non_finite_here(layout, contributions)), layout.process_group)
    last = f" In the last of them, gradients held by {named_ranks(holders)} were not finite." if holders else ""
    return (
        f"{steps} steps in a row were skipped, as gradients were not finite, or too large to square in fp32. In the first of them: "
        f"{', '.join(found[:MOST_NAMES])}{more}.{last} Parameters and state are as they were before it. Lower the learning rate, or look "
        f"at the loss and the data of that step; nonfinite='raise' stops in it, max_skipped_steps sets the limit (None: none)"
    )


def non_finite_here(layout: Layout, contributions: Sequence[Contribution]) -> list[str]:
    """Return the names of the tensors of which a gradient or a statistic was not finite on this rank."""
    slots = {
        slot
        for each in contributions
        for slot, not_finite in zip(each.places.slots.tolist(), each.observed[1].tolist(), strict=True)
        if not_finite
    }
    return [layout.names[slot] for slot in sorted(slots)]
