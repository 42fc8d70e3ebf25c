"""Vectors whose operations write LLVM instructions, and the operations of an algorithm's math on them. Used by `loops.py`.

A function of an algorithm or of a storage format is called once, with a `Vector` for each of its arguments. Every operation becomes one
instruction on all lanes and rounds once, so the bits are those of the eager backend. `divide` to `stochastic_fp16` implement
`formulas/operations.py`, and `uniform` implements `noise.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NoReturn, TypeAlias

from llvmlite import ir

from sharded_optim.backends.cpu.llvm import (
    DOUBLE,
    FLOAT,
    INT16,
    INT32,
    INT64,
    Builder,
    Type,
    Value,
    call,
    constant,
    integer,
    lanes_of,
    splat,
    suffix,
    with_lanes,
)
from sharded_optim.backends.noise import RESOLUTION
from sharded_optim.storage.splitmix64 import GOLDEN, MULTIPLIER_1, MULTIPLIER_2

__all__ = [
    "FIXED_POINT_OF_ZERO",
    "Deferred",
    "Vector",
    "divide",
    "fixed_point",
    "from_bf16",
    "from_fp16",
    "maximum",
    "sqrt",
    "stochastic_bf16",
    "stochastic_fp16",
    "to_bf16",
    "to_fp16",
    "uniform",
    "where",
]

Operand: TypeAlias = "Vector | float"  # a number stands for a vector with the number in all lanes


class Vector:
    """Values of consecutive elements: fp32, the bits of 16-bit elements, integers, or the booleans of a comparison.

    Attributes:
        value: an LLVM vector with one lane per element; a scalar for one element.
    """

    def __init__(self, builder: Builder, value: Value) -> None:
        self.builder, self.value = builder, value

    def like(self, operand: Operand) -> Vector:
        """Convert a number to a vector of this type; return a vector unchanged."""
        return operand if isinstance(operand, Vector) else Vector(self.builder, constant(self.value.type, operand))

    def instruction(self, name: str, *operands: Operand) -> Vector:
        return Vector(self.builder, getattr(self.builder, name)(self.value, *(self.like(each).value for each in operands)))

    def intrinsic(self, name: str, *operands: Operand) -> Vector:
        kind = self.value.type
        values = [self.like(each).value for each in operands]
        return Vector(self.builder, call(self.builder, f"llvm.{name}.{suffix(kind)}", kind, self.value, *values))

    def converted(self, name: str, element: Type) -> Vector:
        """Convert to another element type with the LLVM conversion of this name; "bitcast" keeps the bits."""
        return Vector(self.builder, getattr(self.builder, name)(self.value, with_lanes(element, lanes_of(self.value.type))))

    def compared(self, operator: str, other: Operand) -> Vector:
        """Compare lane by lane; False if either value is NaN."""
        return Vector(self.builder, self.builder.fcmp_ordered(operator, self.value, self.like(other).value))

    @property
    def is_nan(self) -> Vector:
        return Vector(self.builder, self.builder.fcmp_unordered("uno", self.value, self.value))

    def __add__(self, other: Operand) -> Vector:
        return self.instruction("fadd", other)

    def __sub__(self, other: Operand) -> Vector:
        return self.instruction("fsub", other)

    def __mul__(self, other: Operand) -> Vector:
        return self.instruction("fmul", other)

    def __radd__(self, other: float) -> Vector:
        return self.like(other) + self

    def __rsub__(self, other: float) -> Vector:
        return self.like(other) - self

    def __rmul__(self, other: float) -> Vector:
        return self.like(other) * self

    def __lt__(self, other: Operand) -> Vector:
        return self.compared("<", other)

    def __le__(self, other: Operand) -> Vector:
        return self.compared("<=", other)

    def __gt__(self, other: Operand) -> Vector:
        return self.compared(">", other)

    def __ge__(self, other: Operand) -> Vector:
        return self.compared(">=", other)

    def __eq__(self, other: Operand) -> Vector:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.compared("==", other)

    def __ne__(self, other: Operand) -> Vector:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Vector(self.builder, self.builder.fcmp_unordered("!=", self.value, self.like(other).value))  # True if either is NaN

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a formula cannot branch on the value of an element; write xp.where(condition, a, b) for if, and, or, not, min, max"
        )


class Deferred(Vector):
    """A vector whose instructions are written at its first use, so that unused values are not loaded."""

    def __init__(self, builder: Builder, write: Callable[[], Vector]) -> None:
        self.builder, self._write = builder, write

    @cached_property
    def value(self) -> Value:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._write().value


# ----------------------------------------------------------------------------------------------------------------------- operations


def divide(a: Operand, b: Operand) -> Vector:
    a, b = _vectors(a, b)
    return a.instruction("fdiv", b)


def maximum(a: Operand, b: Operand) -> Vector:
    a, b = _vectors(a, b)
    is_first = (a > b).instruction("or_", a.is_nan)  # NaN wins, as in torch
    return where(is_first, a, b)


def sqrt(a: Vector) -> Vector:
    return a.intrinsic("sqrt")


def where(condition: Vector, a: Operand, b: Operand) -> Vector:
    kind = with_lanes(FLOAT, lanes_of(condition.value.type))
    values = [each.value if isinstance(each, Vector) else constant(kind, each) for each in (a, b)]
    return Vector(condition.builder, condition.builder.select(condition.value, *values))


def _vectors(a: Operand, b: Operand) -> tuple[Vector, Vector]:
    """Convert two operands to vectors; at most one of them may be a number."""
    vector = a if isinstance(a, Vector) else b
    assert isinstance(vector, Vector), "at least one operand depends on an argument of the formula"
    return vector.like(a), vector.like(b)


# ------------------------------------------------------------------------------------------- storage: 16-bit elements are their bits


def from_bf16(stored: Vector) -> Vector:
    return stored.converted("zext", INT32).instruction("shl", 16).converted("bitcast", FLOAT)


def to_bf16(value: Vector) -> Vector:
    bits = value.converted("bitcast", INT32)
    last = bits.instruction("lshr", 16).instruction("and_", 1)  # last bit that is kept: ties round to even
    rounded = bits.instruction("add", last).instruction("add", 0x7FFF).instruction("lshr", 16).converted("trunc", INT16)
    return where(value.is_nan, rounded.like(0x7FC0), rounded)


def from_fp16(stored: Vector) -> Vector:
    return stored.converted("bitcast", ir.HalfType()).converted("fpext", FLOAT)


def to_fp16(value: Vector) -> Vector:
    return value.converted("fptrunc", ir.HalfType()).converted("bitcast", INT16)


def stochastic_bf16(value: Vector, uniform: Operand) -> Vector:
    """Round away from zero if the 16 bits that are cut off, as a fraction, exceed the random number. bf16 has the exponents of fp32."""
    bits = value.converted("bitcast", INT32)
    distance = bits.instruction("and_", 0xFFFF).converted("sitofp", FLOAT) * 2.0**-16
    below = bits.instruction("and_", 0xFFFF0000)
    rounded = where(distance > uniform, below.instruction("add", 0x10000), below).converted("bitcast", FLOAT)
    return where(value.is_nan, value, rounded)


def stochastic_fp16(value: Vector, uniform: Operand) -> Vector:
    """Round as `operations.py` does, but multiply by the inverse of a power of two, which is exact like the division by it."""
    magnitude = value.intrinsic("fabs")
    exponent = magnitude.converted("bitcast", INT32).instruction("and_", 0x7F800000)
    spacing = exponent.instruction("sub", 10 << 23).intrinsic("smax", 0x33800000)  # 2**-10 of the power of two, at least 2**-24
    inverse = spacing.like(0x7F000000).instruction("sub", spacing).converted("bitcast", FLOAT)
    scaled = magnitude * inverse
    below = scaled.intrinsic("floor")
    rounded = (below + where(scaled - below > uniform, 1.0, 0.0)) * spacing.converted("bitcast", FLOAT)
    return where(magnitude < float("inf"), rounded.intrinsic("copysign", value), value)


# ------------------------------------------------------------------------------------------------------------------------------ sum

# float64 numbers of this size have an ulp of 1, so adding it to a smaller number rounds that to an integer, half to even.
MAGIC = 1.5 * 2.0**52
FIXED_POINT_OF_ZERO = 0x4338000000000000  # the bits of MAGIC


def fixed_point(value: Vector, scale: Vector) -> Vector:
    """Compute round_half_even(value * scale) + FIXED_POINT_OF_ZERO, in int64, for 0 <= value * scale < 2**51.

    Args:
        value: fp32.
        scale: a power of two, in fp64.
    """
    value = value.converted("fpext", DOUBLE)
    # fmuladd lets LLVM fuse or not, whichever is faster: the product is exact, so the result is the same.
    return value.intrinsic("fmuladd", scale, MAGIC).converted("bitcast", INT64)


# ---------------------------------------------------------------------------------------------------------------------------- noise


def uniform(
    builder: Builder,
    key: Value,  # int64
    index: Value,  # int64, index in the whole tensor of the first of `lanes` consecutive elements
    lanes: int,
) -> Vector:
    """Draw a number in [0, 1) for each of `lanes` elements; see `noise.uniform`."""
    first = builder.add(key, builder.mul(index, integer(GOLDEN)))
    offsets = ir.Constant(with_lanes(INT64, lanes), [lane * GOLDEN % 2**64 for lane in range(lanes)] if lanes > 1 else 0)
    bits = Vector(builder, builder.add(splat(builder, first, lanes), offsets))
    for shift, multiplier in ((30, MULTIPLIER_1), (27, MULTIPLIER_2)):
        bits = bits.instruction("xor", bits.instruction("lshr", shift)).instruction("mul", multiplier)
    bits = bits.instruction("xor", bits.instruction("lshr", 31))
    return bits.instruction("lshr", 64 - RESOLUTION).converted("trunc", INT32).converted("sitofp", FLOAT) * 2.0**-RESOLUTION
