"""Functions that Triton compiles into the kernels of this package: operations of an algorithm's math, storage, random numbers and sums.

`divide` to `where` and `from_bf16` to `stochastic_fp16` implement `formulas/operations.py` for a block of elements; `uniform` implements
`noise.py`. They have no decorator: `compiler.py` compiles them together with the functions of algorithms and formats, for a device or for
Triton's interpreter. They use only features that Triton has on every device.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# Triton's functions declare no return types.

from __future__ import annotations

import triton.language as tl

# ------------------------------------------------------------------------------------------------------------------- operations


def divide(a, b):
    return tl.div_rn(a, b)  # `/` is approximate on some devices


def maximum(a, b):
    return tl.where((a > b) | (a != a), a, b)  # NaN wins, as in torch


def sqrt(a):
    return tl.sqrt_rn(a)


def where(condition, a, b):
    return tl.where(condition, a, b)


# ----------------------------------------------------------------------------------------------------------------------- memory


def pointer(address, dtype: tl.constexpr, aligned: tl.constexpr):
    at = address.to(tl.pointer_type(dtype))
    return tl.multiple_of(at, 16) if aligned else at


# ---------------------------------------------------------------------------------------------------------------------- storage


def from_bf16(stored):
    return stored.to(tl.float32)


def to_bf16(value):
    return value.to(tl.bfloat16)


def from_fp16(stored):
    return stored.to(tl.float32)


def to_fp16(value):
    return value.to(tl.float16)


def stochastic(value, uniform, epsilon, smallest_bits):
    """Round a value to one of its two neighbours in the target dtype.

    Args:
        value: fp32.
        uniform: random number in [0, 1), fp32.
        epsilon: machine epsilon of the target dtype.
        smallest_bits: bits of the target dtype's smallest positive number as fp32. It may be denormal, unlike a constant of Triton.
    """
    magnitude = tl.abs(value)
    bits = magnitude.to(tl.int32, bitcast=True)
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    spacing = tl.maximum((power * epsilon).to(tl.int32, bitcast=True), smallest_bits).to(tl.float32, bitcast=True)
    scaled = tl.div_rn(magnitude, spacing)
    below = scaled.to(tl.int32).to(tl.float32)  # it is below 2**11; tl.floor flushes denormal numbers
    rounded = (below + tl.where(uniform < scaled - below, 1.0, 0.0)) * spacing
    sign = value.to(tl.int32, bitcast=True) ^ bits
    return tl.where(bits < 0x7F800000, (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True), value)


def stochastic_bf16(value, uniform):
    return stochastic(value, uniform, 0.0078125, 0x00010000)  # 2**-7, 2**-133


def stochastic_fp16(value, uniform):
    return stochastic(value, uniform, 0.0009765625, 0x33800000)  # 2**-10, 2**-24


# Triton's interpreter truncates when it converts to bfloat16, and converts denormal bfloat16 numbers wrongly.


def from_bf16_interpreted(stored):
    return (stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


def to_bf16_interpreted(value):
    bits = value.to(tl.uint32, bitcast=True)
    rounded = tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


# ------------------------------------------------------------------------------------------------------------------------ noise

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB)


def uniform(key, index):
    bits = key.to(tl.uint64) + index.to(tl.uint64) * GOLDEN
    bits = (bits ^ (bits >> 30)) * MULTIPLIER_1
    bits = (bits ^ (bits >> 27)) * MULTIPLIER_2
    bits = bits ^ (bits >> 31)
    return (bits >> 40).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2**-24


def run_of(segments, row, first, count):
    """Locate element `first` of a segment, whose (start, run, stride) is row `row` of `segments`; the result is passed to `index_of`.

    Returns:
        index: index of the element in the whole tensor.
        left: number of elements from it to the end of its run.
        length: number of elements of a run, int32, limited to `count`, which does not affect `index_of`: it divides smaller numbers only.
        gap: number of elements between the end of a run and the start of the next.
    """
    start = tl.load(segments + 3 * row)
    run = tl.load(segments + 3 * row + 1)
    stride = tl.load(segments + 3 * row + 2)
    within = first % run
    return start + first // run * stride + within, run - within, tl.minimum(run, count).to(tl.int32), stride - run


def index_of(index, left, length, gap, count, element):
    """Return the indices in the whole tensor, int64 (n,), of elements at offsets `element`, int32 (n,), below count; see `run_of`."""
    if left >= count:  # the common case: all elements are in one run, so that no division is needed
        indices = index + element
    else:
        beyond = element - left.to(tl.int32)
        indices = index + element + tl.where(beyond < 0, 0, (beyond // length + 1) * gap)
    return indices


# -------------------------------------------------------------------------------------------------------------------------- sum


# A statistic is summed exactly, as an integer in units of 1 / scale. Adding 1.5 * 2**23 units, for a unit that is a power of two, rounds a
# smaller fp32 number to a multiple of the unit, half to even. The low bits of the result then hold the number of units, offset by the bits
# of the added constant. Three such roundings, each of the exact remainder of the one before, give three signed limbs of 17 bits. Limbs are
# 32 bits long because GPUs have few 64-bit units: converting to int64 would take longer than the memory accesses.

LIMB = tl.constexpr(17)  # bits per limb: 3 * LIMB is TERM_BITS of statistics.py, and the sum of 2**13 limbs fits in 32 bits
ROUNDER = tl.constexpr(1.5 * 2.0**23)
STEP = tl.constexpr(2.0**17)


def elements(block: tl.constexpr, width: tl.constexpr):
    """Return 0, 1, ... as int32 (block // width, width): one thread loads or stores a row in one access, and reduces it by itself."""
    return tl.arange(0, block // width)[:, None] * width + tl.arange(0, width)[None, :]


def inverse_of_power(scale):
    """Return 1 / scale for a power of two, fp32, by negating its exponent."""
    return (0x7F000000 - bits_of(scale)).to(tl.float32, bitcast=True)


def fixed_point(value, unit):
    """Split round_half_even(value / unit) into limbs (low, middle, high) for `bits_of` and `add_up`: fp32, each offset by its rounder.

    Args:
        value: fp32, in [0, 2**51 * unit); the limbs of other values are undefined.
        unit: 1 / scale, a power of two for which 2**58 * unit is finite.
    """
    to_low = unit * ROUNDER
    to_middle = to_low * STEP
    to_high = to_middle * STEP
    high = value + to_high
    rest = value - (high - to_high)
    middle = rest + to_middle
    rest = rest - (middle - to_middle)
    return rest + to_low, middle, high


def bits_of(value):
    return value.to(tl.int32, bitcast=True)


def add_up(low, middle, high, lanes, unit, target):
    """Atomically add a sum of fixed-point integers to `target`. Each integer was split into three limbs by `fixed_point`.

    Args:
        low, middle, high: int32 (n,): n partial sums of the bits (`bits_of`) of one limb, modulo 2**32.
        lanes: how many integers were summed, over all n.
        unit: as given to `fixed_point`.
        target: pointer to int64.
    """
    to_low = unit * ROUNDER
    to_middle = to_low * STEP
    total = (tl.reduce(high, 0, add) - lanes * bits_of(to_middle * STEP)).to(tl.int64) << LIMB
    total = (total + (tl.reduce(middle, 0, add) - lanes * bits_of(to_middle))) << LIMB
    tl.atomic_add(target, total + (tl.reduce(low, 0, add) - lanes * bits_of(to_low)), sem="relaxed")


def add(a, b):
    return a + b


def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


def set_flag(is_set, target):
    """Write 1 to `target` if any element is True. All threads write the same value, so no atomic operation is needed."""
    tl.store(target + tl.full(is_set.shape, 0, tl.int32), 1, mask=is_set)
