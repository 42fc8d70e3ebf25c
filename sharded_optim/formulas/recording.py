"""Record scalar operations on inputs without values yet, so that a backend can compute all of them in one call.

`coefficients.py` records the formulas of an algorithm, which use the operations of `scalars.py`; every backend evaluates the record.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

__all__ = ["Formula", "Formulas", "Number", "Operation", "Operations", "Recorded", "Recorder", "Step"]


INTEGERS = ("step", "non_finite")  # inputs that are int64
TAKE_INTEGERS = ("double", "power", "at_first_step", "nan_where")  # operations with int64 operands; all others take only float64


class Operation(NamedTuple):
    """One recorded operation.

    Attributes:
        name: "+", "-", "*", "double" (int64 to float64), or the name of a function of `scalars.py`.
        operands: names of inputs, constants (`c0`, `c1`, ...) and results of earlier operations (`v0`, `v1`, ...).
    """

    name: str
    operands: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Operations:
    """The operations of a formula. Their constants are numbered; `Formula` has the values, so that formulas that differ only in these share
    operations, and thereby kernels.

    Attributes:
        instructions: the operations in order; number i computes `v{i}`. All values are float64, except for the inputs in `INTEGERS`.
        results: names of the values to return, each an operation, a constant or an input.
        constants: the number of constants.
    """

    instructions: tuple[Operation, ...]
    results: tuple[str, ...]
    constants: int

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the operations' results, in order."""
        return tuple(f"v{index}" for index in range(len(self.instructions)))

    def evaluate(
        self, functions: Mapping[str, Callable[..., Any]], values: Mapping[str, Any], wanted: Collection[str] | None = None
    ) -> dict[str, Any]:
        """Evaluate the operations; return all values, keyed by name.

        Args:
            functions: the function of each operation, keyed by its name.
            values: inputs, constants, and results of operations that are not in `wanted`; any objects that the functions take.
            wanted: names of the results to compute; None means all.
        """
        known = dict(values)
        for name, each in zip(self.names, self.instructions, strict=True):
            if wanted is None or name in wanted:
                known[name] = functions[each.name](*(known[operand] for operand in each.operands))
        return known


@dataclass(frozen=True, kw_only=True)
class Formula:
    """Recorded operations and the values of their constants."""

    operations: Operations
    constants: tuple[float, ...]  # c0, c1, ...


class Formulas:
    """Formulas of the same coefficients, one for each param group.

    Attributes:
        results: the number of coefficients.
        constants: for each distinct sequence of operations, a flat float64 array with one row per formula: 1 and the formula's constants if
            it has these operations, else zeros.
        derived: caches of backends, keyed by backend.
    """

    def __init__(self, formulas: Sequence[Formula]) -> None:
        self.formulas = formulas
        self.results = len(formulas[0].operations.results)
        self.constants: dict[Operations, array[float]] = {}
        self.derived: dict[Any, Any] = {}
        for operations in dict.fromkeys(formula.operations for formula in formulas):
            others = (0.0,) * (1 + operations.constants)
            rows = [(1.0, *formula.constants) if formula.operations == operations else others for formula in formulas]
            self.constants[operations] = array("d", chain.from_iterable(rows))


class Recorder:
    """Records operations on inputs without values."""

    def __init__(self) -> None:
        self._instructions: list[Operation] = []
        self._constants: list[float] = []

    def input(self, name: str) -> Recorded:
        return Recorded(recorder=self, name=name)

    @staticmethod
    def of(*numbers: Number) -> Recorder:
        return next(number.recorder for number in numbers if isinstance(number, Recorded))

    def record(self, name: str, *operands: Number) -> Recorded:
        """Record an operation, and return its result as a `Recorded`."""
        if name not in TAKE_INTEGERS:
            operands = tuple(map(self._double, operands))
        self._instructions.append(Operation(name, tuple(map(self._name_of, operands))))
        return self.input(f"v{len(self._instructions) - 1}")

    def formula(self, results: Sequence[Number]) -> Formula:
        """Return the recorded operations as the formula of these results."""
        names = tuple(self._name_of(self._double(result)) for result in results)
        operations = Operations(instructions=tuple(self._instructions), results=names, constants=len(self._constants))
        return Formula(operations=operations, constants=tuple(self._constants))

    def _double(self, number: Number) -> Number:
        is_integer = isinstance(number, Recorded) and number.name in INTEGERS
        return self.record("double", number) if is_integer else number

    def _name_of(self, number: Number) -> str:
        assert not isinstance(number, Tensor), "a formula mixes recorded numbers and tensors"
        if isinstance(number, Recorded):
            return number.name
        self._constants.append(float(number))
        return f"c{len(self._constants) - 1}"


def _recorded(
    operator: str,
) -> tuple[Callable[[Recorded, Number], Recorded], Callable[[Recorded, Number], Recorded]]:
    """Return the methods of an infix operator: the operator, and its reflected version."""
    return (
        lambda self, other: self.recorder.record(operator, self, other),
        lambda self, other: self.recorder.record(operator, other, self),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """The symbol of an input or a result in a formula: a number without a value."""

    recorder: Recorder
    name: str  # name of the input, or `v{i}` for the result of operation i

    __add__, __radd__ = _recorded("+")
    __sub__, __rsub__ = _recorded("-")
    __mul__, __rmul__ = _recorded("*")

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"coefficients cannot branch on {self.name}: their formula is recorded once, for every learning rate, step and mean; compute "
            f"with the functions of scalars.py"
        )

    def __eq__(self, other: object) -> NoReturn:
        self.__bool__()

    __hash__ = None  # pyright: ignore[reportAssignmentType]


Number = float | Tensor | Recorded
Step = int | Tensor | Recorded  # number of a step, from 1
