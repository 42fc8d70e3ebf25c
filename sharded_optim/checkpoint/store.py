"""`Store`, the interface of storage for checkpoints, and the names of files and folders. `LocalStore` and `UrlStore` implement it.

A root holds a folder for each step. A checkpoint is first written to a draft, a folder that is not a checkpoint yet, and is then published:
on a local file system by a rename, on an object store by its marker, which is written last. Used by saving, reading and pruning.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from sharded_optim.checkpoint.local_store import AnyPath, LocalStore
from sharded_optim.checkpoint.url_store import UrlStore

__all__ = ["COMMITTED", "MANIFEST", "AnyPath", "Store", "folder_of", "open_store", "shard_name", "steps_in"]

MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"  # holds the SHA-256 of the manifest
STEP_FOLDER = re.compile(r"step-([0-9]{9,255})")


class Writer(Protocol):
    """A new file that is being written."""

    def write(self, content: memoryview) -> object: ...


class Store(Protocol):
    """Folders of files under a root.

    Attributes:
        root: the path or URL.
        renames: whether drafts are published by a rename: then a published folder without a marker has lost it.
    """

    root: str
    renames: bool

    def folders(self) -> list[str]:
        """List the folders under the root, including drafts; an empty list if the root does not exist."""
        ...

    def files(self, folder: str) -> dict[str, tuple[int, Hashable]]:
        """List the files of a folder, without broken links; empty if the folder does not exist.

        Returns:
            By name: the size in bytes, and a value that changes when the file is written to, as far as the file system notices; None if
            it has no times or tags of files.

        Raises:
            OSError: the folder cannot be listed.
        """
        ...

    def read(self, folder: str, file: str, offset: int, into: memoryview) -> int:
        """Read bytes until `into` is full or the file ends. Called from several threads.

        Returns:
            The number of bytes.

        Raises:
            OSError: the file cannot be read.
        """
        ...

    def begin(self, folder: str, nonce: str) -> str:
        """Create a draft of `folder`, and the root if need be; return the draft's name."""
        ...

    def is_draft(self, folder: str) -> bool:
        """Return whether a folder is a draft of any process, running or not, or the rest of a folder that was being removed."""
        ...

    def create(self, folder: str, file: str) -> AbstractContextManager[Writer]:
        """Create a file in a draft, to be written in a `with` block. It is on the disk afterwards, or incomplete if the block raised."""
        ...

    def publish(self, draft: str, folder: str) -> None:
        """Publish a complete draft as `folder`, and wait until this is on the disk. An existing folder is not replaced."""

    def set_aside(self, folder: str) -> str:
        """Rename a folder to a name that no checkpoint has, and return the new name.

        Raises:
            OSError: it cannot be renamed.
        """
        ...

    def remove(self, folder: str) -> None:
        """Remove a folder if it exists. Readers never see a checkpoint that lacks a part."""


def open_store(root: AnyPath) -> Store:
    """Open the store of a path, or of a URL such as s3://bucket/run or memory://run."""
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
    """List the steps, ascending, that these folders are named after. Other folders are skipped."""
    steps = ((int(match[1]), match[0]) for match in map(STEP_FOLDER.fullmatch, folders) if match)
    return sorted(step for step, folder in steps if folder == folder_of(step))
