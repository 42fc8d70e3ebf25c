"""Kernels over a few numbers per tensor: sums over work items, this rank's vector, the verdict, and step counters.

They are loops in one LLVM module, compiled once; torch operations would take several times as long. The last three implement
`formulas/verdict.py`. Used by the CPU backend.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from llvmlite import ir

from sharded_optim.backends.cpu.llvm import (
    BIT,
    BYTE,
    FLOAT,
    INT64,
    POINTER,
    Builder,
    Value,
    at,
    compiled,
    constant,
    counting,
    integer,
    load,
    store,
)
from sharded_optim.backends.cpu.threads import SIGNATURE, Call, arguments_of, callable_of
from sharded_optim.formulas.verdict import DIFFERENCE, FOUND_INF, INVALID, NON_FINITE, REPLACES, SECTIONS, TAIL

__all__ = ["AdditionArguments", "CounterArguments", "ItemArguments", "Kernels", "VerdictArguments", "kernels"]


class ItemArguments(NamedTuple):
    """Arguments of `sum_items`. Here and below: numbers, and addresses of contiguous arrays; each is an int64 in memory."""

    items: int
    operands: int
    work: int  # int64 (items, 3), see `OperandTables`
    of_items: int  # int64 (items, 2): the item's sum, and a flag, 0 if all values were within the limit
    of_operands: int  # int64 (2, operands), written: the sum over the operand's items, and 1 if any flag was set


class AdditionArguments(NamedTuple):
    """Arguments of `add`."""

    operands: int
    tensors: int
    observed: int  # int64 (2, operands)
    counted: int  # int64 (2, operands), factors of `observed`
    slots: int  # int64 (operands,)
    vector: int  # int64 (SECTIONS * tensors + TAIL,), added to


class VerdictArguments(NamedTuple):
    """Arguments of `judge`."""

    sums: int  # int64 (SECTIONS * tensors + TAIL,)
    tensors: int
    skips: int  # 1 if a non-finite step is skipped, else 0
    flags: int  # int64 (3,), written; see `Verdict`
    proceed: int  # bool (), written


class CounterArguments(NamedTuple):
    """Arguments of `advance`."""

    counters: int  # fp32 (operands,), incremented by 1
    operands: int


class Kernels(NamedTuple):
    """Compiled functions with `SIGNATURE`."""

    sum_items: Call  # takes ItemArguments
    add: Call  # takes AdditionArguments
    judge: Call  # takes VerdictArguments
    advance: Call  # takes CounterArguments


@cache
def kernels() -> Kernels:
    module = ir.Module()
    functions = (_sum_items(module), _add(module), _judge(module), _advance(module))
    engine = compiled(module)
    return Kernels(*(callable_of(engine, function) for function in functions))


def _function(module: ir.Module, name: str, arguments: type[tuple[int, ...]]) -> tuple[ir.Function, Builder, list[Value]]:
    """Begin a function; return it with the values of its arguments."""
    function = ir.Function(module, SIGNATURE, name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    return function, builder, list(arguments_of(function, builder, arguments._fields).values())  # type: ignore[attr-defined]


def _sum_items(module: ir.Module) -> ir.Function:
    function, builder, (items, operands, work, of_items, of_operands) = _function(module, "sum_items", ItemArguments)
    work, of_items, of_operands = (builder.inttoptr(address, POINTER) for address in (work, of_items, of_operands))
    with counting(builder, integer(0), builder.mul(operands, integer(2)), integer(1)) as loop:
        store(builder, integer(0), at(builder, of_operands, loop.index))
    with counting(builder, integer(0), items, integer(1)) as loop:
        row = load(builder, at(builder, work, builder.mul(loop.index, integer(3))))
        first = builder.mul(loop.index, integer(2))
        total, flag = (load(builder, at(builder, of_items, builder.add(first, integer(index)))) for index in range(2))
        sums, flags = at(builder, of_operands, row), at(builder, of_operands, builder.add(operands, row))
        store(builder, builder.add(load(builder, sums), total), sums)
        store(builder, builder.or_(load(builder, flags), builder.zext(builder.icmp_signed("!=", flag, integer(0)), INT64)), flags)
    builder.ret_void()
    return function


def _add(module: ir.Module) -> ir.Function:
    function, builder, (operands, tensors, observed, counted, slots, vector) = _function(module, "add", AdditionArguments)
    observed, counted, slots, vector = (builder.inttoptr(address, POINTER) for address in (observed, counted, slots, vector))
    with counting(builder, integer(0), operands, integer(1)) as loop:
        slot = load(builder, at(builder, slots, loop.index))
        for row in range(SECTIONS):
            element = builder.add(builder.mul(operands, integer(row)), loop.index)
            term = builder.mul(*(load(builder, at(builder, each, element)) for each in (observed, counted)))
            place = at(builder, vector, builder.add(builder.mul(tensors, integer(row)), slot))
            store(builder, builder.add(load(builder, place), term), place)
    builder.ret_void()
    return function


def _judge(module: ir.Module) -> ir.Function:
    function, builder, (sums, tensors, skips, flags, proceed) = _function(module, "judge", VerdictArguments)
    sums, flags, proceed = (builder.inttoptr(address, POINTER) for address in (sums, flags, proceed))

    def row(number: int, column: Value) -> Value:
        return load(builder, at(builder, sums, builder.add(builder.mul(integer(number), tensors), column)))

    def is_zero(index: int) -> Value:
        return builder.icmp_signed("==", row(SECTIONS, integer(TAIL + index)), integer(0))

    with counting(builder, integer(0), tensors, integer(1), [ir.Constant(BIT, 1)]) as loop:
        is_finite = builder.icmp_signed("<=", row(NON_FINITE, loop.index), integer(0))
        loop.values = [builder.and_(loop.values[0], is_finite)]
    (finite,) = loop.values
    consistent = builder.and_(is_zero(DIFFERENCE), builder.and_(is_zero(INVALID), is_zero(REPLACES)))
    no_inf = is_zero(FOUND_INF)
    happens = builder.and_(builder.and_(consistent, no_inf), builder.or_(finite, builder.icmp_signed("==", skips, integer(0))))
    store(builder, builder.zext(happens, BYTE), proceed)
    for index, flag in enumerate((consistent, finite, no_inf)):
        store(builder, builder.zext(flag, INT64), at(builder, flags, index))
    builder.ret_void()
    return function


def _advance(module: ir.Module) -> ir.Function:
    function, builder, (counters, operands) = _function(module, "advance", CounterArguments)
    counters = builder.inttoptr(counters, POINTER)
    with counting(builder, integer(0), operands, integer(1)) as loop:
        counter = at(builder, counters, loop.index, FLOAT)
        store(builder, builder.fadd(load(builder, counter, FLOAT), constant(FLOAT, 1.0)), counter)
    builder.ret_void()
    return function
