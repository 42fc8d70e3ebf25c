"""Compute the keys of a step's random numbers, for values that are rounded stochastically. Used by kernel calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_optim.backends import noise
from sharded_optim.sharding import PARAMETER
from sharded_optim.storage.devices import DeviceCache, send

__all__ = ["RoundingKeys"]


class RoundingKeys:
    """The random keys of one kernel call.

    Args:
        tensors: name of each operand's tensor.
        group_of: index of each operand's param group.
        random: names of the values that are rounded stochastically: PARAMETER, or names of moments.
    """

    def __init__(self, tensors: Sequence[str], group_of: Sequence[int], random: Sequence[str]) -> None:
        self._tensors = tensors
        self._group_of = group_of
        self._random = random
        self._sources: dict[tuple[str, ...], DeviceCache[Tensor]] = {}

    def of(self, values: Sequence[str], groups: Sequence[Mapping[str, Any]], steps: Tensor) -> Tensor | None:
        """Return a key for each operand and stochastically rounded value: int64 (operands, such values); None if there is no such value.

        Args:
            values: names of the values, in the order in which a backend stores them.
            groups: hyperparameters of the param groups.
            steps: steps taken so far: fp32 (operands,).
        """
        random = tuple(name for name in values if name in self._random)
        if not random:
            return None
        seeds = [groups[group]["rounding_seed"] for group in self._group_of]

        def make() -> Tensor:
            sources = [noise.sources(seeds, [_source_name(tensor, name) for tensor in self._tensors]) for name in random]
            return send(torch.stack(sources, dim=1), steps.device)

        sources = self._sources.setdefault(random, DeviceCache()).of(seeds, steps.device, make)
        return noise.keys(sources, steps.to(torch.int64).view(-1, 1) + 1)


def _source_name(tensor: str, value: str) -> str:
    """Return the name that seeds the random numbers of a value: the tensor's name for a parameter, a distinct name for each moment."""
    return tensor if value == PARAMETER else f"{tensor}\n{value}"
