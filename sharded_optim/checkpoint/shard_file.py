"""Write a shard file in the safetensors format, which other tools open. Chunks are hashed in memory while they are written.

Each chunk is a tensor of the file, named by its key and a number. A chunk that is a whole tensor has its shape; others are 1-D.
Format (https://huggingface.co/docs/safetensors): 8 bytes with the size of a JSON header, the header, the data without gaps.
`saving.py` writes with `write_shard`, `CheckpointReader` compares headers with `header_entries`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from queue import Queue
from typing import Any

from torch import Tensor

from sharded_optim.checkpoint.dtypes import name_of
from sharded_optim.checkpoint.local_tensor import bytes_of
from sharded_optim.checkpoint.manifest import MAX_HEADER_BYTES, Chunk, ShardFile, sha256
from sharded_optim.checkpoint.store import Store
from sharded_optim.checkpoint.write_plan import PlannedChunk

__all__ = ["WrittenShard", "header_entries", "parse_header", "write_shard"]

# Index of the chunk's tensor in the plan; start, run, stride and count of its segment; SHA-256. Small, as rank 0 receives all of them.
WrittenChunk = tuple[int, int, int, int, int, str]
WrittenShard = tuple[ShardFile, list[WrittenChunk]]

METADATA = "__metadata__"  # a key of the header, beside the names of tensors
MAX_QUEUED = 2  # chunks that wait to be hashed


def write_shard(
    store: Store,
    folder: str,
    name: str,
    chunks: Sequence[PlannedChunk],
    content: Callable[[PlannedChunk], Tensor],
    tensors: Iterable[str],
) -> WrittenShard:
    """Write a shard file and wait until it is on the disk.

    Args:
        content: returns the elements of a chunk: 1-D, contiguous, on any device.
        tensors: keys of all tensors of the checkpoint, in the same order on all ranks.

    Returns:
        The file and its chunks, with hashes of the bytes in memory.
    """
    header = _header(chunks)
    with store.create(folder, name) as file:
        with _Hasher() as hasher:
            file.write(memoryview(header))
            for chunk in chunks:
                flat = content(chunk).cpu()
                hasher.add(flat)
                file.write(bytes_of(flat))
        digests = hasher.digests()
    size = len(header) + sum(chunk.size for chunk in chunks)
    numbers = {key: number for number, key in enumerate(tensors)}
    segments = [(numbers[chunk.key], chunk.segment) for chunk in chunks]
    written = [
        (number, part.start, part.run, part.stride, part.count, digest) for (number, part), digest in zip(segments, digests, strict=True)
    ]
    return ShardFile(size=size, header_size=len(header), header_sha256=sha256(header)), written


class _Hasher:
    """Hashes chunks in a thread while they are written. A context manager: the thread ends with the block.

    Not a thread pool: pools take no more work when the interpreter exits, and a save in the background may outlast the main thread.
    """

    def __init__(self) -> None:
        self._queue: Queue[Tensor | None] = Queue(MAX_QUEUED)
        self._digests: list[str] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sharded_optim hash", daemon=True)

    def __enter__(self) -> _Hasher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()

    def add(self, flat: Tensor) -> None:
        """Queue a chunk; wait while the queue is full. Raises the error of an earlier chunk, so that writing ends."""
        if self._failure is not None:
            raise self._failure
        self._queue.put(flat)

    def digests(self) -> list[str]:
        """Return the SHA-256 of all chunks; call it after the block. Raises the error of any chunk."""
        if self._failure is not None:
            raise self._failure
        return self._digests

    def _run(self) -> None:
        while (flat := self._queue.get()) is not None:
            if self._failure is None:  # after an error only empty the queue: `add` may be waiting for room
                try:
                    self._digests.append(sha256(bytes_of(flat)))
                except BaseException as error:
                    self._failure = error


def _header(chunks: Sequence[PlannedChunk]) -> bytes:
    content = {METADATA: {"format": "pt"}} | header_entries(chunks)
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    if len(text) + 8 > MAX_HEADER_BYTES:
        raise ValueError(f"the header of a shard would have {len(text) + 8} bytes; the limit is {MAX_HEADER_BYTES}: save from more ranks")
    return len(text).to_bytes(8, "little") + text


def header_entries(chunks: Sequence[PlannedChunk | Chunk]) -> dict[str, Any]:
    """Build the entries of a header: one per chunk, in the order of the chunks."""
    content: dict[str, Any] = {}
    begin = 0
    numbers: dict[str, int] = {}
    for chunk in chunks:
        number = numbers[chunk.key] = numbers.get(chunk.key, -1) + 1
        shape = list(chunk.segment.shape) if chunk.segment.numel == chunk.segment.tensor_numel else [chunk.segment.numel]
        end = begin + chunk.size
        content[f"{chunk.key}#{number}"] = {"dtype": name_of(chunk.dtype, chunk.key), "shape": shape, "data_offsets": [begin, end]}
        begin = end
    return content


def parse_header(header: bytes) -> dict[str, Any] | None:
    """Read the entries of a header; None if it is not a JSON object."""
    try:
        content = json.loads(header[8:])
    except ValueError:
        return None
    return {key: value for key, value in content.items() if key != METADATA} if isinstance(content, dict) else None
