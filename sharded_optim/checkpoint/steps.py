"""The checkpoints of a root: list, describe and verify them, in one process without communication."""

from __future__ import annotations

from sharded_optim.checkpoint.errors import CheckpointError, NoCheckpointError
from sharded_optim.checkpoint.integrity import skipping_damaged, verify_all
from sharded_optim.checkpoint.manifest import Manifest
from sharded_optim.checkpoint.reader import CheckpointReader
from sharded_optim.checkpoint.store import COMMITTED, AnyPath, Store, folder_of, open_store, steps_in

__all__ = ["candidates", "describe", "existing_step", "latest", "steps", "verify"]


def steps(root: AnyPath) -> list[int]:
    """List the committed steps under a root, ascending. Reads no data."""
    return _committed(open_store(root))


def _committed(store: Store) -> list[int]:
    """List the steps, ascending, that are committed or whose folders cannot be listed."""
    return [step for step in steps_in(store.folders()) if _is_committed(store, step)]


def _is_committed(store: Store, step: int) -> bool:
    try:
        return COMMITTED in store.files(folder_of(step))
    except OSError:
        return True


def candidates(store: Store) -> list[int]:
    """List the steps, ascending, that are committed or have lost their marker, which is not noticed on an object store."""
    return steps_in(store.folders()) if store.renames else _committed(store)


def existing_step(store: Store, step: int | None) -> int:
    """Return `step` if it exists; for None, the highest step of `candidates`.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    existing = candidates(store)
    if step is None and not existing:
        raise NoCheckpointError(f"there is no checkpoint in {store.root}")
    if step is not None and step not in existing:
        raise CheckpointError(f"there is no checkpoint of step {step} in {store.root}; there are {existing or 'none'}")
    return existing[-1] if step is None else step


def describe(root: AnyPath, step: int | None = None) -> Manifest:
    """Read the manifest of a checkpoint.

    Args:
        step: None: the highest that is committed.

    Raises:
        CheckpointError: there is no such checkpoint.
        DamagedError: its manifest differs from the saved one.
    """
    store = open_store(root)
    return CheckpointReader(store, existing_step(store, step)).manifest


def verify(root: AnyPath, step: int | None = None) -> int:
    """Read all of a checkpoint and compare every byte with the saved one, by SHA-256.

    Args:
        step: None: the highest that is committed.

    Returns:
        The step that was verified.

    Raises:
        CheckpointError: there is no such checkpoint.
        DamagedError: bytes differ from the saved ones; `problems` names each file and tensor.
    """
    store = open_store(root)
    step = existing_step(store, step)
    verify_all(CheckpointReader(store, step))
    return step


def latest(root: AnyPath) -> int | None:
    """Find the highest step that verifies; None if there is none.

    Warns:
        UserWarning: for each higher step that is damaged or cannot be read.
    """
    store = open_store(root)
    for step in reversed(candidates(store)):
        with skipping_damaged():
            verify_all(CheckpointReader(store, step))
            return step
    return None
