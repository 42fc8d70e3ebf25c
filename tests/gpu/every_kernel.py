"""Every kernel runs once, on tensors of awkward sizes: what compute-sanitizer looks at. `test_sanitizer.py` starts it.

Tensors are separate allocations that end where their elements do (with PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that an access beyond one
is beyond what the device has given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu.device import DEVICE, REHEARSAL, synchronize
from sharded_optim.backends import Backend, Column, Operands, choose
from sharded_optim.formulas.scalars import Sums
from sharded_optim.formulas.verdict import NON_FINITE, NON_FINITE_PIECE, SECTIONS, TAIL
from sharded_optim.formulas.weight_decay import COUPLED
from sharded_optim.optimizers.adam import ADAM, AMSGRAD
from sharded_optim.optimizers.sgd import MOMENTUM, SGD
from sharded_optim.optimizers.stable_adamw import STABLE_ADAMW
from sharded_optim.sharding.segment import Segment
from sharded_optim.step.coefficients import LrScale, OperandGroups, coefficient_table
from sharded_optim.storage.formats import FORMATS, format_of

GROUP = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "decay_form": COUPLED, "reference_lr": 1e-2}
GROUP |= {"momentum": 0.9, "dampening": 0.0, "nesterov": True}
NUMELS = (1, 7, 8, 200) if REHEARSAL else (1, 2, 7, 8, 9, 255, 4096, 4097, 12_289)
DTYPES = (torch.float32, torch.bfloat16)
MANY = 131  # operands: more than a program of the kernels of coefficients takes
TENSORS = 1031  # of the model: more than the kernel of the verdict looks at together
CASES = list(product((STABLE_ADAMW, ADAM, AMSGRAD, MOMENTUM, SGD), FORMATS.values(), DTYPES))


def main() -> int:
    backend, _ = choose(("triton",), DEVICE, frozenset({torch.float32}))
    for algorithm, fmt, dtype in CASES[:: 9 if REHEARSAL else 1]:
        for offset in (0, 1):  # aligned, and not

            def column(dtype: torch.dtype, offset: int = offset) -> Column:
                return Column([ones(numel + offset, dtype)[offset:] for numel in NUMELS])

            operands = Operands(
                segments=[Segment.flat(f"w{numel}", (numel,), 0, numel) for numel in NUMELS],
                format=fmt,
                param=column(fmt.dtype),
                extra=tuple(column(array.dtype) for array in fmt.extra),
                grad=column(dtype),
                state_formats=tuple(format_of(dtype) for _ in algorithm.state),
                state=tuple(column(dtype) for _ in algorithm.state),
            )
            count = len(operands)
            table = torch.tensor([algorithm.coefficients(GROUP, 3, 1.0)] * count, dtype=torch.float64).float().to(DEVICE)
            keys = torch.arange(count)[:, None].to(DEVICE) if fmt.is_random else None
            backend.update(algorithm, operands, table, None, None, keys)
            if algorithm.statistic is not None:
                observed = torch.tensor([algorithm.statistic.coefficients(GROUP, 3)] * count, dtype=torch.float64).float().to(DEVICE)
                limits, scales = torch.full((count,), 101.0).to(DEVICE), torch.full((count,), 2.0**20).to(DEVICE)
                for statistic in (algorithm.statistic, None):
                    _, flags = backend.observe(statistic, operands, observed, limits, scales, None)
                    assert not flags.cpu().any()
    tabulate(backend)
    judge(backend)
    synchronize()
    print(f"{len(CASES)} kinds of parameters were stepped")
    return 0


def tabulate(backend: Backend) -> None:
    """Coefficients of all algorithms: of one param group and of three, one of which has its learning rate on the device."""
    assert STABLE_ADAMW.statistic is not None
    params = [ones(1, torch.float32) for _ in range(MANY)]
    operands = Operands.whole(params, params, [])
    steps = torch.arange(MANY).float().to(DEVICE)
    sums = Sums(
        vector=torch.cat([torch.arange(TENSORS), torch.zeros(TENSORS, dtype=torch.int64)]).to(DEVICE),
        tensors=TENSORS,
        slots=torch.arange(TENSORS - MANY, TENSORS).to(DEVICE),
        units=torch.full((MANY,), 2.0**-20, dtype=torch.float64).to(DEVICE),
        numels=torch.ones(MANY, dtype=torch.float64).to(DEVICE),
    )
    groups = [GROUP, GROUP | {"weight_decay": 0.2}, GROUP | {"lr": torch.tensor(1e-2).to(DEVICE)}]
    group_of = torch.arange(MANY) % len(groups)
    several = OperandGroups(groups=groups, group_of=group_of.to(DEVICE))
    observed = LrScale(of_mean=STABLE_ADAMW.statistic.lr_scale, sums=sums)
    kinds: list[tuple[Callable[..., Any], tuple[float | LrScale | None, ...]]] = [(STABLE_ADAMW.statistic.coefficients, (None,))]
    kinds += [(algorithm.coefficients, (1.0, observed)) for algorithm in (STABLE_ADAMW, ADAM, AMSGRAD, MOMENTUM, SGD)]
    for members in (OperandGroups(groups=[GROUP]), several):
        for function, lr_scales in kinds:
            for lr_scale in lr_scales:
                table = coefficient_table(function, members, steps, lr_scale, backend=backend, operands=operands)
                assert table.cpu().isfinite().all()


def judge(backend: Backend) -> None:
    """Whether a step happens."""
    sums = torch.zeros(SECTIONS * TENSORS + TAIL, dtype=torch.int64)
    sums[NON_FINITE * TENSORS : (NON_FINITE + 1) * TENSORS] = -36  # finite, in so many fraction bits plus 1
    spoiled = sums.clone()
    spoiled[NON_FINITE * TENSORS] += NON_FINITE_PIECE  # a gradient that is not finite
    for skips in (False, True):
        assert bool(backend.judge(spoiled.to(DEVICE), skips=skips).proceed.cpu()) != skips
        assert bool(backend.judge(sums.to(DEVICE), skips=skips).proceed.cpu())


def ones(numel: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(numel, dtype=dtype).to(DEVICE)


if __name__ == "__main__":
    with np.errstate(all="ignore"):
        sys.exit(main())
