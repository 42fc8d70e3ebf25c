"""Write files atomically: a reader sees all of the old content or all of the new, even if the writer is killed.

Used by trackers, by reports and by the training job. Files that must be on the disk before training
continues, as checkpoints, are not written here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_write", "write_text"]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the path of a draft in the same folder, to be written in the `with` block. At its end the draft replaces the file."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write text to a file atomically, as UTF-8."""
    with atomic_write(path) as draft:
        draft.write_text(text, encoding="utf-8")
