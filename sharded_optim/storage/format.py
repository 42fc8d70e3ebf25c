"""The definition of a storage format: its arrays, and two functions that load a value from their elements and store it to them.

Algorithms compute on fp32 values and never see a storage: a backend loads through the format, calls the algorithm, and stores the whole
new value through the format. So every algorithm has every storage, with weight decay inside it. Every backend compiles `load` and `store`
from the same source, under the rules of an algorithm's `update` (see `formulas/__init__.py`).
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

    name: str  # MAIN of the first: the parameter itself, or the moment's own entry in the optimizer's state
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class Format:
    """A way to store fp32 values, in one or several arrays of equal shape.

    Elements of arrays of 16 bits are read and made by operations such as `xp.from_bf16` and `xp.to_bf16`. Those of any other array are
    numbers; an array of integers takes whole ones.

    Zeros in all arrays are the value 0, with which moments begin. Zeros in the further arrays of a parameter leave the value of the first:
    so they begin, and so they are set when others have written the parameter. Formats with the same arrays load alike.
    """

    name: str
    arrays: tuple[Array, ...]
    load: Callable[..., Any]  # (*stored), an element of each array -> the value
    store: Callable[[Any, Any], tuple[Any, ...]]  # (value, uniform) -> an element of each array
    is_random: bool = False  # whether `store` uses `uniform`, a random number in [0, 1)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first array."""
        return self.arrays[0].dtype

    @property
    def extra(self) -> tuple[Array, ...]:
        """The arrays beside the first: a parameter's state has them under their names."""
        return self.arrays[1:]

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return sum(array.dtype.itemsize for array in self.arrays)

    def entries(self, moment: str) -> dict[str, torch.dtype]:
        """Keys of a moment's arrays in a parameter's state, with their dtypes."""
        return {f"{moment}.{array.name}" if array.name else moment: array.dtype for array in self.arrays}
