"""Writing a shard file: safetensors, so that any tool opens it. Chunks are hashed in memory while they are written.

Each chunk is a tensor of the file, called by its key and a number: shaped like the whole tensor where it is all of it, else 1-D.
Format: https://huggingface.co/docs/safetensors, 8 bytes with the size of a JSON header, the header, the data without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharded_optim.checkpoint.dtypes import name_of
from sharded_optim.checkpoint.held import bytes_of
from sharded_optim.checkpoint.manifest import sha256
from sharded_optim.checkpoint.plan import Part
from sharded_optim.checkpoint.store import Store
from sharded_optim.segment import Segment

__all__ = ["WrittenShard", "tensors_in", "tensors_of", "write_shard"]

METADATA = "__metadata__"  # of a safetensors file, beside its tensors
AHEAD = 2  # chunks that may be hashed at a time besides the one that is written


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """What a rank has written: hashes of what it had in memory."""

    header_size: int
    header_sha256: str
    chunks_sha256: tuple[str, ...]


def write_shard(store: Store, folder: str, file: str, parts: Sequence[Part], content: Callable[[Part], Tensor]) -> WrittenShard:
    """Write a file and return when it is on the disk.

    Args:
        content: the elements of a part: 1-D, contiguous, on any device.
    """
    header = _header(parts)
    writer = store.create(folder, file)
    try:
        writer.write(memoryview(header))
        hashes: list[Future[str]] = []
        with ThreadPoolExecutor(1, thread_name_prefix="sharded_optim hash") as hasher:
            for number, part in enumerate(parts):
                flat = content(part).cpu()
                memory = bytes_of(flat)
                hashes.append(hasher.submit(_sha256, flat, memory))
                writer.write(memory)
                if number >= AHEAD:
                    hashes[number - AHEAD].result()
    except BaseException:
        writer.abandon()
        raise
    writer.close()
    return WrittenShard(header_size=len(header), header_sha256=sha256(header), chunks_sha256=tuple(digest.result() for digest in hashes))


def _sha256(flat: Tensor, memory: memoryview) -> str:
    """Of memory that `flat` keeps alive."""
    return sha256(memory)


def _header(parts: Sequence[Part]) -> bytes:
    content = {METADATA: {"format": "pt"}} | tensors_of((part.key, part.dtype, part.segment) for part in parts)
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensors_of(chunks: Iterable[tuple[str, torch.dtype, Segment]]) -> dict[str, Any]:
    """What a header tells of chunks, in their order: the key of each, its dtype and its elements."""
    content: dict[str, Any] = {}
    begin = 0
    numbers: dict[str, int] = {}
    for key, dtype, segment in chunks:
        number = numbers[key] = numbers.get(key, -1) + 1
        shape = list(segment.shape) if segment.numel == segment.tensor_numel else [segment.numel]
        end = begin + segment.numel * dtype.itemsize
        content[f"{key}#{number}"] = {"dtype": name_of(dtype, key), "shape": shape, "data_offsets": [begin, end]}
        begin = end
    return content


def tensors_in(header: bytes) -> dict[str, Any] | None:
    """What a header that was read tells; None if it is none."""
    try:
        content = json.loads(header[8:])
    except ValueError:
        return None
    return {key: value for key, value in content.items() if key != METADATA} if isinstance(content, dict) else None
