"""One number for each rank tells whether all ranks step every tensor alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import examples

from sharded_optim.step.coefficients import GroupValues
from sharded_optim.step.compared import ComparedPieces, PieceWeights
from sharded_optim.storage.splitmix64 import GOLDEN, mix, signed

OPTIONS = (("nonfinite", "skip"),)
SEVERAL = st.tuples(st.sampled_from([0.1, 0.1, 0.1, 0.2]), st.sampled_from([3.0, 3.0, 3.0, 4.0]))  # lr and steps taken


@dataclass(frozen=True)
class Piece:
    tensor: int
    lr: float
    steps: float
    weight: int


def values_of(lr: float) -> GroupValues:
    return GroupValues({"params": [], "lr": lr}, torch.float32, {"lr"})


def difference(pieces: list[Piece], *, on_device: bool = False) -> int:
    """That of a rank whose param groups are in the order in which it meets their learning rates."""
    rates = list(dict.fromkeys(piece.lr for piece in pieces))
    group_of = [rates.index(piece.lr) for piece in pieces]
    compared = ComparedPieces(
        values=list(map(values_of, rates)),
        group_of=group_of,
        options=OPTIONS,
        steps=None if on_device else [piece.steps for piece in pieces],
    )
    return compared.difference(PieceWeights(torch.tensor([piece.weight for piece in pieces]), group_of, len(rates)))


def weights(tensor: int, pieces: int) -> list[int]:
    factor = int(mix(torch.tensor(tensor + 1) * GOLDEN)) | 1
    return [signed(factor * balance) for balance in [pieces - 1] + [-1] * (pieces - 1)]


@given(tensors=st.lists(st.lists(st.one_of(st.none(), SEVERAL), min_size=1, max_size=4), min_size=1, max_size=4))
@settings(deadline=None, max_examples=examples(200))
def test_the_sum_is_zero_exactly_where_every_tensor_is_stepped_alike(tensors: list[list[Any]]) -> None:
    """Each inner list has, for the ranks that hold a tensor, what they step it with, or None without a gradient."""
    of_ranks: dict[int, list[Piece]] = {}
    for tensor, kinds in enumerate(tensors):
        for rank, (kind, weight) in enumerate(zip(kinds, weights(tensor, len(kinds)), strict=True)):
            if kind is not None:
                of_ranks.setdefault(rank, []).append(Piece(tensor, *kind, weight))
    total = signed(sum(difference(pieces) for pieces in of_ranks.values()))
    assert (total == 0) == all(len(set(kinds)) == 1 for kinds in tensors)


def test_two_tensors_that_differ_the_other_way_round_do_not_cancel_out() -> None:
    (a, b), (c, d) = weights(0, 2), weights(1, 2)
    first = [Piece(0, 0.1, 3.0, a), Piece(1, 0.2, 3.0, c)]
    second = [Piece(0, 0.2, 3.0, b), Piece(1, 0.1, 3.0, d)]
    assert signed(difference(first) + difference(second)) != 0


def test_step_counters_that_only_a_device_knows_are_not_compared() -> None:
    first, second = ([Piece(0, 0.1, steps, weight)] for steps, weight in zip((3.0, 4.0), weights(0, 2), strict=True))
    assert signed(difference(first, on_device=True) + difference(second, on_device=True)) == 0
    assert signed(difference(first) + difference(second)) != 0


def test_the_weights_of_a_rank_that_is_alone_are_zero() -> None:
    assert PieceWeights(torch.tensor(weights(0, 1)), [0], 1).are_zero
