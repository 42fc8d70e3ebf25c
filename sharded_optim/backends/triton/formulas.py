"""Compute coefficients in one launch: Triton compiles the formulas that `coefficients.py` records.

As torch operations they would be a hundred launches of a few microseconds each, more than a step of a small model takes. A kernel is made
for each sequence of operations that is met; learning rates and constants are in device memory.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# What Triton's functions return is known to Triton alone.

from __future__ import annotations

import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharded_optim.backends.triton.compiler import compiled, executed, interpreted
from sharded_optim.formulas.recording import Formulas, Operation, Operations
from sharded_optim.formulas.scalars import STEP_BITS, Sums
from sharded_optim.storage.devices import DeviceCache, send

__all__ = ["Constants", "formula_kernel", "launch"]

BLOCK = 128  # operands of a program
WARPS = 4
FOUND = {  # in this order
    "formula_of": "formula = tl.load(all_formula_of + row, mask=inside, other=0)",
    "lr": "lr = tl.load(all_lr + formula)",
    "slots": "slot = tl.load(all_slots + row, mask=inside, other=0)",
    "totals": "total = tl.load(all_totals + slot).to(tl.float64)",
    "non_finite": "non_finite = tl.load(all_non_finite + slot)",
    "units": "unit = tl.load(all_units + row, mask=inside, other=1.0)",
    "numels": "numel = tl.load(all_numels + row, mask=inside, other=1.0)",
}
OPTIONS = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}


class Constants:
    """Caches the constants of formulas on a device."""

    def __init__(self) -> None:
        self._sent: defaultdict[Operations, DeviceCache[Tensor]] = defaultdict(DeviceCache)

    def of(self, operations: Operations, constants: array[float], device: torch.device) -> Tensor:
        """Return the rows of `Formulas.constants`, one after the other: float64."""
        sent = self._sent[operations]
        return sent.of(constants, device, lambda: send(torch.tensor(constants, dtype=torch.float64, device="cpu"), device))


def launch(formulas: Formulas, formula_of: Tensor | None, steps: Tensor, sums: Sums | None, lr: Tensor, constants: Constants) -> Tensor:
    """See `sharded_optim.backends.Backend.tabulate`."""
    table = torch.empty(len(steps), formulas.results, dtype=torch.float32, device=steps.device)
    steps = steps.contiguous()
    found = {name: getattr(sums, name, None) for name in FOUND} | {"formula_of": formula_of, "lr": lr}
    tensors = {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}
    for operations, rows in formulas.constants.items():
        values = constants.of(operations, rows, steps.device)
        kernel = formula_kernel(operations, tuple(tensors))
        kernel[triton.cdiv(len(steps), BLOCK),](
            table, len(steps), values, 1 + operations.constants, steps, *tensors.values(), BLOCK=BLOCK, **OPTIONS
        )
    return table


def formula_kernel(operations: Operations, inputs: tuple[str, ...]) -> Any:
    """Build the kernel of all formulas with these operations, which reads these of `FOUND`."""
    return _formula_kernel(operations, inputs, interpreted=interpreted())


@cache
def _formula_kernel(operations: Operations, inputs: tuple[str, ...], *, interpreted: bool) -> Any:
    results = operations.results
    arguments = ["table", "operands", "constants", "width", "steps", *(f"all_{name}" for name in inputs)]
    body = [
        "row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)",
        "inside = row < operands",
        "formula = row * 0",
        *(FOUND[name] for name in inputs),
        "own = constants + formula * width",
        "inside = inside & (tl.load(own) > 0.0)",
        *(f"c{index} = tl.load(own + {index + 1})" for index in range(operations.constants)),
        "step = tl.load(steps + row, mask=inside, other=0.0).to(tl.int64) + 1",
        *(f"{name} = {_text_of(each)}" for name, each in zip(operations.names, operations.instructions, strict=True)),
        *(f"tl.store(table + {len(results)} * row + {index}, rounded({name}), mask=inside)" for index, name in enumerate(results)),
    ]
    text = "\n    ".join(body)
    name = f"coefficients_{zlib.crc32(text.encode()):08x}"
    source = f'''"""Made by sharded_optim/backends/triton/formulas.py."""

@triton.jit(do_not_specialize=ARGUMENTS)
def {name}({", ".join(arguments)}, BLOCK: tl.constexpr):
    {text}
'''
    functions = {each.__name__: compiled(each, interpreted=interpreted) for each in OPERATIONS}
    return executed(name, source, {"triton": triton, "tl": tl, "ARGUMENTS": arguments, **functions})


def _text_of(operation: Operation) -> str:
    name, operands = operation
    return f" {name} ".join(operands) if name in ("+", "-", "*") else f"{name}({', '.join(operands)})"


# ------------------------------------------------------------------------------------------------------------------- operations
# `formulas/scalars.py` in float64, where Triton has one division and one root: those of IEEE 754.


def double(integer):
    return integer.to(tl.float64)


def divide(a, b):
    return a / b


def sqrt(a):
    return tl.sqrt(a)


def maximum(a, least):
    return tl.where((a > least) | (a != a), a, least)


def at_first_step(step, value, otherwise):
    return tl.where(step == 1, value, otherwise)


def nan_where(flag, value):
    return tl.where(flag > 0, float("nan"), value)


BITS = tl.constexpr(STEP_BITS)


def power(base, exponent):
    result = base * 0.0 + 1.0
    for bit in range(BITS):
        result = tl.where((exponent >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


def rounded(value):
    return value.to(tl.float32)


OPERATIONS: tuple[Callable[..., Any], ...] = (double, divide, sqrt, maximum, at_first_step, nan_where, power, rounded)
assert all(isinstance(operation, FunctionType) for operation in OPERATIONS)
