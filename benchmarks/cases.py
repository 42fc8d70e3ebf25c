"""What is stepped: lists of tensors, and the dtypes in which they are. A new case is one new entry of `LAYOUTS`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.devices import CPU, CUDA

__all__ = ["DTYPES", "GPT2", "LAYOUTS", "LLAMA3_8B", "Case", "Layout", "select", "shards"]

M = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A list of tensors."""

    name: str
    shapes: Shapes
    dtypes: tuple[str, ...] = ("fp32", "bf16")  # in which it is measured
    devices: tuple[str, ...] = (CPU,)  # kinds on which it is measured without being named
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


def _llama3_8b(width: int = 4096, blocks: int = 32, hidden: int = 14336, heads: int = 1024, vocabulary: int = 128256) -> Shapes:
    """The parameters of Llama 3 8B (Grattafiori et al. 2024) as Hugging Face lays them out; `heads` is the width of keys and of values."""
    attention = ((width, width), (heads, width), (heads, width), (width, width))
    feed_forward = ((hidden, width), (hidden, width), (width, hidden))
    block = (*attention, *feed_forward, (width,), (width,))
    return ((vocabulary, width), *(block * blocks), (width,), (vocabulary, width))


def shards(shapes: Shapes, ranks: int) -> Shapes:
    """What the first rank has of each tensor under FSDP2: the first of so many chunks along dim 0, of which the last may be smaller."""
    return tuple((-(-rows // ranks), *rest) for rows, *rest in shapes)


GPT2 = _gpt2()
LLAMA3_8B = _llama3_8b()
BOTH = (CPU, CUDA)
LAYOUTS = (
    Layout(name="1M", shapes=((M,),), quick=True),
    Layout(name="16M", shapes=((16 * M,),), devices=BOTH),
    Layout(name="64M", shapes=((64 * M,),)),
    Layout(name="256M", shapes=((256 * M,),), devices=BOTH),
    Layout(name="1G", shapes=((1024 * M,),), devices=(CUDA,)),
    Layout(name="GPT-2", shapes=GPT2, devices=BOTH),
    Layout(name="Llama-3-8B/64", shapes=shards(LLAMA3_8B, 64), devices=(CUDA,)),  # the local tensors of one of 64 ranks
    # The next four are pairs: what many tensors cost beyond their elements.
    Layout(name="1x10M", shapes=((10_000_000,),), dtypes=("fp32",), few=True, quick=True),
    Layout(name="10kx1k", shapes=((1_000,),) * 10_000, dtypes=("fp32",), few=True, same_elements="1x10M", quick=True),
    Layout(name="1x100M", shapes=((100_000_000,),), dtypes=("fp32",), few=True),
    Layout(name="10kx10k", shapes=((10_000,),) * 10_000, dtypes=("fp32",), few=True, same_elements="1x100M"),
)


def select(names: Sequence[str] | None, dtypes: Sequence[str] | None, *, device: str = CPU, quick: bool = False) -> list[Case]:
    """The cases of the layouts and dtypes that are named; None means those of the kind of device, or for a quick run those that are quick.

    Raises:
        ValueError: nothing is left, or a name is unknown.
    """
    known = [layout.name for layout in LAYOUTS]
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"unknown cases {', '.join(unknown)}; there are {', '.join(known)}")
    meant = [layout.name for layout in LAYOUTS if (layout.quick if quick else device in layout.devices)]
    layouts = [layout for layout in LAYOUTS if layout.name in (names or meant)]
    chosen = [Case(layout=layout, dtype=dtype) for dtype in DTYPES for layout in layouts if dtype in layout.dtypes]
    cases = [case for case in chosen if not dtypes or case.dtype in dtypes]
    if not cases:
        raise ValueError(f"no case is left of {', '.join(names or known)} in {', '.join(dtypes or DTYPES)}; some are measured in fp32 only")
    return cases
