"""`UrlStore`: checkpoints behind a URL, through fsspec.

Object stores cannot rename: a draft is a folder with its final name that lacks the marker.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["UrlStore"]

# Parts of the names of file properties that change when a file is written to: LastModified, mtime, ETag, updated, ...
VERSION_KEYS = ("modif", "mtime", "etag", "updated", "generation", "created", "write_time", "checksum", "md5")


class UrlStore:
    """A `Store` behind a URL.

    Args:
        root: a URL for fsspec, such as s3://bucket/run or memory://run.
    """

    renames = False

    def __init__(self, root: str) -> None:
        from fsspec.core import url_to_fs

        self.root = root
        self._files, path = url_to_fs(root)
        self._root = str(path).rstrip("/")

    def folders(self) -> list[str]:
        return [_name(entry) for entry in self._list(self._root) if entry["type"] == "directory"]

    def files(self, folder: str) -> dict[str, tuple[int, Hashable]]:
        return {_name(entry): (entry["size"], _version(entry)) for entry in self._list(self._path(folder)) if entry["type"] == "file"}

    def read(self, folder: str, file: str, offset: int, into: memoryview) -> int:
        with _as_os_error():
            content = self._files.cat_file(self._path(folder, file), start=offset, end=offset + len(into))
        if len(content) > len(into):
            raise OSError(f"{self._path(folder, file)}: the store returned {len(content)} bytes for a request of {len(into)}")
        into[: len(content)] = content
        return len(content)

    def begin(self, folder: str, nonce: str) -> str:
        self.remove(folder)  # the rest of an earlier save; the caller has checked that it is not committed
        self._files.makedirs(self._path(folder), exist_ok=True)
        return folder

    def is_draft(self, folder: str) -> bool:
        return False

    @contextmanager
    def create(self, folder: str, file: str) -> Iterator[Any]:
        """See `Store.create`. In an object store the object exists only after the block."""
        from fsspec.spec import AbstractBufferedFile

        opened = self._files.open(self._path(folder, file), "wb")
        try:
            yield opened
        except BaseException:
            getattr(opened, "discard", opened.close)()
            if isinstance(opened, AbstractBufferedFile):
                opened.closed = True  # else the incomplete object would be uploaded when it is garbage-collected
            raise
        opened.close()

    def publish(self, draft: str, folder: str) -> None:
        """Do nothing: the marker, which is written last, has published the draft."""

    def set_aside(self, folder: str) -> str:
        raise OSError(errno.ENOTSUP, "an object store cannot rename", self._path(folder))

    def remove(self, folder: str) -> None:
        try:
            marker = self._path(folder, "COMMITTED")  # first: without it the rest is not a checkpoint
            if self._files.exists(marker):
                self._files.rm_file(marker)
            self._files.rm(self._path(folder), recursive=True)
        except FileNotFoundError:
            return

    def _list(self, path: str) -> list[dict[str, Any]]:
        try:
            with _as_os_error():
                self._files.invalidate_cache(path)
                return self._files.ls(path, detail=True)
        except FileNotFoundError:
            return []

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts))


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn the errors of HTTP and cloud clients behind fsspec into OSErrors."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise OSError(repr(error)) from error


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


def _version(entry: dict[str, Any]) -> str | None:
    """Return the listed properties that change when a file is written to; None if the store lists none."""
    values = {key: value for key, value in entry.items() if value is not None and any(part in key.lower() for part in VERSION_KEYS)}
    return repr(sorted(values.items())) if values else None
