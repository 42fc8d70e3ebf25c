"""Error messages for steps in which ranks disagree or skip too often. Used by `Agreement`. All functions here wait for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sharded_optim.formulas.verdict import INVALID, REPLACES
from sharded_optim.sharding.layout import Layout, segments_of
from sharded_optim.sharding.ranks import gather_messages, gather_objects, named_ranks, ranks_where
from sharded_optim.step.statistics import Contribution

__all__ = ["inconsistency", "non_finite", "non_finite_here", "skipped_in_a_row"]

MOST_NAMES = 8  # tensor names in an error message


def inconsistency(layout: Layout, totals: Tensor, contributions: Sequence[Contribution]) -> str:
    """Return the reason why the ranks are inconsistent. A collective if they differ in a tensor.

    Args:
        totals: the summed vector; see `Agreement`.
        contributions: this rank's contributions.
    """
    if replacing := int(totals[REPLACES]):
        return f"the parameters to step have changed, but only on {replacing} of the ranks; see the errors of those ranks"
    if invalid := int(totals[INVALID]):
        return f"bad input on {invalid} other ranks; see the errors of those ranks"
    tables = gather_objects(_compared(layout, contributions), layout.process_group)
    kinds_of_slots: list[list[tuple[int, Kind]]] = [[] for _ in layout.names]
    for rank, (compared, kinds) in enumerate(tables):
        for slot, kind in compared:
            kinds_of_slots[slot].append((rank, kinds[kind]))
    problems = (_difference(name, pieces) for name, pieces in zip(layout.names, kinds_of_slots, strict=True))
    # The host reads the verdict on a device's step late, when the process group may be gone: this rank then compares with itself alone, and
    # finds no difference.
    return next(
        filter(None, problems), "ranks differed in an earlier step, and what differed is no longer known; see the errors of other ranks"
    )


Kind = Mapping[str, str] | None  # the compared values of a piece, keyed by name; None if it has no gradient


def _compared(layout: Layout, contributions: Sequence[Contribution]) -> tuple[list[tuple[int, int]], list[Kind]]:
    """Return (slot, index of its kind) for each non-empty piece of this rank, and the list of distinct kinds."""
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
    """Return how the pieces of a tensor, (rank, kind), differ; None if they do not."""
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
    """Return an error message that names the non-finite gradients and their ranks. A collective."""
    names = non_finite_here(layout, contributions)
    message = f"gradient not finite, or too large to square in fp32: {', '.join(map(repr, names))}" if names else None
    return gather_messages(message, layout.process_group)


def skipped_in_a_row(
    steps: int,
    first: Tensor,  # int64 (tensors,), number of ranks on which the tensor was not finite in the first of these steps
    layout: Layout,
    contributions: Sequence[Contribution],  # this rank's contributions to the last of these steps
) -> str:
    """Return an error message that names the gradients that made consecutive steps fail; the same on every rank. A collective."""
    rows = zip(layout.names, first.tolist(), strict=True)
    described = [f"{name!r} on {ranks} rank{'s' if ranks > 1 else ''}" for name, ranks in rows if ranks]
    more = f" and {len(described) - MOST_NAMES} more" if len(described) > MOST_NAMES else ""
    holders = ranks_where(bool(non_finite_here(layout, contributions)), layout.process_group)
    last = f" In the last of them, gradients held by {named_ranks(holders)} were not finite." if holders else ""
    return (
        f"{steps} steps in a row were skipped, as gradients were not finite, or too large to square in fp32. In the first of them: "
        f"{', '.join(described[:MOST_NAMES])}{more}.{last} Parameters and state are as they were before it. Lower the learning rate, or "
        f"check the loss and the data of that step; nonfinite='raise' stops at the first one, max_skipped_steps sets the limit (None: none)"
    )


def non_finite_here(layout: Layout, contributions: Sequence[Contribution]) -> list[str]:
    """Return the names of the tensors whose gradient or statistic was not finite on this rank."""
    slots = {
        slot
        for each in contributions
        for slot, not_finite in zip(each.places.slots.tolist(), each.observed[1].tolist(), strict=True)
        if not_finite
    }
    return [layout.names[slot] for slot in sorted(slots)]
