"""Decide in one launch whether a step happens: `formulas.verdict.judge`, where each torch operation would be a launch."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharded_optim.backends.triton.compiler import compiled, executed, interpreted
from sharded_optim.backends.triton.scalars import add
from sharded_optim.formulas.verdict import DIFFERENCE, FOUND_INF, INVALID, NON_FINITE, REPLACES, SECTIONS, TAIL, Verdict

__all__ = ["ARGUMENTS", "BLOCK", "OPTIONS", "judge", "verdict_kernel"]

BLOCK = 1024  # tensors that its one program looks at together
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
ARGUMENTS = ("sums", "tensors", "flags", "proceed")
SOURCE = f'''"""Made by sharded_optim/backends/triton/verdict.py."""

@triton.jit(do_not_specialize=ARGUMENTS)
def verdict({", ".join(ARGUMENTS)}, SKIPS: tl.constexpr, BLOCK: tl.constexpr):
    not_finite = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, tensors, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < tensors
        non_finite = tl.load(sums + {NON_FINITE} * tensors + at, mask=inside, other=0)
        not_finite += tl.where(non_finite > 0, 1, 0)
    end = sums + {SECTIONS} * tensors + {TAIL}
    invalid = tl.load(end + {INVALID}) + tl.load(end + {REPLACES})  # neither is negative
    finite = tl.reduce(not_finite, 0, add) == 0
    consistent = (tl.load(end + {DIFFERENCE}) == 0) & (invalid == 0)
    no_inf = tl.load(end + {FOUND_INF}) == 0
    goes_on = consistent & no_inf
    tl.store(proceed, goes_on & finite if SKIPS else goes_on)
    tl.store(flags, consistent.to(tl.int64))
    tl.store(flags + 1, finite.to(tl.int64))
    tl.store(flags + 2, no_inf.to(tl.int64))
'''


def judge(sums: Tensor, *, skips: bool) -> Verdict:
    """See `formulas.verdict.judge`."""
    verdict = Verdict(
        flags=torch.empty(3, dtype=torch.int64, device=sums.device), proceed=torch.empty((), dtype=torch.bool, device=sums.device)
    )
    tensors = (len(sums) - TAIL) // SECTIONS
    verdict_kernel()[1,](sums, tensors, verdict.flags, verdict.proceed, SKIPS=skips, BLOCK=BLOCK, **OPTIONS)
    return verdict


def verdict_kernel() -> Any:
    return _verdict_kernel(interpreted=interpreted())


@cache
def _verdict_kernel(*, interpreted: bool) -> Any:
    scope = {"triton": triton, "tl": tl, "ARGUMENTS": list(ARGUMENTS), "add": compiled(add, interpreted=interpreted)}
    return executed("verdict", SOURCE, scope)
