"""Formats of IEEE floating-point numbers, in one array or two.

fp32, bf16, fp16               rounded to nearest, ties to even (IEEE 754 roundTiesToEven)
bf16_kahan, fp16_kahan         with a second array for the rounding error (Kahan 1965): value = param + kahan_comp
bf16_stochastic, ...           rounded up or down at random, so that the expected value is the value
bf16_kahan_stochastic, ...     as bf16_kahan, with the second array rounded at random
"""

from __future__ import annotations

import torch

from sharded_optim.formulas import operations as xp
from sharded_optim.storage.format import MAIN, Array, Format

__all__ = ["FLOAT_FORMATS", "KAHAN_COMP"]

KAHAN_COMP = "kahan_comp"


def load_fp32(stored):
    return stored


def store_fp32(value, uniform):
    return (value,)


def load_bf16(stored):
    return xp.from_bf16(stored)


def store_bf16(value, uniform):
    return (xp.to_bf16(value),)


def store_bf16_stochastic(value, uniform):
    return (xp.to_bf16(xp.stochastic_bf16(value, uniform)),)


def load_bf16_kahan(stored, compensation):
    return xp.from_bf16(stored) + xp.from_bf16(compensation)


def store_bf16_kahan(value, uniform):
    stored = xp.to_bf16(value)
    return stored, xp.to_bf16(value - xp.from_bf16(stored))


def store_bf16_kahan_stochastic(value, uniform):
    stored = xp.to_bf16(value)
    return stored, xp.to_bf16(xp.stochastic_bf16(value - xp.from_bf16(stored), uniform))


def load_fp16(stored):
    return xp.from_fp16(stored)


def store_fp16(value, uniform):
    return (xp.to_fp16(value),)


def store_fp16_stochastic(value, uniform):
    return (xp.to_fp16(xp.stochastic_fp16(value, uniform)),)


def load_fp16_kahan(stored, compensation):
    return xp.from_fp16(stored) + xp.from_fp16(compensation)


def store_fp16_kahan(value, uniform):
    stored = xp.to_fp16(value)
    return stored, xp.to_fp16(value - xp.from_fp16(stored))


def store_fp16_kahan_stochastic(value, uniform):
    stored = xp.to_fp16(value)
    return stored, xp.to_fp16(xp.stochastic_fp16(value - xp.from_fp16(stored), uniform))


FP32 = (Array(MAIN, torch.float32),)
BF16 = (Array(MAIN, torch.bfloat16),)
BF16_KAHAN = (*BF16, Array(KAHAN_COMP, torch.bfloat16))
FP16 = (Array(MAIN, torch.float16),)
FP16_KAHAN = (*FP16, Array(KAHAN_COMP, torch.float16))

FLOAT_FORMATS = (
    Format(name="fp32", arrays=FP32, load=load_fp32, store=store_fp32),
    Format(name="bf16", arrays=BF16, load=load_bf16, store=store_bf16),
    Format(name="bf16_kahan", arrays=BF16_KAHAN, load=load_bf16_kahan, store=store_bf16_kahan),
    Format(name="bf16_stochastic", arrays=BF16, load=load_bf16, store=store_bf16_stochastic, is_random=True),
    Format(name="bf16_kahan_stochastic", arrays=BF16_KAHAN, load=load_bf16_kahan, store=store_bf16_kahan_stochastic, is_random=True),
    Format(name="fp16", arrays=FP16, load=load_fp16, store=store_fp16),
    Format(name="fp16_kahan", arrays=FP16_KAHAN, load=load_fp16_kahan, store=store_fp16_kahan),
    Format(name="fp16_stochastic", arrays=FP16, load=load_fp16, store=store_fp16_stochastic, is_random=True),
    Format(name="fp16_kahan_stochastic", arrays=FP16_KAHAN, load=load_fp16_kahan, store=store_fp16_kahan_stochastic, is_random=True),
)
