"""Error messages for steps in which the ranks disagree, or skip too often. All functions here wait for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sharded_optim.formulas.verdict import INVALID, REPLACES
from sharded_optim.sharding.layout import Layout, segments_of
from sharded_optim.sharding.ranks import gather_messages, gather_objects, named_ranks, ranks_where
from sharded_optim.step.statistics import Contribution

__all__ = ["inconsistency", "non_finite", "non_finite_here", "skipped_in_a_row"]

MOST_NAMES = 8  # of tensors, in an error message


def inconsistency(layout: Layout, totals: Tensor, contributions: Sequence[Contribution]) -> str:
    """Say why the ranks are inconsistent. A collective, where they differ in a tensor.

    Args:
        totals: see `Agreement`.
        contributions: of this rank.
    """
    if replacing := int(totals[REPLACES]):
        return f"the parameters to step have changed on {replacing} of the ranks alone; their own errors say how"
    if invalid := int(totals[INVALID]):
        return f"{invalid} other ranks met bad input; their own errors say which"
    tables = gather_objects(_compared(layout, contributions), layout.process_group)
    found: list[list[tuple[int, Kind]]] = [[] for _ in layout.names]
    for rank, (compared, kinds) in enumerate(tables):
        for slot, kind in compared:
            found[slot].append((rank, kinds[kind]))
    problems = (_difference(name, pieces) for name, pieces in zip(layout.names, found, strict=True))
    # The process group may be gone by the time that a step on a device is looked at.
    return next(
        filter(None, problems), "ranks differed in an earlier step, and it is no longer known in what; see the errors of the others"
    )


Kind = Mapping[str, str] | None  # what is compared of a piece; None without a gradient


def _compared(layout: Layout, contributions: Sequence[Contribution]) -> tuple[list[tuple[int, int]], list[Kind]]:
    """Return the slot of each piece of this rank that has an element, with the index of its kind; and the kinds."""
    of_pieces: dict[int, Kind] = {}
    for each in contributions:
        of_pieces |= zip(each.places.indices.tolist(), each.compared.texts(), strict=True)
    kinds: list[Kind] = []
    compared = []
    for index, (slot, segment) in enumerate(zip(layout.slots, segments_of(layout.local_params), strict=True)):
        if segment.numel:
            kind = of_pieces.get(index)
            if kind not in kinds:
                kinds.append(kind)
            compared.append((slot, kinds.index(kind)))
    return compared, kinds


def _difference(name: str, pieces: Sequence[tuple[int, Kind]]) -> str | None:
    """Say in what the pieces of a tensor differ, each with its rank; None if they do not."""
    absent = [rank for rank, kind in pieces if kind is None]
    present = [(rank, kind) for rank, kind in pieces if kind is not None]
    if absent and present:
        return (
            f"{name!r} has a gradient on {named_ranks([rank for rank, _ in present])} and none on {named_ranks(absent)}; a step needs it "
            f"on all ranks that hold the tensor or on none: make every rank run the same part of the model, or set the missing gradients "
            f"to zero"
        )
    for key in {key: None for _, kind in present for key in kind}:
        ranks: dict[str | None, list[int]] = {}
        for rank, kind in present:
            ranks.setdefault(kind.get(key), []).append(rank)
        if len(ranks) > 1:
            values = ", ".join(f"{value} on {named_ranks(where)}" for value, where in ranks.items())
            return (
                f"ranks disagree about {name!r}: {key} is {values}; make hyperparameters, the options nonfinite, max_skipped_steps and "
                f"state_dtype, and the number of steps taken the same on all ranks"
            )
    return None


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
