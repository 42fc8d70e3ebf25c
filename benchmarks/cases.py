"""What is stepped: lists of tensors, and the dtypes in which they are. A new case is one new entry of `LAYOUTS`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["DTYPES", "GPT2", "LAYOUTS", "Case", "Layout", "select"]

M = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A list of tensors."""

    name: str
    shapes: Shapes
    dtypes: tuple[str, ...] = ("fp32", "bf16")  # in which it is measured
    few: bool = False  # only by the contenders that say so
    same_elements: str | None = None  # the layout that has as many elements in one tensor
    quick: bool = False  # part of a smoke run

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout in a dtype, which is that of parameters and gradients."""

    layout: Layout
    dtype: str  # a key of DTYPES

    @property
    def title(self) -> str:
        return f"{self.layout.name} {self.dtype}"


def _gpt2(width: int = 768, blocks: int = 12, vocabulary: int = 50257, positions: int = 1024) -> Shapes:
    """The parameters of GPT-2 (Radford et al. 2019), as its own code lays them out; the smallest one, of 124M."""
    norm = ((width,), (width,))
    attention = ((width, 3 * width), (3 * width,), (width, width), (width,))
    feed_forward = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    block = (*norm, *attention, *norm, *feed_forward)
    return ((vocabulary, width), (positions, width), *(block * blocks), *norm)


GPT2 = _gpt2()
LAYOUTS = (
    Layout(name="1M", shapes=((M,),), quick=True),
    Layout(name="16M", shapes=((16 * M,),)),
    Layout(name="64M", shapes=((64 * M,),)),
    Layout(name="256M", shapes=((256 * M,),)),
    Layout(name="GPT-2", shapes=GPT2),
    # The next four are pairs: what many tensors cost beyond their elements.
    Layout(name="1x10M", shapes=((10_000_000,),), dtypes=("fp32",), few=True, quick=True),
    Layout(name="10kx1k", shapes=((1_000,),) * 10_000, dtypes=("fp32",), few=True, same_elements="1x10M", quick=True),
    Layout(name="1x100M", shapes=((100_000_000,),), dtypes=("fp32",), few=True),
    Layout(name="10kx10k", shapes=((10_000,),) * 10_000, dtypes=("fp32",), few=True, same_elements="1x100M"),
)


def select(names: Sequence[str] | None, dtypes: Sequence[str] | None, *, quick: bool = False) -> list[Case]:
    """The cases of the layouts and dtypes that are named; None means all, or for a quick run those that are quick.

    Raises:
        ValueError: nothing is left, or a name is unknown.
    """
    known = [layout.name for layout in LAYOUTS]
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"unknown cases {', '.join(unknown)}; there are {', '.join(known)}")
    layouts = [layout for layout in LAYOUTS if (layout.name in names if names else layout.quick or not quick)]
    chosen = [Case(layout=layout, dtype=dtype) for dtype in DTYPES for layout in layouts if dtype in layout.dtypes]
    cases = [case for case in chosen if not dtypes or case.dtype in dtypes]
    if not cases:
        raise ValueError(f"no case is left of {', '.join(names or known)} in {', '.join(dtypes or DTYPES)}; some are measured in fp32 only")
    return cases
