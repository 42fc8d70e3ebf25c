"""Kernels for an algorithm's update and for the sums of a statistic. Used by the CPU backend.

A kernel is compiled for each combination of algorithm and formats in use, in about 20 ms. The functions of algorithms and formats are those
that the eager backend runs, with `xp` bound to `vectors.py` (see `rebinding.py`); calling them writes the kernel.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from llvmlite import ir

from sharded_optim.backends.cpu.llvm import DOUBLE, FLOAT, INT32, INT64, integer, is_x86, is_zen
from sharded_optim.backends.cpu.loops import Total, Writer, traced
from sharded_optim.backends.cpu.threads import Kernel, kernel_of
from sharded_optim.backends.cpu.vectors import FIXED_POINT_OF_ZERO, fixed_point
from sharded_optim.backends.rebinding import argument_count
from sharded_optim.formulas import Algorithm, Statistic
from sharded_optim.storage.format import Format

__all__ = ["observe_function", "observe_kernel", "update_function", "update_kernel"]


class Ahead(NamedTuple):
    """Prefetch distances in bytes, ahead of the address that a pass reads; 0 disables prefetching."""

    update: int
    observe: int


# Hardware prefetchers stop at the end of a page, and an update reads from four pages at a time. The distances are from benchmarks/NOTES.md.
AHEAD = Ahead(2048, 0) if is_zen() else Ahead(1280, 2048) if is_x86() else Ahead(0, 0)  # not measured on ARM

SUM, ANY_BEYOND = Total("add", INT64), Total("or", INT32)  # sum of the statistic, and whether any value is above the limit


@cache
def update_kernel(algorithm: Algorithm, formats: tuple[Format, ...], grad_format: Format) -> Kernel:
    return kernel_of(update_function(algorithm, formats, grad_format))


@cache
def observe_kernel(statistic: Statistic | None, grad_format: Format, state_formats: tuple[Format, ...]) -> Kernel:
    return kernel_of(observe_function(statistic, grad_format, state_formats))


def update_function(algorithm: Algorithm, formats: tuple[Format, ...], grad_format: Format) -> ir.Function:
    """Write the kernel of an algorithm's update.

    Args:
        formats: storage formats of the parameter and of each moment.
    """
    update, stores = traced(algorithm.update), [traced(fmt.store) for fmt in formats]
    is_random = [fmt.is_random for fmt in formats]
    writer = Writer((*formats, grad_format), argument_count(algorithm.update) - len(formats) - 1, ahead=AHEAD.update)
    with writer.items() as item, item.runs(ordered=any(is_random)) as run:
        for elements in item.passes(run):
            param, *state, grad = elements.loaded()
            values = update(param, grad, *state, *elements.numbers)
            draws = elements.draws(is_random)
            elements.store([array for store, value, draw in zip(stores, values, draws, strict=True) for array in store(value, draw)])
    return writer.function


def observe_function(statistic: Statistic | None, grad_format: Format, state_formats: tuple[Format, ...]) -> ir.Function:
    """Write the kernel that sums a statistic and checks its limit; without a statistic it only checks that squared gradients are finite."""
    observe = traced(statistic.observe) if statistic else None
    coefficients = argument_count(statistic.observe) - len(state_formats) - 1 if statistic else 0
    numbers = {"limits": FLOAT, "scales": DOUBLE} if statistic else {}
    writer = Writer((*state_formats, grad_format), coefficients, numbers, ahead=AHEAD.observe)
    with writer.items([SUM, ANY_BEYOND]) as item:
        with item.runs(ordered=False) as run:
            for elements in item.passes(run):
                *state, grad = elements.loaded()
                if observe is None:
                    is_within = grad * grad < float("inf")
                else:
                    *numbers, limit, scale = elements.numbers
                    value = observe(grad, *state, *numbers)
                    is_within = value <= limit
                    elements.add(0, fixed_point(value, scale))
                elements.add(1, is_within.instruction("not_").converted("sext", INT32))
        if observe is not None:
            item.totals[0] = item.builder.sub(item.totals[0], item.builder.mul(item.count, integer(FIXED_POINT_OF_ZERO)))
        item.write_totals()
    return writer.function
