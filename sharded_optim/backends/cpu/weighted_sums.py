"""The compiled part of position hashes (`position_hash.py`): a weighted sum of 64-bit words at the speed of reading memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from llvmlite import ir

from sharded_optim.backends.cpu.llvm import (
    INT64,
    POINTER,
    VOID,
    Builder,
    Value,
    at,
    compiled,
    constant,
    counting,
    integer,
    load,
    reduced,
    register_bytes,
    store,
    with_lanes,
)

__all__ = ["weighted_sum"]

LANES = 4 * register_bytes() // 8  # words per pass


@cache
def weighted_sum() -> Callable[[int, int, int, int], None]:
    """Return the compiled function (address of words, address of weights, number of words, address of the result) -> None.

    It writes the sum of (word + (word >> 32)) * weight, modulo 2**64, as an int64.
    """
    function = ir.Function(ir.Module(), ir.FunctionType(VOID, [POINTER, POINTER, INT64, POINTER]), "weighted_sum")
    words, weights, count, result = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    whole = builder.and_(count, integer(-LANES))
    total = integer(0)
    for lanes, begin, end in ((LANES, integer(0), whole), (1, whole, count)):
        with counting(builder, begin, end, integer(lanes), [constant(with_lanes(INT64, lanes), 0)]) as loop:
            terms = _terms(builder, at(builder, words, loop.index), at(builder, weights, loop.index), lanes)
            loop.values = [builder.add(loop.values[0], terms)]
        total = builder.add(total, reduced(builder, "add", loop.values[0]))
    store(builder, total, result)
    builder.ret_void()
    address = compiled(function.module).get_function_address(function.name)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)(address)


def _terms(builder: Builder, words: Value, weights: Value, lanes: int) -> Value:
    kind = with_lanes(INT64, lanes)
    word = load(builder, words, kind)
    return builder.mul(builder.add(word, builder.ashr(word, constant(kind, 32))), load(builder, weights, kind))
