"""A new storage format, as its one file would be: three bfloat16 numbers, which hold all 24 bits of a float32."""

from __future__ import annotations

import torch

from sharded_optim.formulas import operations as xp
from sharded_optim.storage.format import MAIN, Array, Format

__all__ = ["PARTS", "load_parts"]


def load_parts(high, middle, low):
    return (xp.from_bf16(high) + xp.from_bf16(middle)) + xp.from_bf16(low)


def store_parts(value, uniform):
    high = xp.to_bf16(value)
    rest = value - xp.from_bf16(high)
    middle = xp.to_bf16(rest)
    return high, middle, xp.to_bf16(rest - xp.from_bf16(middle))


PARTS = Format(
    name="bf16 in 3 parts",
    arrays=(Array(MAIN, torch.bfloat16), Array("middle", torch.bfloat16), Array("low", torch.bfloat16)),
    load=load_parts,
    store=store_parts,
)
