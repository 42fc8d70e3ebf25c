"""A record of the integrity of checkpoints that this process has read.

Pruning relies on it: before old checkpoints are removed, every byte of a checkpoint that stays must have been verified, and its files
not written to since. Having written a checkpoint is not enough. Loading and verification record the integrity; `removal.py` reads it.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from sharded_optim.checkpoint.collectives import all_or_nothing, rank_and_world_size
from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, MismatchError, UnreadableError
from sharded_optim.checkpoint.reader import CheckpointReader, list_files
from sharded_optim.checkpoint.store import Store, folder_of

__all__ = ["Integrity", "forget", "known_integrity", "record", "recording_integrity", "skipping_damaged", "verify_all", "verify_together"]


class Integrity(enum.Enum):
    """The result of reading a checkpoint."""

    PLAUSIBLE = enum.auto()  # the manifest is intact, and the files have the right sizes
    VERIFIED = enum.auto()  # every byte is as it was saved
    DAMAGED = enum.auto()


# By root and step: the version of the files that were read (see `list_files`), and their integrity.
_known: dict[tuple[str, int], tuple[bytes, Integrity]] = {}


def known_integrity(store: Store, step: int) -> Integrity | None:
    """Return the recorded integrity of a checkpoint; None if there is no record, or the store shows that files were written to since.

    Raises:
        DamagedError: the checkpoint is recorded as damaged; see also `list_files`.
        UnreadableError: see `list_files`.
    """
    _, current = list_files(store, step)
    version, integrity = _known.get((store.root, step), (None, None))
    if version is None or version != current:
        return None
    if integrity is Integrity.DAMAGED:
        raise DamagedError(f"{store.root}/{folder_of(step)} was damaged when this process read it")
    return integrity


def record(reader: CheckpointReader, integrity: Integrity) -> None:
    """Record the integrity of a checkpoint, unless the store cannot notice when its files are written to."""
    if reader.version is not None:
        _known[reader.root, reader.step] = reader.version, integrity


def forget(store: Store, step: int) -> None:
    """Drop the record of a checkpoint that is removed."""
    _known.pop((store.root, step), None)


@contextmanager
def recording_integrity(reader: CheckpointReader) -> Iterator[None]:
    """Record a checkpoint as verified, or as damaged, by whether the block, which must read all of it, raises DamagedError.

    A checkpoint that could not be read is neither: its record is dropped.
    """
    try:
        yield
    except UnreadableError:  # it may or may not be damaged
        _known.pop((reader.root, reader.step), None)
        raise
    except DamagedError:
        record(reader, Integrity.DAMAGED)
        raise
    record(reader, Integrity.VERIFIED)


def verify_all(reader: CheckpointReader) -> None:
    """Verify all bytes of a checkpoint in this process. Raises DamagedError if any differ from the saved bytes."""
    reader.check_files()
    with recording_integrity(reader):
        reader.verify((), 0, 1)


def verify_together(store: Store, step: int, process_group: dist.ProcessGroup | None) -> None:
    """Verify all bytes of a checkpoint, each rank a share, unless rank 0 has recorded it as verified. A collective.

    Raises:
        CheckpointError: see `CheckpointReader`.
    """
    rank, world_size = rank_and_world_size(process_group)
    where = f"{store.root}/{folder_of(step)}"

    def open_reader() -> tuple[CheckpointReader, Integrity | None]:
        integrity = known_integrity(store, step) if rank == 0 else None
        reader = CheckpointReader(store, step)
        reader.check_files()
        return reader, integrity

    (reader, _), known = all_or_nothing(f"opening {where}", open_reader, process_group, share=lambda opened: opened[1])
    if known[0] is not Integrity.VERIFIED:
        with recording_integrity(reader):
            all_or_nothing(f"reading back {where}", lambda: reader.verify((), rank, world_size), process_group)


@contextmanager
def skipping_damaged() -> Iterator[None]:
    """Suppress the error of a checkpoint: with a warning if it is damaged or of a later version, silently if it was removed meanwhile."""
    try:
        yield
    except (DamagedError, MismatchError) as error:
        warnings.warn(f"{error}\n  It is skipped.", UserWarning, stacklevel=5)
    except CheckpointError:
        pass
