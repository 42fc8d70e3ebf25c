"""Whether a step happens, in one launch: `consensus.judge`, of which each torch operation would be a launch by itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharded_optim.backends.triton_compiler import compiled, executed, interpreted
from sharded_optim.backends.triton_scalars import add
from sharded_optim.consensus import (
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
    Verdict,
    agrees,
    streak_length,
)

__all__ = ["ARGUMENTS", "BLOCK", "OPTIONS", "judge", "verdict_kernel"]

BLOCK = 1024  # tensors that its one program looks at together
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
ARGUMENTS = ("sums", "tensors", "before_told", "before_first", "told", "proceed", "first")
COLUMNS = {"absent": ABSENT, "present": PRESENT, "key": KEY, "squared_key": SQUARED_KEY}
SOURCE = f'''"""Made by sharded_optim/backends/triton_verdict.py."""

@triton.jit(do_not_specialize=ARGUMENTS)
def verdict({", ".join(ARGUMENTS)}, FOLLOWS: tl.constexpr, SKIPS: tl.constexpr, BLOCK: tl.constexpr):
    before = tl.load(before_told + 2) if FOLLOWS else tl.load(sums) * 0
    disagree = tl.full((BLOCK,), 0, tl.int32)
    not_finite = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, tensors, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < tensors
        non_finite = tl.load(sums + {NON_FINITE} * tensors + at, mask=inside, other=0)
        {"; ".join(f"{name} = tl.load(sums + {row} * tensors + at, mask=inside, other=0)" for name, row in COLUMNS.items())}
        disagree += tl.where(agrees({", ".join(COLUMNS)}), 0, 1)
        not_finite += tl.where(non_finite == 0, 0, 1)
        if FOLLOWS:
            known = tl.load(before_first + at, mask=inside, other=0)
            non_finite = tl.where(before == 0, non_finite, known)
        tl.store(first + at, non_finite, mask=inside)
    end = sums + {SECTIONS} * tensors + {TAIL}
    invalid = tl.load(end + {INVALID}) + tl.load(end + {REPLACES})  # neither is negative
    found_inf = tl.load(end + {FOUND_INF})
    finite = tl.reduce(not_finite, 0, add) == 0
    consistent = (tl.reduce(disagree, 0, add) == 0) & (invalid == 0)
    goes_on = consistent & (found_inf == 0)
    tl.store(proceed, goes_on & finite if SKIPS else goes_on)
    tl.store(told, consistent.to(tl.int64))
    tl.store(told + 1, finite.to(tl.int64))
    tl.store(told + 2, streak_length(before, finite, found_inf))
'''


def judge(sums: Tensor, before: Verdict | None, *, skips: bool) -> Verdict:
    """See `consensus.judge`."""
    tensors = (len(sums) - TAIL) // SECTIONS
    verdict = Verdict(
        told=torch.empty(3, dtype=torch.int64, device=sums.device),
        proceed=torch.empty((), dtype=torch.bool, device=sums.device),
        first=torch.empty(tensors, dtype=torch.int64, device=sums.device),
    )
    last = verdict if before is None else before
    arguments = sums, tensors, last.told, last.first, verdict.told, verdict.proceed, verdict.first
    verdict_kernel()[1,](*arguments, FOLLOWS=before is not None, SKIPS=skips, BLOCK=BLOCK, **OPTIONS)
    return verdict


def verdict_kernel() -> Any:
    return _verdict_kernel(interpreted=interpreted())


@cache
def _verdict_kernel(*, interpreted: bool) -> Any:
    functions = {each.__name__: compiled(each, interpreted=interpreted) for each in (agrees, streak_length, add)}
    return executed("verdict", SOURCE, {"triton": triton, "tl": tl, "ARGUMENTS": list(ARGUMENTS), **functions})
