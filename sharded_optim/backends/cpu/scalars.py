"""Scalar functions that numba compiles into the kernels of `cpu.py`: the operations of an algorithm's math, and how values are stored.

`divide` to `where` and `from_bf16` to `stochastic_fp16` are `formulas/operations.py` for scalars; `uniform` is `noise.py`. Nothing is
contracted or reordered (no fastmath), so the bits are those of the eager backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

INLINE: dict[str, Any] = {"inline": "always", "error_model": "numpy"}


def scalar(function: Callable[..., Any]) -> Callable[..., Any]:
    return njit(**INLINE)(function)


def lowered(function: Callable[..., Any]) -> Any:
    """A function that says itself how it is lowered to LLVM."""
    return intrinsic(function)


# ------------------------------------------------------------------------------------------------------------------- operations


@scalar
def divide(a, b):
    return a / b


@scalar
def maximum(a, b):
    return a if a > b or a != a else b  # NaN wins, as in torch


@scalar
def sqrt(a):
    return np.sqrt(a)


@scalar
def where(condition, a, b):
    return a if condition else b


# ------------------------------------------------------------------------------------------------------------------------- bits


@lowered
def bits_of(typingctx, value):  # float32 -> uint32, float64 -> int64
    into = types.uint32 if value == types.float32 else types.int64

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return into(value), codegen


@lowered
def float_of(typingctx, bits):  # uint32 -> float32
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), codegen


@lowered
def half_bits(typingctx, value):  # float32 -> uint16, IEEE half, rounded to nearest even
    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@lowered
def float_of_half(typingctx, bits):  # uint16 -> float32
    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@lowered
def pointer(typingctx, address, dtype):  # (int64, NumPy dtype) -> a C pointer
    signature = types.CPointer(dtype.dtype)(types.int64, dtype)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return signature, codegen


# -------------------------------------------------------------------------------------- storage, 16-bit elements as their bits


@scalar
def from_bf16(stored):
    return float_of(np.uint32(stored) << np.uint32(16))


@scalar
def to_bf16(value):
    bits = bits_of(value)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded) if value == value else np.uint16(0x7FC0)


@scalar
def from_fp16(stored):
    return float_of_half(stored)


@scalar
def to_fp16(value):
    return half_bits(value)


@scalar
def stochastic(value, uniform, epsilon, smallest):
    magnitude = abs(value)
    power = float_of(bits_of(magnitude) & np.uint32(0x7F800000))
    spacing = power * epsilon
    spacing = spacing if spacing > smallest else smallest
    scaled = magnitude / spacing
    below = math.floor(scaled)
    rounded = (np.float32(below) + (np.float32(1.0) if uniform < scaled - below else np.float32(0.0))) * spacing
    return math.copysign(rounded, value) if magnitude < np.float32(np.inf) else value


@scalar
def stochastic_bf16(value, uniform):
    return stochastic(value, uniform, np.float32(2.0**-7), np.float32(2.0**-133))


@scalar
def stochastic_fp16(value, uniform):
    return stochastic(value, uniform, np.float32(2.0**-10), np.float32(2.0**-24))


# ------------------------------------------------------------------------------------------------------------------------ noise

GOLDEN, MULTIPLIER_1, MULTIPLIER_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@scalar
def uniform(key, index):
    bits = np.uint64(key) + np.uint64(index) * GOLDEN
    bits = (bits ^ (bits >> np.uint64(30))) * MULTIPLIER_1
    bits = (bits ^ (bits >> np.uint64(27))) * MULTIPLIER_2
    bits = bits ^ (bits >> np.uint64(31))
    return np.float32(bits >> np.uint64(40)) * np.float32(2.0**-24)


# -------------------------------------------------------------------------------------------------------------------------- sum

MAGIC = 1.5 * 2.0**52
MAGIC_BITS = np.float64(MAGIC).view(np.int64)


@lowered
def multiply_add(typingctx, a, b, c):  # a * b + c of float64, fused or not as is faster: only for products that are exact
    def codegen(context, builder, signature, args):
        double = ir.DoubleType()
        function = builder.module.declare_intrinsic("llvm.fmuladd", [double], ir.FunctionType(double, [double] * 3))
        return builder.call(function, args)

    return types.float64(types.float64, types.float64, types.float64), codegen


@scalar
def fixed_point(value, scale):
    """round_half_even(value * scale) + MAGIC_BITS for 0 <= value * scale < 2**51, with a power of two for scale."""
    return bits_of(multiply_add(np.float64(value), scale, MAGIC))


@lowered
def add_int32(typingctx, a, b):  # int32; numba's own addition gives int64
    def codegen(context, builder, signature, args):
        return builder.add(*args)

    return types.int32(types.int32, types.int32), codegen


@scalar
def index_of(segments, row, element):
    """Index in the whole tensor of an element of a segment: (start, run, stride) in `segments[row]`."""
    run = segments[row, 1]
    return segments[row, 0] + element // run * segments[row, 2] + element % run
