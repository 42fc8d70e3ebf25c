"""`LocalStore`: checkpoints in a folder of a local or network file system. Published checkpoints survive a power cut."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
from collections.abc import Hashable

__all__ = ["AnyPath", "LocalStore", "sync"]

AnyPath = str | os.PathLike[str]

BROKEN_LINK = (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)  # errors of a broken link, which are permanent
REMOVED = ".removed"  # suffix of a folder that is being removed

logger = logging.getLogger(__name__)


class LocalStore:
    """A `Store` in a folder.

    Args:
        root: the folder; it need not exist.
    """

    renames = True

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)  # the working directory may change during a save in the background

    def folders(self) -> list[str]:
        """See `Store.folders`. Lists files and broken links named like a step too, so that they are reported as damaged."""
        try:
            with os.scandir(self.root) as entries:
                return [entry.name for entry in entries if entry.name.startswith("step-") or _is_folder(entry)]
        except FileNotFoundError:
            return []

    def files(self, folder: str) -> dict[str, tuple[int, Hashable]]:
        try:
            with os.scandir(self._path(folder)) as entries:
                statuses = {entry.name: entry.stat() for entry in entries if _is_file(entry)}
        except FileNotFoundError:
            return {}
        # With st_ctime_ns, as programs can set the modification time.
        return {name: (file.st_size, (file.st_ino, file.st_mtime_ns, file.st_ctime_ns)) for name, file in statuses.items()}

    def read(self, folder: str, file: str, offset: int, into: memoryview) -> int:
        with open(self._path(folder, file), "rb", buffering=0) as stream:
            stream.seek(offset)
            total = 0
            while total < len(into) and (count := stream.readinto(into[total:])):
                total += count
        return total

    def begin(self, folder: str, nonce: str) -> str:
        _make_folders(self.root)
        draft = f".{folder}.{nonce}"
        os.mkdir(self._path(draft))
        return draft

    def is_draft(self, folder: str) -> bool:
        return folder.startswith(".step-")

    def create(self, folder: str, file: str) -> LocalFile:
        return LocalFile(self._path(folder, file))

    def publish(self, draft: str, folder: str) -> None:
        sync(self._path(draft))
        if os.path.lexists(self._path(folder)):  # os.rename would replace an empty folder
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self._path(folder))
        os.rename(self._path(draft), self._path(folder))
        try:
            sync(self.root)
        except BaseException:  # a save that fails leaves no checkpoint
            os.rename(self._path(folder), self._path(draft))
            raise

    def set_aside(self, folder: str) -> str:
        name = f"{folder}.unreadable-{secrets.token_hex(4)}"
        os.rename(self._path(folder), self._path(name))
        sync(self.root)
        return name

    def remove(self, folder: str) -> None:
        renamed = f".{folder.lstrip('.')}.{secrets.token_hex(4)}{REMOVED}"
        try:
            # Renamed first, even a draft: another process that is about to publish it must not publish a part of it.
            os.rename(self._path(folder), self._path(renamed))
            if not self.is_draft(folder):  # after a crash it must not reappear with a part of its files
                sync(self.root)
        except FileNotFoundError:  # another process has removed it
            return
        except OSError:
            if not self.is_draft(folder):
                raise
            renamed = folder
        path = self._path(renamed)
        try:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:  # a link, whose target stays
                os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("%s could not be removed completely: %s", path, error)

    def _path(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)


class LocalFile:
    """A new file, a `Writer`. A context manager: if the block succeeds, the file is on the disk afterwards."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, content: memoryview) -> None:
        while content:
            content = content[os.write(self._descriptor, content) :]

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError as error:
        if error.errno not in BROKEN_LINK:
            raise
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _make_folders(path: str) -> None:
    """Create folders as os.makedirs does, and wait until they are on the disk."""
    path = os.path.abspath(path)
    if os.path.isdir(path):
        return
    _make_folders(os.path.dirname(path))
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
    sync(os.path.dirname(path))


def sync(path: AnyPath) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems in user space do not support it
            raise
    finally:
        os.close(descriptor)
