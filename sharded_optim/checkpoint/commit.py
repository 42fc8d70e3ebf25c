"""The commit protocol on rank 0: create a draft, and publish it as a checkpoint when all ranks have written their shards.

A published folder always has a complete manifest and marker. Used by `saving.py`.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace

from sharded_optim.checkpoint.errors import CheckpointError
from sharded_optim.checkpoint.manifest import MAX_MANIFEST_BYTES, Chunk, Manifest
from sharded_optim.checkpoint.manifest_json import serialize
from sharded_optim.checkpoint.reader import marker_of
from sharded_optim.checkpoint.shard_file import WrittenShard
from sharded_optim.checkpoint.store import COMMITTED, MANIFEST, Store, folder_of, shard_name
from sharded_optim.sharding.segment import Segment

__all__ = ["commit", "create_draft", "discard_draft"]

logger = logging.getLogger(__name__)

_cleaned: set[str] = set()  # roots from which this process has removed the drafts of earlier processes


def create_draft(store: Store, step: int) -> str:
    """Create a draft for a step, and return its folder. The first call for a root removes drafts that earlier processes left."""
    if store.root not in _cleaned:
        for folder in filter(store.is_draft, store.folders()):
            logger.info("removing %s/%s, the draft of a save that was not completed", store.root, folder)
            store.remove(folder)
        _cleaned.add(store.root)
    return store.begin(folder_of(step), secrets.token_hex(4))


def commit(store: Store, draft: str, manifest: Manifest, shards: Sequence[WrittenShard | None]) -> None:
    """Write the manifest and the marker, and publish a draft.

    Args:
        manifest: its files and chunks are added here.
        shards: the file and chunks that each rank wrote, by rank; None: the rank wrote no file.

    Raises:
        CheckpointError: a rank's file is missing, or the manifest is too large.
    """
    complete = _complete(manifest, shards)
    _check_sizes(store, draft, complete)
    text = serialize(complete)
    if len(text) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"the manifest would have {len(text)} bytes; the limit is {MAX_MANIFEST_BYTES}, and a larger one is not read")
    for name, content in ((MANIFEST, text), (COMMITTED, marker_of(text))):
        with store.create(draft, name) as file:
            file.write(memoryview(content))
    store.publish(draft, folder_of(manifest.step))


def _complete(manifest: Manifest, shards: Sequence[WrittenShard | None]) -> Manifest:
    """Add the files and chunks to a manifest, with the hashes that ranks computed while they wrote."""
    written = {shard_name(rank, len(shards)): shard for rank, shard in enumerate(shards) if shard is not None}
    tensors = list(manifest.tensors.items())
    chunks_of: list[list[Chunk]] = [[] for _ in tensors]
    for name, (file, chunks) in written.items():
        offset = file.header_size
        for number, start, run, stride, count, digest in chunks:
            key, entry = tensors[number]
            segment = Segment(name=entry.name, shape=entry.shape, start=start, run=run, stride=stride, count=count)
            size = segment.numel * entry.dtype.itemsize
            chunks_of[number].append(Chunk(key=key, dtype=entry.dtype, segment=segment, file=name, offset=offset, size=size, sha256=digest))
            offset += size
    for (key, entry), chunks in zip(tensors, chunks_of, strict=True):
        assert sum(chunk.size for chunk in chunks) == entry.size, f"{key!r} is written once"
    entries = {key: replace(entry, chunks=tuple(chunks)) for (key, entry), chunks in zip(tensors, chunks_of, strict=True)}
    return replace(manifest, files={name: file for name, (file, _) in written.items()}, tensors=entries)


def _check_sizes(store: Store, draft: str, manifest: Manifest) -> None:
    """Raise CheckpointError unless rank 0 sees every shard file with the size that its rank wrote."""
    existing = store.files(draft)
    for name, file in manifest.files.items():
        size, _ = existing.get(name, ("none", None))
        if size != file.size:
            raise CheckpointError(
                f"{name} was written with {file.size} bytes, and {store.root}/{draft} has {size}; root must be a folder that all ranks "
                f"share, to which no other job saves"
            )


def discard_draft(store: Store, draft: str) -> None:
    """Remove the draft of a save that failed."""
    try:
        store.remove(draft)
    except Exception as error:  # the save's own error is more important
        logger.warning("%s/%s could not be removed: %s", store.root, draft, error)
