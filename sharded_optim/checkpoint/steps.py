"""Which checkpoints a root has: listing, verifying, pruning. By one process, without communication."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, MismatchError, NoCheckpointError
from sharded_optim.checkpoint.manifest import Manifest, sha256
from sharded_optim.checkpoint.read import CheckpointReader
from sharded_optim.checkpoint.store import COMMITTED, Store, folder_of, open_store, steps_in

__all__ = ["candidates", "describe", "existing_step", "latest", "prune", "prune_in", "steps", "steps_of", "trust", "verify"]

Root = str | os.PathLike[str]

_trusted: set[tuple[str, int, str]] = set()  # root, step, and the SHA-256 of the manifest


def steps(root: Root) -> list[int]:
    """The committed steps under a root, ascending. Reads no data."""
    return steps_of(open_store(root))


def steps_of(store: Store) -> list[int]:
    """The committed steps, ascending."""
    return [step for step in steps_in(store.folders()) if COMMITTED in store.files(folder_of(step))]


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
    _verify(store, step)
    return step


def latest(root: Root) -> int | None:
    """The highest step that verifies; None if there is none.

    Warns:
        UserWarning: of each that is higher and damaged.
    """
    return next(_newest_first(open_store(root)), None)


def prune(root: Root, keep: int) -> list[int]:
    """Remove all checkpoints but the newest `keep` that verify. Those that are newer than all of these, and damaged, stay.

    May be called by several processes at once.

    Checkpoints that this process has itself written or verified are not read again.

    Returns:
        The steps that were removed.
    """
    if type(keep) is not int or keep < 1:
        raise ValueError(f"keep must be a whole number >= 1, got {keep!r}")
    return prune_in(open_store(root), keep)


def prune_in(store: Store, keep: int, *, spare: int | None = None) -> list[int]:
    """See `prune`.

    Args:
        spare: a step that stays whatever there is.
    """
    kept = []
    for step in _newest_first(store, trusts=True):
        kept.append(step)
        if len(kept) == keep:
            break
    else:
        return []
    removed = [step for step in candidates(store) if step < kept[-1] and step != spare]
    for step in removed:
        store.remove(folder_of(step))
    return removed


def _newest_first(store: Store, *, trusts: bool = False) -> Iterator[int]:
    """The steps that verify."""
    for step in reversed(candidates(store)):
        try:
            _verify(store, step, trusts=trusts)
        except DamagedError as error:
            warnings.warn(f"{error}\n  It is passed over.", UserWarning, stacklevel=4)
        except MismatchError as error:  # of a later version
            warnings.warn(f"{error}\n  It is passed over.", UserWarning, stacklevel=4)
        except (CheckpointError, FileNotFoundError):  # it was pruned meanwhile
            continue
        else:
            yield step


def _verify(store: Store, step: int, *, trusts: bool = False) -> None:
    reader = CheckpointReader(store, step)
    reader.check_files()
    if not (trusts and (store.root, step, reader.digest) in _trusted):
        reader.verify((), 0, 1)
        trust(store, step, reader.text)


def trust(store: Store, step: int, manifest: bytes) -> None:
    """Pruning need not read a checkpoint that this process has written or verified."""
    _trusted.add((store.root, step, sha256(manifest)))


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
