"""The kernel that decides whether a step happens: `formulas.verdict.judge` in one call."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from llvmlite import ir

from sharded_optim.backends.cpu.llvm import BIT, BYTE, INT64, POINTER, Builder, Value, at, counting, integer, load, store
from sharded_optim.backends.cpu.threads import SIGNATURE, Kernel, arguments_of, kernel_of
from sharded_optim.backends.cpu.vectors import Vector
from sharded_optim.formulas.verdict import (
    ABSENT,
    FOUND_INF,
    INVALID,
    KEY,
    NON_FINITE,
    PRESENT,
    REPLACES,
    SECTIONS,
    SQUARED_KEY,
    TAIL,
    agrees,
)

__all__ = ["VerdictArguments", "verdict_kernel"]


class VerdictArguments(NamedTuple):
    """What the kernel reads and writes: numbers, and addresses of contiguous arrays. In memory each is an int64."""

    sums: int  # int64 (SECTIONS * tensors + TAIL,)
    tensors: int
    skips: int
    flags: int  # int64 (3,), written; see `Verdict`
    proceed: int  # bool (), written


class Integer(Vector):
    """An int64, whose operations write LLVM instructions."""

    def __add__(self, other: Integer) -> Integer:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Integer(self.builder, self.builder.add(self.value, other.value))

    def __mul__(self, other: Integer) -> Integer:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Integer(self.builder, self.builder.mul(self.value, other.value))

    def __eq__(self, other: Integer) -> Integer:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Integer(self.builder, self.builder.icmp_signed("==", self.value, other.value))

    __hash__ = None  # pyright: ignore[reportAssignmentType]


@cache
def verdict_kernel() -> Kernel:
    return kernel_of(_verdict_function(), parallel=False)


def _verdict_function() -> ir.Function:
    function = ir.Function(ir.Module(), SIGNATURE, "verdict")
    builder: Builder = ir.IRBuilder(function.append_basic_block("entry"))
    sums, tensors, skips, flags, proceed = arguments_of(function, builder, VerdictArguments._fields).values()
    sums, flags, proceed = (builder.inttoptr(address, POINTER) for address in (sums, flags, proceed))
    yes = ir.Constant(BIT, 1)

    def row(number: int, column: Value) -> Value:
        return load(builder, at(builder, sums, builder.add(builder.mul(integer(number), tensors), column)))

    with counting(builder, integer(0), tensors, integer(1), [yes, yes]) as loop:
        consistent, finite = loop.values
        columns = [Integer(builder, row(number, loop.index)) for number in (ABSENT, PRESENT, KEY, SQUARED_KEY)]
        is_finite = builder.icmp_signed("==", row(NON_FINITE, loop.index), integer(0))
        loop.values = [builder.and_(consistent, agrees(*columns).value), builder.and_(finite, is_finite)]
    consistent, finite = loop.values
    is_zero = {each: builder.icmp_signed("==", row(SECTIONS, integer(TAIL + each)), integer(0)) for each in (INVALID, REPLACES, FOUND_INF)}
    consistent = builder.and_(consistent, builder.and_(is_zero[INVALID], is_zero[REPLACES]))
    no_inf = is_zero[FOUND_INF]
    happens = builder.and_(builder.and_(consistent, no_inf), builder.or_(finite, builder.icmp_signed("==", skips, integer(0))))
    store(builder, builder.zext(happens, BYTE), proceed)
    for index, flag in enumerate((consistent, finite, no_inf)):
        store(builder, builder.zext(flag, INT64), at(builder, flags, index))
    builder.ret_void()
    return function
