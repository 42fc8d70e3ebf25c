"""Remove checkpoints: old ones, in `so.checkpoint.prune` and after a save with keep=, and a damaged one whose step is saved again.

Before old ones are removed, a checkpoint that stays must be known to be intact (`integrity.py`); if none is, the newest is read back.
Training that fell back to an older checkpoint reaches the damaged step again, and must be able to save it. Used by `saving.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from itertools import islice

import torch.distributed as dist

from sharded_optim.checkpoint.collectives import all_or_nothing, rank_and_world_size
from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, MismatchError, UnreadableError
from sharded_optim.checkpoint.integrity import Integrity, forget, known_integrity, record, skipping_damaged, verify_all, verify_together
from sharded_optim.checkpoint.reader import CheckpointReader
from sharded_optim.checkpoint.steps import candidates
from sharded_optim.checkpoint.store import COMMITTED, AnyPath, Store, folder_of, open_store

__all__ = ["clear_step", "prune", "prune_together", "step_exists"]


def prune(root: AnyPath, keep: int) -> list[int]:
    """Remove all checkpoints but the newest `keep`.

    Damaged checkpoints, as far as manifests, file sizes and earlier reads of this process show, are not counted; they stay if they are
    newer than the oldest that is kept.

    No shard is read if this process has read back one of the newest `keep`, in `load`, `verify` or `latest`, and its files were not written
    to since, as far as the store notices. Otherwise the newest is read back, and if it is damaged the checkpoint before it: a checkpoint
    that verifies always stays. Bytes that decay without a write after they were read back are not noticed; `verify` finds them. If a store
    lists no times or tags of files, a checkpoint is read back each time.

    May be called by several processes at once.

    Returns:
        The steps that were removed.

    Raises:
        CheckpointError: some checkpoints could not be removed; all others were removed.
    """
    if type(keep) is not int or keep < 1:
        raise ValueError(f"keep must be a whole number >= 1, got {keep!r}")
    store = open_store(root)
    damaged: set[int] = set()
    while True:
        removable, unverified = _removable(store, keep, damaged=damaged)
        if unverified is None:
            break
        with skipping_damaged():
            verify_all(CheckpointReader(store, unverified))
            break
        damaged.add(unverified)
    _remove(store, removable)
    return removable


def prune_together(store: Store, keep: int, new_step: int, process_group: dist.ProcessGroup | None) -> None:
    """Remove all checkpoints but the newest `keep` and `new_step`, which was just saved. A collective.

    The ranks read back a checkpoint together, each a share: rank 0 alone would take world size times as long, and the other ranks would
    run into a timeout.

    Raises:
        CheckpointError: the newest checkpoint is damaged, or some could not be removed.
    """
    is_first = rank_and_world_size(process_group)[0] == 0
    _, (choice, *_) = all_or_nothing(
        f"pruning {store.root}", lambda: _removable(store, keep, spare=new_step) if is_first else None, process_group
    )
    removable, unverified = choice
    if unverified is not None:
        verify_together(store, unverified, process_group)
    for step in removable:
        forget(store, step)
    if removable:
        all_or_nothing(f"pruning {store.root}", lambda: _remove(store, removable) if is_first else None, process_group)


def _removable(store: Store, keep: int, *, damaged: Collection[int] = (), spare: int | None = None) -> tuple[list[int], int | None]:
    """Choose the checkpoints to remove, and a checkpoint that stays to be verified first. Reads no shard.

    Args:
        damaged: steps of damaged checkpoints, which are not counted.
        spare: a step that is not removed.

    Returns:
        The steps to remove, ascending; the step to verify, or None if one of the newest `keep` is verified, or nothing is removed.
    """
    counted = ((step, integrity) for step, integrity in _newest_first(store) if step not in damaged)
    newest = dict(islice(counted, keep))
    if len(newest) < keep:
        return [], None
    older = [step for step in candidates(store) if step < min(newest) and step != spare]
    is_safe = not older or Integrity.VERIFIED in newest.values()
    return older, None if is_safe else max(newest)


def _newest_first(store: Store) -> Iterator[tuple[int, Integrity]]:
    """List the checkpoints that are not known to be damaged, newest first. Reads no shard, and each manifest once per process."""
    for step in reversed(candidates(store)):
        with skipping_damaged():
            integrity = known_integrity(store, step)
            if integrity is None:
                reader = CheckpointReader(store, step)
                reader.check_files()
                integrity = Integrity.PLAUSIBLE
                record(reader, integrity)
            yield step, integrity


def _remove(store: Store, steps: Iterable[int]) -> None:
    """Remove checkpoints. Raises CheckpointError if some could not be removed, after all others were removed."""
    failures = []
    for step in steps:
        try:
            store.remove(folder_of(step))
        except Exception as error:  # cloud clients raise errors of their own types
            failures.append(f"{store.root}/{folder_of(step)} could not be removed: {error}")
        forget(store, step)
    if failures:
        raise CheckpointError("\n  ".join(failures))


# ------------------------------------------------------------------------------------------- before a save of a step that exists


def step_exists(store: Store, step: int) -> bool:
    """Return whether a step has a folder; on an object store, where a draft has the same name, whether that has the marker."""
    folder = folder_of(step)
    return folder in store.folders() and (store.renames or COMMITTED in store.files(folder))


def clear_step(store: Store, step: int, process_group: dist.ProcessGroup | None) -> None:
    """Make way for a save of a step that exists. A collective.

    Removes a damaged checkpoint. Renames a checkpoint that cannot be read, as it may be intact.

    Raises:
        CheckpointError: the checkpoint is intact, is of a later version, or cannot be renamed.
    """
    folder = folder_of(step)
    where = f"{store.root}/{folder}"
    is_first = rank_and_world_size(process_group)[0] == 0
    try:
        verify_together(store, step, process_group)
    except DamagedError as error:
        damage = error
    except MismatchError as error:
        raise MismatchError(f"step {step} exists already, and only damaged checkpoints are replaced: {error}") from error
    else:
        raise CheckpointError(
            f"step {step} is committed already, and a committed checkpoint is never overwritten; save to another root, or remove {where}"
        )

    def clear() -> None:  # warns on all ranks: if warnings are errors, all ranks must raise
        if not isinstance(damage, UnreadableError):
            warnings.warn(f"replacing a checkpoint that is damaged: {damage}", UserWarning, stacklevel=2)
            if is_first:
                store.remove(folder)
            return
        what = f"step {step} exists already, and cannot be read to see whether it is intact"
        try:
            name = store.set_aside(folder) if is_first else f"{folder}.unreadable-*"
        except OSError as error:
            raise CheckpointError(f"{what}; nor can it be renamed ({error}); save to another root: {damage}") from error
        warnings.warn(f"{what}; it is now called {name}, and nothing removes it: {damage}", UserWarning, stacklevel=2)

    all_or_nothing(f"clearing {where}", clear, process_group)
