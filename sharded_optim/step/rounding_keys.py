"""Keys of the random numbers of a step, for values that are rounded stochastically. Used by kernel calls."""

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
    """The keys of one kernel call.

    Args:
        tensors: name of each operand's tensor.
        group_of: the param group of each operand.
        random: which values are rounded at random: the parameter, or moments by name.
    """

    def __init__(self, tensors: Sequence[str], group_of: Sequence[int], random: Sequence[str]) -> None:
        self._tensors = tensors
        self._group_of = group_of
        self._random = random
        self._sources: dict[tuple[str, ...], DeviceCache[Tensor]] = {}

    def of(self, values: Sequence[str], groups: Sequence[Mapping[str, Any]], steps: Tensor) -> Tensor | None:
        """Return the keys of those of the values that are rounded at random: int64 (operands, such values); None if none is.

        Args:
            values: names, in the order in which a backend stores them.
            groups: hyperparameters of the param groups.
            steps: fp32 (operands,), taken so far.
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
    """Return a name for a source of random numbers: of a parameter the tensor's name, of its moments another."""
    return tensor if value == PARAMETER else f"{tensor}\n{value}"
