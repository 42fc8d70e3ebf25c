"""Memory of parameters and gradients, which all contenders of a case share, and of moments.

The first contender's moments become those of the others, but for this library, which keeps apart what it allocated in its own way. So
interleaved contenders meet the same pages, and 256M elements in fp32 stay below 16 GiB. What is in the moments is another contender's, but
of the same gradients, so it is as ordinary as its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module

import torch
from torch import Tensor, nn

__all__ = [
    "FLOAT32",
    "HUGE_PAGES",
    "KINDS",
    "ORDINARY",
    "Pool",
    "allocate_on_huge_pages",
    "fill",
    "fill_grads",
    "fill_params",
    "make_params",
    "notices_shared_moments",
    "pattern",
    "share_moments",
]

ORDINARY = "ordinary"  # each tensor by itself, as torch allocates it
HUGE_PAGES = "huge pages"  # views of one flat array on 2 MiB pages
FLOAT32 = "fp32 copy"  # in fp32, whatever the case's dtype
PATTERN = 1_000_003  # elements, a prime: random numbers are drawn once and repeated
ALIGNMENT = 32  # elements, at least a cache line of 64 bytes

Shapes = Sequence[tuple[int, ...]]
Pool = dict[tuple[int, str, torch.dtype], Tensor]  # moments by position of the parameter, name in the state, and dtype
Allocate = Callable[[Shapes, torch.dtype, torch.device], list[Tensor]]


def allocate_on_huge_pages(numel: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor of zeros on huge pages, by the library's own function.

    Raises:
        ImportError: this version of the library has none.
    """
    try:
        memory = import_module("sharded_optim.storage.memory")
    except ModuleNotFoundError:
        raise ImportError("this version of sharded_optim has no sharded_optim.storage.memory") from None
    return memory.zeros(numel, dtype)


def _ordinary(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]


def _float32(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return _ordinary(shapes, torch.float32, device)


def _huge_pages(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    pieces = allocate_on_huge_pages(sum(padded), dtype).split(padded)
    return [piece[:size].view(shape) for piece, size, shape in zip(pieces, sizes, shapes, strict=True)]


KINDS: dict[str, Allocate] = {ORDINARY: _ordinary, HUGE_PAGES: _huge_pages, FLOAT32: _float32}


def make_params(kind: str, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    """Parameters with gradients that are fixed and nowhere zero."""
    params = [nn.Parameter(tensor) for tensor in KINDS[kind](shapes, dtype, device)]
    for param, grad in zip(params, KINDS[kind](shapes, dtype, device), strict=True):
        param.grad = grad
    fill_params(params)
    fill_grads(params)
    return params


@torch.no_grad()
def fill_params(params: Sequence[nn.Parameter]) -> None:
    """Give the parameters their values, at the beginning and after a step that made them infinite."""
    values = 2e-2 * pattern(params[0].device)
    for param in params:
        fill(param, values)


@torch.no_grad()
def fill_grads(params: Sequence[nn.Parameter]) -> None:
    """Give the gradients their values, at the beginning and after a step that wrote to them."""
    values = 1e-2 * pattern(params[0].device)
    for param in params:
        assert param.grad is not None, "made with one"
        fill(param.grad, values)


@cache
def pattern(device: torch.device) -> Tensor:
    """Normally distributed numbers, but none near zero: fp32 (PATTERN,)."""
    values = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0))
    return torch.where(values.abs() < 1e-2, 1e-2, values).to(device)


def fill(tensor: Tensor, values: Tensor) -> Tensor:
    """The tensor, with the values in it, over and over."""
    for chunk in tensor.view(-1).split(len(values)):
        chunk.copy_(values[: len(chunk)])
    return tensor


def share_moments(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], pool: Pool) -> None:
    """Replace what is as large as its parameter in a state by what the pool has, to which this optimizer adds what is missing."""
    for index, param in enumerate(params):
        state = optimizer.state[param]
        for name, value in list(state.items()):
            if isinstance(value, Tensor) and value.shape == param.shape and value.dim():
                state[name] = pool.setdefault((index, name, value.dtype), value)


def notices_shared_moments(optimizer: torch.optim.Optimizer, param: nn.Parameter, step: Callable[[], object] | None = None) -> bool:
    """Whether a step writes the moments that are in the state now, not others that the optimizer remembers. Steps once, by `step`."""
    probe = optimizer.state[param]["exp_avg"].view(-1)[:1]
    probe.zero_()
    (step or optimizer.step)()
    return bool(probe != 0)  # the gradient is not zero
