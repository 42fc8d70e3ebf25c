"""Writing a shard file: safetensors, so that any tool opens it. Chunks are hashed in memory while they are written.

Each chunk is a tensor of the file, called by its key and a number: shaped like the whole tensor where it is all of it, else 1-D.
Format: https://huggingface.co/docs/safetensors, 8 bytes with the size of a JSON header, the header, the data without gaps.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from sharded_optim.checkpoint.dtypes import name_of
from sharded_optim.checkpoint.held import bytes_of
from sharded_optim.checkpoint.manifest import LARGEST_HEADER, sha256
from sharded_optim.checkpoint.plan import Part
from sharded_optim.checkpoint.store import Store
from sharded_optim.sharding.segment import Segment

__all__ = ["WrittenShard", "tensors_in", "tensors_of", "write_shard"]

METADATA = "__metadata__"  # of a safetensors file, beside its tensors
AHEAD = 2  # chunks that may wait to be hashed


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
        with _Hasher() as hasher:
            writer.write(memoryview(header))
            for part in parts:
                flat = content(part).cpu()
                hasher.add(flat)
                writer.write(bytes_of(flat))
        digests = hasher.digests()
    except BaseException:
        writer.abandon()
        raise
    writer.close()
    return WrittenShard(header_size=len(header), header_sha256=sha256(header), chunks_sha256=digests)


class _Hasher:
    """Hashes one chunk after the other while they are written. A context: its thread ends with it.

    In a thread of its own: those of a pool take no more work when the interpreter ends, and a save in the background may outlast the main
    thread.
    """

    def __init__(self) -> None:
        self._waiting: Queue[Tensor | None] = Queue(AHEAD)
        self._digests: list[str] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sharded_optim hash", daemon=True)

    def __enter__(self) -> _Hasher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join()

    def add(self, flat: Tensor) -> None:
        """Wait while too many are waiting. Raises what hashing has raised: what is written after that is for nothing."""
        if self._failure is not None:
            raise self._failure
        self._waiting.put(flat)

    def digests(self) -> tuple[str, ...]:
        """Of all chunks, when the thread has ended. Raises what hashing has raised."""
        if self._failure is not None:
            raise self._failure
        return tuple(self._digests)

    def _run(self) -> None:
        while (flat := self._waiting.get()) is not None:
            if self._failure is None:  # else go on taking chunks: who adds them waits for that
                try:
                    self._digests.append(sha256(bytes_of(flat)))
                except BaseException as error:
                    self._failure = error


def _header(parts: Sequence[Part]) -> bytes:
    content = {METADATA: {"format": "pt"}} | tensors_of((part.key, part.dtype, part.segment) for part in parts)
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    if len(text) + 8 > LARGEST_HEADER:
        raise ValueError(
            f"the header of a shard would have {len(text) + 8} bytes, and the largest is {LARGEST_HEADER}; save from more ranks"
        )
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
