"""Save a checkpoint: all ranks write the chunks that the plan assigns to them and vote, and rank 0 commits.

    collect -> plan -> draft -> shards, written and hashed -> vote -> manifest, marker -> publish -> prune

A committed checkpoint is never written to. A process that dies leaves a draft, which the first save of a later process removes. Used by
`so.checkpoint.save`, by saves in the background (`background.py`), and by `imports/`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sharded_optim.checkpoint.collectives import (
    all_or_nothing,
    digest_of,
    gather_distinct,
    gather_on_first,
    rank_and_world_size,
    refuse_differences,
)
from sharded_optim.checkpoint.commit import commit, create_draft, discard_draft
from sharded_optim.checkpoint.content import Content, manifest_of
from sharded_optim.checkpoint.local_tensor import LocalTensor
from sharded_optim.checkpoint.manifest import Manifest
from sharded_optim.checkpoint.removal import clear_step, prune_together, step_exists
from sharded_optim.checkpoint.shard_file import write_shard
from sharded_optim.checkpoint.store import AnyPath, Store, folder_of, open_store, shard_name
from sharded_optim.checkpoint.values import encode
from sharded_optim.checkpoint.write_plan import PlannedChunk, plan_for, rows_of

__all__ = ["PendingSave", "begin", "finish"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PendingSave:
    """A save that is planned and not yet written."""

    store: Store
    chunks: Sequence[PlannedChunk]  # the chunks that this rank writes
    tensors: Sequence[LocalTensor]  # the tensors that the chunks are cut from
    manifest: Manifest  # without files and chunks
    process_group: dist.ProcessGroup | None
    keep: int | None
    _flat: dict[int, Tensor] = field(default_factory=dict)  # the elements of the tensor of the last chunk, by `PlannedChunk.row`

    def content(self, chunk: PlannedChunk) -> Tensor:
        """Return the current elements of a chunk: 1-D."""
        if chunk.row not in self._flat:  # a tensor that is not contiguous is copied once for all of its chunks
            self._flat.clear()
            self._flat[chunk.row] = self.tensors[chunk.row].flat()
        return self._flat[chunk.row][chunk.offset : chunk.offset + chunk.segment.numel]

    def release(self) -> None:
        """Free the copy of a tensor that `content` may have made."""
        self._flat.clear()


def begin(
    root: AnyPath,
    step: int,
    collect: Callable[[], Content],
    *,
    keep: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> PendingSave:
    """Collect the contents of all ranks, and plan which rank writes which chunks. A collective.

    Args:
        root, step, keep, process_group: see `checkpoint.save`.
        collect: returns this rank's content; must not communicate.

    Raises:
        CheckpointError: see `checkpoint.save`.
    """
    rank, _ = rank_and_world_size(process_group)

    def prepare() -> tuple[Any, tuple[bytes, bytes, bool]]:
        content = collect()
        _check_arguments(step, keep)
        store = open_store(root)
        extra = None if content.extra is None else encode(content.extra, "extra")
        rows = rows_of(content.tensors)
        # Everything but the tensors is compared by one digest, and each distinct value is sent once: most ranks have the same.
        rest = replace(content, tensors=(), extra=extra), {"step": step, "keep": keep}
        exists = rank == 0 and step_exists(store, step)
        return (store, content.tensors, rest), (digest_of(rows), digest_of(rest), exists)

    (own, _), shared = all_or_nothing("collecting what to save", prepare, process_group, share=lambda result: result[1])
    store, tensors, rest = own
    row_digests, rest_digests, exists = zip(*shared, strict=True)
    contents, arguments = zip(*gather_distinct(rest, rest_digests, process_group), strict=True)
    refuse_differences(arguments)
    if any(exists):
        clear_step(store, step, process_group)
    manifest = manifest_of(step, contents)
    plan = plan_for(tensors, row_digests, process_group)
    names = {entry.name for entry in plan.tensors.values()}
    aliases = {alias: name for alias, name in manifest.aliases.items() if alias not in names}
    return PendingSave(
        store=store,
        chunks=plan.chunks,
        tensors=tensors,
        manifest=replace(manifest, tensors=plan.tensors, aliases=aliases),
        process_group=process_group,
        keep=keep,
    )


def _check_arguments(step: int, keep: int | None) -> None:
    if type(step) is not int or step < 0:
        raise ValueError(f"step must be a whole number >= 0, got {step!r}")
    if keep is not None and (type(keep) is not int or keep < 1):
        raise ValueError(f"keep must be a whole number >= 1, or None, got {keep!r}")


def finish(save: PendingSave, content: Callable[[PlannedChunk], Tensor]) -> None:
    """Write the chunks, vote, commit and prune. A collective.

    Args:
        content: returns the elements of one of this rank's chunks.

    Raises:
        CheckpointError: on every rank; the draft is removed, and nothing else has changed.
    """
    store, group = save.store, save.process_group
    rank, world_size = rank_and_world_size(group)
    is_first = rank == 0
    where = f"{store.root}/{folder_of(save.manifest.step)}"
    shard = shard_name(rank, world_size)
    _, (draft, *_) = all_or_nothing(f"creating {where}", lambda: create_draft(store, save.manifest.step) if is_first else "", group)
    is_committed = False

    def commit_on_first() -> None:
        nonlocal is_committed
        if is_first:
            commit(store, draft, save.manifest, shards)
            is_committed = True

    try:
        written, _ = all_or_nothing(
            f"writing {where}",
            lambda: write_shard(store, draft, shard, save.chunks, content, save.manifest.tensors) if save.chunks else None,
            group,
            share=lambda _: None,
        )
        shards = gather_on_first(written, group)
        all_or_nothing(f"committing {where}", commit_on_first, group)
    except BaseException:
        if is_first and not is_committed:  # after the commit the checkpoint stays: other ranks may have returned
            discard_draft(store, draft)
        raise
    if save.keep is not None:
        _prune(save, save.keep)


def _prune(save: PendingSave, keep: int) -> None:
    try:
        prune_together(save.store, keep, save.manifest.step, save.process_group)
    except Exception as error:  # not an error of the save: the checkpoint is committed
        # Warns on all ranks: if warnings are errors, all ranks must raise.
        warnings.warn(f"{save.store.root} could not be pruned: {error}", UserWarning, stacklevel=4)
