"""The definition of a storage format: its arrays, and two functions that load a value from their elements and store it to them.

Algorithms compute on fp32 values and never see how these are stored: a backend loads a value through the format, calls the algorithm, and
stores the new value, weight decay included, through the format. So every algorithm works with every format. Every backend compiles `load`
and `store` from the same source, under the rules of an algorithm's `update` (see `formulas/__init__.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = ["MAIN", "Array", "Format"]

MAIN = ""


class Array(NamedTuple):
    """One array of a format."""

    name: str  # MAIN for the first array: the parameter itself, or the moment's own entry in the optimizer's state
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class Format:
    """A way to store fp32 values, in one or several arrays of equal shape.

    Elements of 16-bit floating-point arrays are converted by operations such as `xp.from_bf16` and `xp.to_bf16`. Elements of other arrays
    are plain numbers; `store` must return whole numbers for integer arrays.

    A format must satisfy: all arrays zero mean the value 0, with which moments begin. With zeros in all arrays but the first, the value is
    that of the first: so parameters begin, and are reset after others have written to the parameter. Formats with the same arrays have the
    same `load`.
    """

    name: str
    arrays: tuple[Array, ...]
    load: Callable[..., Any]  # (an element of each array) -> the value
    store: Callable[[Any, Any], tuple[Any, ...]]  # (value, uniform) -> an element of each array
    is_random: bool = False  # whether `store` uses `uniform`, a random number in [0, 1)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first array."""
        return self.arrays[0].dtype

    @property
    def extra(self) -> tuple[Array, ...]:
        """The arrays after the first, which are stored by name in the parameter's state."""
        return self.arrays[1:]

    @property
    def itemsize(self) -> int:
        """Bytes per value, over all arrays."""
        return sum(array.dtype.itemsize for array in self.arrays)

    def entries(self, moment: str) -> dict[str, torch.dtype]:
        """Return the key of each array of a moment in a parameter's state, with the array's dtype."""
        return {f"{moment}.{array.name}" if array.name else moment: array.dtype for array in self.arrays}
