"""Compare between ranks what must be equal to step a tensor: hyperparameters, the optimizer's options, and the number of steps taken.

Each rank sends one number for all of its pieces. Every piece has a weight, and the weights of a tensor's pieces add up to 0 over all ranks,
so the sum of hashes times weights is 0 if all hashes are equal, and a random number otherwise. Only then do the ranks exchange which tensor
it is and what differs. Used by `KernelCall`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sharded_optim.step.coefficients import GroupValues
from sharded_optim.storage.splitmix64 import signed

__all__ = ["ComparedPieces", "PieceWeights"]


class PieceWeights:
    """The hash weights of a kernel call's pieces, and their sum for each param group; see `Slots.weights`."""

    def __init__(self, weights: Tensor, group_of: Sequence[int], groups: int) -> None:
        self.of_pieces: list[int] = weights.tolist()
        self.of_groups = [0] * groups
        for group, weight in zip(group_of, self.of_pieces, strict=True):
            self.of_groups[group] += weight
        self.are_zero = not any(self.of_pieces)  # for example in a single process


@dataclass(frozen=True, kw_only=True)
class ComparedPieces:
    """The values of a kernel call's pieces that ranks compare in one step. `values` and `options` are never mutated."""

    values: Sequence[GroupValues]
    group_of: Sequence[int]  # index into `values` for each piece
    options: tuple[tuple[str, Any], ...]  # (name, value) of the optimizer's options
    steps: Sequence[float] | None  # number of steps taken so far by each piece; None if only a device has it

    def difference(self, weights: PieceWeights) -> int:
        """Return the sum of hashes times weights, modulo 2**64, as an int64."""
        steps, values, options = self.steps, self.values, self.options
        if steps is None or steps.count(steps[0]) == len(steps):
            step = None if steps is None else steps[0]
            return signed(sum(each.key(options, step) * weight for each, weight in zip(values, weights.of_groups, strict=True)))
        kinds = list(zip(self.group_of, steps, strict=True))
        keys = {kind: values[kind[0]].key(options, kind[1]) for kind in set(kinds)}
        return signed(sum(keys[kind] * weight for kind, weight in zip(kinds, weights.of_pieces, strict=True)))

    def texts(self) -> Iterator[Mapping[str, str]]:
        """Yield the compared values of each piece as text, keyed by name."""
        for index, group in enumerate(self.group_of):
            named = dict([*self.values[group].compared, *self.options])
            steps = {} if self.steps is None else {"number of steps taken": int(self.steps[index])}
            yield {name: f"{value}" for name, value in (named | steps).items()}
