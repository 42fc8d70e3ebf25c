"""`LocalTensor`: the elements of a tensor that a process holds.

The modules in `live/` and `imports/` produce them; saving reads their elements, and loading writes to them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_optim.checkpoint.manifest import MODEL, key_of
from sharded_optim.sharding.segment import Segment

__all__ = ["LOW_PRECISION", "MASTER", "MODEL", "LocalTensor", "bytes_of", "checksum", "tensor_of"]

# The kind of a tensor is MODEL, MASTER, or the name of an entry of the optimizer's state.
MASTER = "master"  # float32 values; the parameter is their rounded copy
LOW_PRECISION = (torch.bfloat16, torch.float16)  # dtypes of parameters that may have masters
CHECKSUM_NUMEL = 2**20  # elements that are copied to the host at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalTensor:
    """The elements of a tensor that this process holds.

    Attributes:
        kind: MODEL, MASTER, or the name of an entry of the optimizer's state.
        segment: the name of the parameter or buffer, and the positions of the elements in it.
        local: these elements in order, in any shape. Loading writes here.
        is_buffer: whether replicas may differ, as buffers such as running means do; the first rank's values are saved.
    """

    kind: str
    segment: Segment
    local: Tensor
    is_buffer: bool = False

    @property
    def key(self) -> str:
        return key_of(self.kind, self.segment.name)

    def flat(self) -> Tensor:
        """Return the elements as a contiguous 1-D tensor; a view if the memory layout allows it."""
        return self.local.detach().reshape(-1).contiguous()

    @property
    def flat_is_view(self) -> bool:
        return self.local.is_contiguous() and not self.local.is_conj() and not self.local.is_neg()


def bytes_of(flat: Tensor) -> memoryview:
    """Return the memory of a 1-D contiguous tensor on the CPU."""
    return flat.view(torch.uint8).numpy().data


def checksum(flat: Tensor) -> int:
    """Compute the CRC-32 of the bytes of a 1-D tensor."""
    result = 0
    for part in flat.split(CHECKSUM_NUMEL):
        result = zlib.crc32(bytes_of(part.cpu()), result)
    return result


def tensor_of(content: memoryview, dtype: torch.dtype) -> Tensor:
    """Return bytes as a 1-D tensor; a view if they are aligned to the dtype, else a copy."""
    flat = torch.frombuffer(content, dtype=torch.uint8)
    return (flat if flat.data_ptr() % dtype.itemsize == 0 else flat.clone()).view(dtype)
