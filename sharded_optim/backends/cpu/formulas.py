"""Kernels of coefficients, compiled from the formulas that `step/coefficients.py` records: one for each sequence of operations.

Values that do not depend on sums over ranks are computed once for consecutive operands with the same formula and the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

from llvmlite import ir

from sharded_optim.backends.cpu.llvm import (
    BIT,
    DOUBLE,
    FLOAT,
    INT64,
    POINTER,
    Builder,
    Type,
    Value,
    at,
    call,
    constant,
    counting,
    integer,
    load,
    store,
)
from sharded_optim.backends.cpu.threads import SIGNATURE, Kernel, arguments_of, kernel_of
from sharded_optim.formulas.recording import Operations
from sharded_optim.formulas.scalars import STEP_BITS

__all__ = ["FormulaArguments", "formula_kernel"]

OF_SUMS = ("total", "non_finite", "unit", "numel")  # inputs of `Sums`: they differ between operands with the same formula and step


class FormulaArguments(NamedTuple):
    """The arguments of a coefficient kernel: numbers, and addresses of contiguous arrays; each is an int64 in memory."""

    operands: int
    constants: int  # float64 (formulas, 1 + constants): 1 and the constants of a formula with the kernel's operations, else zeros
    formula_of: int  # int64 (operands,)
    table: int  # fp32 (operands, results), written
    steps: int  # fp32 (operands,)
    lr: int  # float64 (formulas,)
    totals: int = 0  # this and the following: arrays of `Sums`
    non_finite: int = 0
    slots: int = 0
    units: int = 0
    numels: int = 0


@cache
def formula_kernel(operations: Operations, *, several: bool) -> Kernel:
    """Build the kernel for all formulas with these operations.

    Args:
        several: whether operands have different formulas, so that the kernel reads `formula_of`.
    """
    return kernel_of(_formula_function(operations, several=several), parallel=False)


def _formula_function(operations: Operations, *, several: bool) -> ir.Function:
    function = ir.Function(ir.Module(), SIGNATURE, "coefficients")
    builder: Builder = ir.IRBuilder(function.append_basic_block("entry"))
    arguments = arguments_of(function, builder, FormulaArguments._fields)

    def element(name: str, index: Value, kind: Type = INT64) -> Value:
        return load(builder, at(builder, builder.inttoptr(arguments[name], POINTER), index, kind), kind)

    of_sums = _names_of_sums(operations)
    others = set(operations.names) - of_sums
    used = [
        operand
        for name, each in zip(operations.names, operations.instructions, strict=True)
        if name in of_sums
        for operand in each.operands
    ]
    allocas = {name: builder.alloca(DOUBLE) for name in dict.fromkeys([*used, *operations.results]) if name not in (*of_sums, "step")}
    functions = _functions(builder)
    with counting(builder, integer(0), arguments["operands"], integer(1), [integer(-1), integer(-1)]) as loop:
        formula = element("formula_of", loop.index) if several else integer(0)
        step = builder.add(builder.fptosi(element("steps", loop.index, FLOAT), INT64), integer(1))
        constants = builder.mul(formula, integer(1 + operations.constants))
        has_operations = builder.fcmp_ordered(">", element("constants", constants, DOUBLE), constant(DOUBLE, 0.0))
        with builder.if_then(has_operations):
            same_formula, same_step = (builder.icmp_signed("==", *pair) for pair in zip(loop.values, (formula, step), strict=True))
            differs = builder.not_(builder.and_(same_formula, same_step))
            with builder.if_then(differs):
                values: dict[str, Value] = {"step": step, "lr": element("lr", formula, DOUBLE)}
                for index in range(operations.constants):
                    values[f"c{index}"] = element("constants", builder.add(constants, integer(1 + index)), DOUBLE)
                values = operations.evaluate(functions, values, others)
                for name, address in allocas.items():
                    builder.store(values[name], address)
            values = {"step": step} | {name: builder.load(address, typ=DOUBLE) for name, address in allocas.items()}
            if of_sums:
                slot = element("slots", loop.index)
                values["total"] = builder.sitofp(element("totals", slot), DOUBLE)
                values["non_finite"] = element("non_finite", slot)
                values |= {name: element(f"{name}s", loop.index, DOUBLE) for name in ("unit", "numel")}
            values = operations.evaluate(functions, values, of_sums)
            first = builder.mul(loop.index, integer(len(operations.results)))
            for index, name in enumerate(operations.results):
                address = at(builder, builder.inttoptr(arguments["table"], POINTER), builder.add(first, integer(index)), FLOAT)
                store(builder, builder.fptrunc(values[name], FLOAT), address)
        loop.values = [formula, step]
    builder.ret_void()
    return function


def _names_of_sums(operations: Operations) -> set[str]:
    """Return the names of the inputs of `Sums` and of all results computed from them; empty if no operation uses them."""
    names: set[str] = set(OF_SUMS)
    for name, each in zip(operations.names, operations.instructions, strict=True):
        if not names.isdisjoint(each.operands):
            names.add(name)
    return names if len(names) > len(OF_SUMS) else set()


def _functions(builder: Builder) -> dict[str, Callable[..., Value]]:
    """Return the operations of `formulas/scalars.py` as functions that write LLVM instructions, keyed by name."""

    def maximum(a: Value, least: Value) -> Value:
        keeps = builder.or_(builder.fcmp_ordered(">", a, least), builder.fcmp_unordered("uno", a, a))
        return builder.select(keeps, a, least)

    def power(base: Value, exponent: Value) -> Value:
        with counting(builder, integer(0), integer(STEP_BITS), integer(1), [constant(DOUBLE, 1.0), base]) as loop:
            result, square = loop.values
            has_bit = builder.trunc(builder.lshr(exponent, loop.index), BIT)
            loop.values = [builder.select(has_bit, builder.fmul(result, square), result), builder.fmul(square, square)]
        return loop.values[0]

    def at_first_step(step: Value, value: Value, otherwise: Value) -> Value:
        return builder.select(builder.icmp_signed("==", step, integer(1)), value, otherwise)

    def nan_where(flag: Value, value: Value) -> Value:
        return builder.select(builder.icmp_signed(">", flag, integer(0)), constant(DOUBLE, math.nan), value)

    return {
        "+": builder.fadd,
        "-": builder.fsub,
        "*": builder.fmul,
        "double": lambda integer: builder.sitofp(integer, DOUBLE),
        "divide": builder.fdiv,
        "sqrt": partial(call, builder, "llvm.sqrt.f64", DOUBLE),
        "maximum": maximum,
        "power": power,
        "at_first_step": at_first_step,
        "nan_where": nan_where,
    }
