"""What a local store does to a disk, call by call, and what a power cut after any of the calls may leave of it.

A `Recorder` takes the places of `os` and `shutil` in the store's module. A `Disk` replays what it has recorded. It keeps apart what
programs see and what is safe: a file's content since its fsync, and a folder's entries since its own. What is not safe, a power cut may
lose, all of it or any part: real file systems promise more, but each something else.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from sharded_optim.checkpoint import local_store

__all__ = ["LOSSES", "Disk", "Operation", "Recorder"]

# What changes nothing on a disk. Everything else that is not recorded is refused, so that no call is forgotten here.
HARMLESS = {"O_CREAT", "O_EXCL", "O_RDONLY", "O_WRONLY", "fspath", "getpid", "path", "scandir", "strerror"}
LOSSES = ("nothing", "everything", "data", "half of the data", "names", "names of folders", "anything", "anything else")


@dataclass(frozen=True)
class Operation:
    """A call that has returned."""

    time: float  # of all processes of a machine alike
    call: str
    path: str
    argument: Any = None


class Recorder:
    """In the place of `os` and `shutil`: does what they do, but for syncing, and writes it down."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._paths: dict[int, str] = {}
        self._lock = threading.Lock()

    @classmethod
    @contextmanager
    def at_work(cls) -> Iterator[Recorder]:
        recorder = cls()
        with mock.patch.object(local_store, "os", recorder), mock.patch.object(local_store, "shutil", recorder):
            yield recorder

    def __getattr__(self, name: str) -> Any:
        if name not in HARMLESS:
            raise AssertionError(f"os.{name} is not recorded; teach {__name__} what it does")
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        descriptor = os.open(path, flags, mode)
        self._paths[descriptor] = path
        if flags & os.O_CREAT:
            self._add("create", path)
        return descriptor

    def write(self, descriptor: int, content: memoryview) -> int:
        count = os.write(descriptor, content)
        self._add("write", self._paths[descriptor], bytes(content[:count]))
        return count

    def fsync(self, descriptor: int) -> None:
        self._add("fsync", self._paths[descriptor])

    def close(self, descriptor: int) -> None:
        del self._paths[descriptor]
        os.close(descriptor)

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        os.mkdir(path, mode)
        self._add("mkdir", path)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)
        self._add("rename", source, target)

    def rmtree(self, path: str, ignore_errors: bool = False) -> None:
        """One by one, as it is not at once."""
        if ignore_errors and not os.path.isdir(path):
            return
        for entry in sorted(os.listdir(path), reverse=True):  # COMMITTED last: what is half removed looks most like a checkpoint
            os.unlink(os.path.join(path, entry))
            self._add("remove", os.path.join(path, entry))
        os.rmdir(path)
        self._add("remove", path)

    def _add(self, call: str, path: str, argument: Any = None) -> None:
        with self._lock:
            self.operations.append(Operation(time.monotonic(), call, path, argument))


@dataclass
class _File:
    content: bytes = b""
    safe: bytes = b""

    def sync(self) -> None:
        self.safe = self.content


@dataclass
class _Folder:
    entries: dict[str, Any] = field(default_factory=dict)
    safe: dict[str, Any] = field(default_factory=dict)
    since: list[tuple[str, Any]] = field(default_factory=list)  # changes: what a name is of, None: of nothing any more

    def set(self, name: str, node: Any) -> None:
        self.since.append((name, node))
        _change(self.entries, name, node)

    def sync(self) -> None:
        self.safe = dict(self.entries)
        self.since.clear()


class Disk:
    """Folders and files.

    Args:
        folder: what is on the disk to begin with, all of it safe.
    """

    def __init__(self, folder: Path) -> None:
        self._where = folder
        self._top = _read(folder)

    def apply(self, operation: Operation) -> None:
        parent, name = self._place(operation.path)
        if operation.call == "create":
            parent.set(name, _File())
        elif operation.call == "mkdir":
            parent.set(name, _Folder())
        elif operation.call == "write":
            parent.entries[name].content += operation.argument
        elif operation.call == "fsync":
            (parent.entries[name] if name else self._top).sync()
        elif operation.call == "remove":
            parent.set(name, None)
        else:
            assert operation.call == "rename"
            node = parent.entries[name]
            parent.set(name, None)
            other, target = self._place(operation.argument)
            other.set(target, node)

    def after_power_cut(self, target: Path, lost: str, seed: int) -> None:
        """Write what is left to a new folder.

        Args:
            lost: one of `LOSSES`: of what is not safe.
            seed: of what is lost where that is anything.
        """
        _write(self._top, target, lost, random.Random(f"{lost} {seed}"))

    def _place(self, path: str) -> tuple[_Folder, str]:
        """The folder that holds what a path is of, and its name there."""
        *way, name = Path(path).relative_to(self._where).parts or ("",)
        folder = self._top
        for part in way:
            folder = folder.entries[part]
        return folder, name


def _read(folder: Path) -> _Folder:
    entries = {path.name: _read(path) if path.is_dir() else _File(path.read_bytes(), path.read_bytes()) for path in folder.iterdir()}
    return _Folder(entries=entries, safe=dict(entries))


def _write(folder: _Folder, target: Path, lost: str, chance: random.Random) -> None:
    target.mkdir()
    for name, node in _left_of(folder, lost, chance).items():
        if isinstance(node, _Folder):
            _write(node, target / name, lost, chance)
        else:
            (target / name).write_bytes(_content_left_of(node, lost, chance))


def _left_of(folder: _Folder, lost: str, chance: random.Random) -> dict[str, Any]:
    if lost in ("nothing", "data", "half of the data"):
        return folder.entries
    entries = dict(folder.safe)
    for name, node in folder.since:
        is_folder = isinstance(node or entries.get(name), _Folder)
        if (lost == "names of folders" and not is_folder) or (lost.startswith("anything") and chance.random() < 0.5):
            _change(entries, name, node)
    return entries


def _content_left_of(file: _File, lost: str, chance: random.Random) -> bytes:
    unsafe = len(file.content) - len(file.safe)
    if lost in ("nothing", "names", "names of folders") or not unsafe:
        return file.content
    if lost in ("everything", "data"):
        return file.safe
    if lost == "half of the data":
        return file.content[: len(file.safe) + unsafe // 2]
    size = chance.randint(0, unsafe)
    return file.content[: len(file.safe) + size] + bytes(chance.choice((0, unsafe - size)))  # blocks that were allotted, and not written


def _change(entries: dict[str, Any], name: str, node: Any) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


def merged(logs: Sequence[Sequence[Operation]]) -> list[Operation]:
    """What several processes of one machine have done, in its order."""
    return sorted((operation for log in logs for operation in log), key=lambda operation: operation.time)
