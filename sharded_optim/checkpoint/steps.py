"""Which checkpoints a root has: listing, verifying, pruning. By one process, without communication.

Pruning trusts what this process has read back: a checkpoint of which it has compared every byte with what was saved, and whose files were
not written to since. Having written a checkpoint is not enough.
"""

from __future__ import annotations

import enum
import os
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, MismatchError, NoCheckpointError, UnreadableError
from sharded_optim.checkpoint.manifest import Manifest
from sharded_optim.checkpoint.read import CheckpointReader, look_at
from sharded_optim.checkpoint.store import COMMITTED, Store, folder_of, open_store, steps_in

__all__ = [
    "Finding",
    "candidates",
    "describe",
    "existing_step",
    "finding_of",
    "forget",
    "latest",
    "prune",
    "read_back",
    "reading_back",
    "removable",
    "remove",
    "steps",
    "steps_of",
    "verify",
]

Root = str | os.PathLike[str]


class Finding(enum.Enum):
    """What this process has found of a checkpoint."""

    LISTED = enum.auto()  # the manifest is whole, and the files have the sizes that it says
    WHOLE = enum.auto()  # every byte is as it was saved
    DAMAGED = enum.auto()


# By root and step, with the version of the files that it was found of (`look_at`).
_findings: dict[tuple[str, int], tuple[bytes, Finding]] = {}


def finding_of(store: Store, step: int) -> Finding | None:
    """What this process has found of a checkpoint, if its files were not written to since, as far as the store notices.

    Raises:
        DamagedError, UnreadableError: see `look_at`.
    """
    _, version = look_at(store, step)
    known, finding = _findings.get((store.root, step), (None, None))
    return finding if version is not None and version == known else None


def _remember(reader: CheckpointReader, finding: Finding) -> None:
    if reader.version is not None:
        _findings[reader.root, reader.step] = reader.version, finding


def steps(root: Root) -> list[int]:
    """The committed steps under a root, ascending. Reads no data."""
    return steps_of(open_store(root))


def steps_of(store: Store) -> list[int]:
    """The committed steps, ascending; also those of which that cannot be told, as their folders cannot be listed."""
    return [step for step in steps_in(store.folders()) if _is_committed(store, step)]


def _is_committed(store: Store, step: int) -> bool:
    try:
        return COMMITTED in store.files(folder_of(step))
    except OSError:
        return True


def candidates(store: Store) -> list[int]:
    """The steps that are committed, and those that were and have lost their marker, as far as that can be told, ascending."""
    return steps_in(store.folders()) if store.renames else steps_of(store)


def describe(root: Root, step: int | None = None) -> Manifest:
    """What a checkpoint says that it holds.

    Args:
        step: None: the highest that is committed.

    Raises:
        CheckpointError: there is none.
        DamagedError: its manifest is not the one that was saved.
    """
    store = open_store(root)
    return CheckpointReader(store, existing_step(store, step)).manifest


def verify(root: Root, step: int | None = None) -> int:
    """Read all of a checkpoint and compare it with what was saved, byte for byte, by SHA-256.

    Args:
        step: None: the highest that is committed.

    Returns:
        The step.

    Raises:
        CheckpointError: there is none.
        DamagedError: it is not what was saved; `problems` names each file and tensor.
    """
    store = open_store(root)
    step = existing_step(store, step)
    read_back(CheckpointReader(store, step))
    return step


def latest(root: Root) -> int | None:
    """The highest step that verifies; None if there is none.

    Warns:
        UserWarning: of each that is higher and damaged, or cannot be read.
    """
    store = open_store(root)
    for step in reversed(candidates(store)):
        with _passing_over():
            read_back(CheckpointReader(store, step))
            return step
    return None


def prune(root: Root, keep: int) -> list[int]:
    """Remove all checkpoints but the newest `keep`.

    Those that are damaged do not count, as far as their manifests, the sizes of their files, and what this process has read before tell.
    Those that are newer than all that count stay. No shard is read where this process has read back one of the newest `keep` before, in
    `load`, `verify` or `latest`, and its files were not written to since, as far as the store notices. Otherwise it reads back the newest
    of them, and if that is damaged the one before it: a checkpoint that verifies stays. Bytes that rot without a write after they were read
    back are not noticed; `verify` finds them. Where a store lists no times or tags of files, something is read back each time.

    May be called by several processes at once.

    Returns:
        The steps that were removed.

    Raises:
        CheckpointError: some could not be removed; all others were.
    """
    if type(keep) is not int or keep < 1:
        raise ValueError(f"keep must be a whole number >= 1, got {keep!r}")
    store = open_store(root)
    damaged: set[int] = set()
    while True:
        removed, unread = removable(store, keep, damaged=damaged)
        if unread is None:
            break
        with _passing_over():
            read_back(CheckpointReader(store, unread))
            break
        damaged.add(unread)
    remove(store, removed)
    return removed


def remove(store: Store, steps: Iterable[int]) -> None:
    """Remove checkpoints.

    Raises:
        CheckpointError: some could not be removed; all others were.
    """
    failures = []
    for step in steps:
        try:
            store.remove(folder_of(step))
        except Exception as error:  # clients of clouds raise errors of their own
            failures.append(f"{store.root}/{folder_of(step)} could not be removed: {error}")
        forget(store, step)
    if failures:
        raise CheckpointError("\n  ".join(failures))


def forget(store: Store, step: int) -> None:
    """Keep no memory for a checkpoint that is gone."""
    _findings.pop((store.root, step), None)


def removable(store: Store, keep: int, *, damaged: Collection[int] = (), spare: int | None = None) -> tuple[list[int], int | None]:
    """The steps that are older than the newest `keep`, and the one of these that has to be read back before any is removed. Reads no shard.

    Args:
        damaged: steps that do not count.
        spare: a step that stays.

    Returns:
        The steps, ascending; and None in the place of the other where one of the newest `keep` is trusted, or nothing is to be removed.
    """
    newest = dict(islice(((step, finding) for step, finding in _newest_first(store) if step not in damaged), keep))
    if len(newest) < keep:
        return [], None
    older = [step for step in candidates(store) if step < min(newest) and step != spare]
    is_safe = not older or Finding.WHOLE in newest.values()
    return older, None if is_safe else max(newest)


def _newest_first(store: Store) -> Iterator[tuple[int, Finding]]:
    """The checkpoints that are not damaged, as far as that can be told without reading a shard. A manifest is read once."""
    for step in reversed(candidates(store)):
        with _passing_over():
            finding = finding_of(store, step)
            if finding is None:
                reader = CheckpointReader(store, step)
                reader.check_files()
                finding = Finding.LISTED
                _remember(reader, finding)
            if finding is Finding.DAMAGED:
                raise DamagedError(f"{store.root}/{folder_of(step)} was damaged when this process read it")
            yield step, finding


@contextmanager
def _passing_over() -> Iterator[None]:
    """Leave the block with a warning where a checkpoint is damaged or of a later version; without one where it was pruned meanwhile."""
    try:
        yield
    except (DamagedError, MismatchError) as error:
        warnings.warn(f"{error}\n  It is passed over.", UserWarning, stacklevel=5)
    except CheckpointError:
        pass


def read_back(reader: CheckpointReader) -> None:
    """Read all of a checkpoint. Raises DamagedError where it is not what was saved."""
    reader.check_files()
    with reading_back(reader):
        reader.verify((), 0, 1)


@contextmanager
def reading_back(reader: CheckpointReader) -> Iterator[None]:
    """Remember for pruning whether the block, which reads all of a checkpoint, finds it damaged."""
    try:
        yield
    except UnreadableError:
        _findings.pop((reader.root, reader.step), None)  # it is neither
        raise
    except DamagedError:
        _remember(reader, Finding.DAMAGED)
        raise
    _remember(reader, Finding.WHOLE)


def existing_step(store: Store, step: int | None) -> int:
    """The step that is meant; None: the highest that is committed.

    Raises:
        CheckpointError: there is none.
    """
    found = candidates(store)
    if step is None and not found:
        raise NoCheckpointError(f"there is no checkpoint in {store.root}")
    if step is not None and step not in found:
        raise CheckpointError(f"there is no checkpoint of step {step} in {store.root}; there are {found or 'none'}")
    return found[-1] if step is None else step
