"""What the text of a compiled kernel says of values and the arrays that they are stored in."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sharded_optim.storage.format import Format

__all__ = ["StoredValue", "arrays_of", "functions_of", "identifier", "stored_values"]


class StoredValue:
    """A parameter, a moment or a gradient.

    Attributes:
        arrays: the dtype of each array of the format, by its name in the text.
    """

    def __init__(self, name: str, fmt: Format) -> None:
        self.name, self.format = name, fmt
        self.arrays = {f"{name}_{index}": array.dtype for index, array in enumerate(fmt.arrays)}

    def loaded(self, element: str) -> str:
        """The expression of the value.

        Args:
            element: how an element of an array is written, with {} for the array's name.
        """
        return f"load_{self.name}({', '.join(map(element.format, self.arrays))})"

    def stored(self, element: str, draw: str) -> str:
        """The statement that stores `new_NAME`.

        Args:
            element: as above.
            draw: the expression of a random number, for a format that needs one.
        """
        return f"{', '.join(map(element.format, self.arrays))}, = store_{self.name}(new_{self.name}, {draw or '0.0'})"


def stored_values(formats: Sequence[Format]) -> list[StoredValue]:
    """A parameter and its moments."""
    return [StoredValue(f"state{index}" if index else "param", fmt) for index, fmt in enumerate(formats)]


def arrays_of(values: Sequence[StoredValue]) -> dict[str, torch.dtype]:
    return {name: dtype for value in values for name, dtype in value.arrays.items()}


def functions_of(loaded: Sequence[StoredValue], stored: Sequence[StoredValue] = ()) -> dict[str, Callable[..., Any]]:
    """What the text calls to load and to store values, not compiled."""
    return {f"load_{value.name}": value.format.load for value in loaded} | {f"store_{value.name}": value.format.store for value in stored}


def identifier(title: str, formats: Sequence[Format]) -> str:
    """A name for a kernel. Others may have the same."""
    return re.sub(r"\W", "_", "_".join([title, *(fmt.name for fmt in formats)]))
