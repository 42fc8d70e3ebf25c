"""Source text of a kernel for stored values: names of their arrays, expressions that load them, statements that store them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sharded_optim.storage.format import Format

__all__ = ["StoredValue", "arrays_of", "functions_of", "identifier", "stored_values"]


class StoredValue:
    """A parameter, a moment or a gradient in a kernel's source.

    Attributes:
        arrays: dtypes of the format's arrays, keyed by their names in the source.
    """

    def __init__(self, name: str, fmt: Format) -> None:
        self.name, self.format = name, fmt
        self.arrays = {f"{name}_{index}": array.dtype for index, array in enumerate(fmt.arrays)}

    def loaded(self, element: str) -> str:
        """Return the expression that computes the value from its arrays.

        Args:
            element: pattern of an array element's name, with {} for the array's name.
        """
        return f"load_{self.name}({', '.join(map(element.format, self.arrays))})"

    def stored(self, element: str, draw: str) -> str:
        """Return the statement that converts `new_NAME` to elements of its arrays.

        Args:
            element: pattern of an array element's name, with {} for the array's name.
            draw: expression of a random number; "" for a format that needs none.
        """
        return f"{', '.join(map(element.format, self.arrays))}, = store_{self.name}(new_{self.name}, {draw or '0.0'})"


def stored_values(formats: Sequence[Format]) -> list[StoredValue]:
    """Return the stored values of a parameter and its moments with these formats."""
    return [StoredValue(f"state{index}" if index else "param", fmt) for index, fmt in enumerate(formats)]


def arrays_of(values: Sequence[StoredValue]) -> dict[str, torch.dtype]:
    return {name: dtype for value in values for name, dtype in value.arrays.items()}


def functions_of(loaded: Sequence[StoredValue], stored: Sequence[StoredValue] = ()) -> dict[str, Callable[..., Any]]:
    """Return the formats' load and store functions, not yet compiled, keyed by their names in the source."""
    return {f"load_{value.name}": value.format.load for value in loaded} | {f"store_{value.name}": value.format.store for value in stored}


def identifier(title: str, formats: Sequence[Format]) -> str:
    """Return a valid identifier for a kernel; not necessarily unique."""
    return re.sub(r"\W", "_", "_".join([title, *(fmt.name for fmt in formats)]))
