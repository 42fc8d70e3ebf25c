"""Record scalar operations on numbers that only a device knows, so that one kernel launch computes all of them. Used by `scalars.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Formula", "Number", "Operations", "Recorded", "Recorder", "Step"]


class Recorder:
    """Records the operations on numbers that only a device knows.

    Attributes:
        lines: assignments of one operation each, to `v0`, `v1`, ..., in a syntax that Python and Triton share. Operands are others of
            these, constants `c0`, `c1`, ..., and inputs by name; float64 all, but for the step, an int64.
        constants: floats, which differ from step to step where the lines do not.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: list[float] = []

    def input(self, name: str) -> Recorded:
        return Recorded(recorder=self, name=name)

    @staticmethod
    def of(*numbers: Number) -> Recorder:
        return next(number.recorder for number in numbers if isinstance(number, Recorded))

    def name(self, number: Number) -> str:
        """The name of a number in the recorded lines."""
        assert not isinstance(number, Tensor), "numbers of a step are recorded, or are tensors"
        if isinstance(number, Recorded):
            return number.name
        self.constants.append(float(number))
        return f"c{len(self.constants) - 1}"

    def record(self, operation: str, *operands: Number) -> Recorded:
        """Record an operation and return its result. Each {} stands for an operand."""
        result = Recorded(recorder=self, name=f"v{len(self.lines)}")
        self.lines.append(f"{result.name} = {operation.format(*map(self.name, operands))}")
        return result

    def formula(self, results: Sequence[Number]) -> Formula:
        """The recorded operations that compute these results."""
        names = tuple(map(self.name, results))
        operations = Operations(lines=tuple(self.lines), results=names, constants=len(self.constants))
        return Formula(operations=operations, constants=tuple(self.constants))


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Recorded operations, as text.

    Attributes:
        lines: see `Recorder`.
        results: names of what was assigned, of constants or of inputs.
        constants: how many there are.
    """

    lines: tuple[str, ...]
    results: tuple[str, ...]
    constants: int


@dataclass(frozen=True, kw_only=True)
class Formula:
    """Recorded operations and the constants in them."""

    operations: Operations
    constants: tuple[float, ...]  # in the order of their names


def _recorded(
    operation: str,
) -> tuple[Callable[[Recorded, Number], Recorded], Callable[[Recorded, Number], Recorded]]:
    """Make an infix operator, and the same with its operands exchanged."""
    return (
        lambda self, other: self.recorder.record(operation, self, other),
        lambda self, other: self.recorder.record(operation, other, self),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """A number whose value is not computed yet, one for each operand."""

    recorder: Recorder
    name: str

    __add__, __radd__ = _recorded("{} + {}")
    __sub__, __rsub__ = _recorded("{} - {}")
    __mul__, __rmul__ = _recorded("{} * {}")


Number = float | Tensor | Recorded
Step = int | Tensor | Recorded  # 1 in the first
