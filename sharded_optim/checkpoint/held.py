"""What a process holds of the tensors of a checkpoint. What wrappers hold is told in these terms by the modules in `live/`."""

from __future__ import annotations

import ctypes
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_optim.checkpoint.manifest import MODEL, key_of
from sharded_optim.sharding.segment import Segment

__all__ = ["LOW_PRECISION", "MASTER", "MODEL", "Held", "bytes_of", "checksum", "numbers_of"]

# The kinds of tensors beside MODEL; all others are the entries of optimizer state.
MASTER = "master"  # float32 values of which a parameter is the rounded copy
LOW_PRECISION = (torch.bfloat16, torch.float16)  # of parameters that may have masters
CHECKED_AT_ONCE = 2**20  # elements


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """Elements of a tensor in this process's memory.

    Attributes:
        kind: of the tensor; see above.
        segment: which elements, of the tensor of which parameter or buffer.
        local: these elements in their order, in any shape. Loading writes here.
        is_buffer: whether ranks that hold the same may have different values, of which the first one's count, as of running means.
    """

    kind: str
    segment: Segment
    local: Tensor
    is_buffer: bool = False

    @property
    def key(self) -> str:
        return key_of(self.kind, self.segment.name)

    def flat(self) -> Tensor:
        """The elements: 1-D, contiguous; a view where memory allows it."""
        return self.local.detach().reshape(-1).contiguous()

    @property
    def shares_memory(self) -> bool:
        """Whether `flat` is a view."""
        return self.local.is_contiguous() and not self.local.is_conj() and not self.local.is_neg()


def bytes_of(flat: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU. The tensor must live as long as it is used."""
    size = flat.numel() * flat.element_size()
    assert flat.device.type == "cpu"
    assert flat.is_contiguous()
    return memoryview((ctypes.c_char * size).from_address(flat.data_ptr())).cast("B") if size else memoryview(b"")


def checksum(flat: Tensor) -> int:
    """CRC-32 of the bytes of a 1-D tensor, which two that differ hardly ever have in common."""
    found = 0
    for part in flat.split(CHECKED_AT_ONCE):
        on_host = part.cpu()
        found = zlib.crc32(bytes_of(on_host), found)
    return found


def numbers_of(content: memoryview, dtype: torch.dtype) -> Tensor:
    """Bytes as a 1-D tensor, which is gone when they are."""
    numbers = torch.frombuffer(content, dtype=torch.uint8)
    return (numbers if numbers.data_ptr() % dtype.itemsize == 0 else numbers.clone()).view(dtype)
