"""Where checkpoints are kept: a local folder, or anything that fsspec has a URL for. What both are asked for is the `Store` below.

A root holds a folder for each step. A checkpoint begins as a draft, a folder that nobody takes for a checkpoint, and becomes one when it is
published: by a rename on a local file system, by its marker, which is written last, on an object store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable
from typing import Protocol

from sharded_optim.checkpoint.local_store import LocalStore
from sharded_optim.checkpoint.url_store import UrlStore

__all__ = ["COMMITTED", "MANIFEST", "Store", "Writer", "folder_of", "open_store", "shard_name", "steps_in"]

MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"  # holds the SHA-256 of the manifest
STEP_FOLDER = re.compile(r"step-([0-9]{9,255})")


class Writer(Protocol):
    """A new file."""

    def write(self, content: memoryview) -> None: ...

    def close(self) -> None:
        """Return when it is on the disk."""
        ...

    def abandon(self) -> None:
        """Close it, whatever it is then."""
        ...


class Store(Protocol):
    """Folders of files under a root.

    Attributes:
        root: as the user gave it.
        renames: whether a draft becomes the folder by a rename, so that a folder without a marker has lost it.
    """

    root: str
    renames: bool

    def folders(self) -> list[str]:
        """Under the root, drafts too; none where there is no root."""
        ...

    def files(self, folder: str) -> dict[str, tuple[int, Hashable]]:
        """A folder's files by name; none where there is no folder. Links that lead nowhere are no files.

        Returns:
            Of each its size in bytes, and a value that changes when it is written to, as far as the file system notices; None where the
            file system tells nothing of that.

        Raises:
            OSError: the folder cannot be listed.
        """
        ...

    def read(self, folder: str, file: str, offset: int, into: memoryview) -> int:
        """Read bytes until `into` is full or the file ends; from any thread.

        Returns:
            How many.

        Raises:
            OSError: the file cannot be read.
        """
        ...

    def begin(self, folder: str, nonce: str) -> str:
        """Make a draft of `folder`, and the root if need be; returns the draft's name."""
        ...

    def is_draft(self, folder: str) -> bool:
        """Whether a folder is a draft, or what was being removed, of this process or of one that died."""
        ...

    def create(self, folder: str, file: str) -> Writer:
        """A new file in a draft."""
        ...

    def publish(self, draft: str, folder: str) -> None:
        """Make a complete draft the folder; return when that is on the disk. Does not replace a folder."""
        ...

    def set_aside(self, folder: str) -> str:
        """Give a folder another name, which is not that of a step, and return it.

        Raises:
            OSError: it cannot be renamed.
        """
        ...

    def remove(self, folder: str) -> None:
        """At once, for whoever looks, and also if it is gone by then."""
        ...


def open_store(root: str | os.PathLike[str]) -> Store:
    """The store of a path, or of a URL such as s3://bucket/run or memory://run."""
    where = os.fspath(root)
    if "://" not in where:
        return LocalStore(where)
    protocol, _, path = where.partition("://")
    return LocalStore(path) if protocol in ("file", "local") else UrlStore(where)


def folder_of(step: int) -> str:
    return f"step-{step:09d}"


def shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


def steps_in(folders: Iterable[str]) -> list[int]:
    """Of the folders that have exactly the name of a step, ascending."""
    steps = ((int(match[1]), match[0]) for match in map(STEP_FOLDER.fullmatch, folders) if match)
    return sorted(step for step, folder in steps if folder == folder_of(step))
