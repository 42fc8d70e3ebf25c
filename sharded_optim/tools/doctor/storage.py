"""Check whether a rank can write into the folder of checkpoints, and how fast, by the same operations as a checkpoint."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from statistics import median

from sharded_optim.checkpoint.local_store import LocalStore
from sharded_optim.tools.doctor.findings import Finding, Status

__all__ = ["PREFIX", "examine", "local_path", "measure"]

PREFIX = ".sharded-optim-doctor-"  # prefix of the names of temporary files and folders
SIZE = 64 * 2**20  # bytes of the file whose writing is timed
SMALL = 4096
SMALL_REPETITIONS = 5
LEAST_FREE = 2**30


def local_path(folder: str | os.PathLike[str]) -> str:
    """Return the absolute path of a folder.

    Raises:
        ValueError: it is a URL.
    """
    path = os.fspath(folder)
    if "://" in path:
        raise ValueError(f"--folder must be on a local or network file system, got {path!r}; object stores cannot be examined")
    return os.path.abspath(path)


def examine(folder: str) -> list[Finding]:
    """Check that the folder can be written; measure its free space and the latency of a small fsync."""
    try:
        with _temporary_folder(folder) as own:
            latency = _fsync_seconds(os.path.join(own, "small"))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return [_refused(folder, error)]
    data = {"path": folder, "free": free, "fsync_seconds": latency}
    value = f"{free / 1e9:,.1f} GB free, {latency * 1e3:,.2f} ms for a small fsync, {folder}"
    if free < LEAST_FREE:
        return [_finding("folder", "warning", value, "remove old checkpoints, or give another --folder", **data)]
    return [_finding("folder", "ok", value, **data)]


def measure(folder: str) -> list[Finding]:
    """Measure the speed of a write with the operations of a checkpoint: file, fsync, rename, fsync of the folder."""
    try:
        if shutil.disk_usage(folder).free < 2 * SIZE:
            return []  # `examine` has warned
        with _temporary_folder(folder) as own:
            seconds = _write_seconds(own)
    except OSError as error:
        return [_refused(folder, error, "write speed")]
    value = f"{SIZE / seconds / 1e6:,.0f} MB/s, {SIZE // 2**20} MiB with fsync and rename"
    return [_finding("write speed", "ok", value, bytes_per_second=SIZE / seconds, size=SIZE)]


def _refused(folder: str, error: OSError, name: str = "folder") -> Finding:
    """Return the finding that a folder cannot be written."""
    reason = error.strerror or str(error)
    way_out = "give a --folder that this user can write" if os.path.exists(folder) else f"mkdir -p {folder}, or give another --folder"
    return _finding(name, "problem", f"cannot write in {folder}: {reason}", way_out, path=folder, errno=error.errno)


def _finding(name: str, status: Status, value: str, way_out: str | None = None, **data: str | int | float | None) -> Finding:
    return Finding(section="storage", name=name, status=status, value=value, way_out=way_out, data=data)


def _temporary_folder(folder: str) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder, ignore_cleanup_errors=True)


def _fsync_seconds(path: str) -> float:
    times = []
    with open(path, "wb", buffering=0) as stream:
        for _ in range(SMALL_REPETITIONS):
            stream.write(b"\1" * SMALL)
            begin = time.perf_counter()
            os.fsync(stream.fileno())
            times.append(time.perf_counter() - begin)
    return median(times)


def _write_seconds(own: str) -> float:
    store = LocalStore(own)
    content = memoryview(os.urandom(SIZE))  # random: no file system can compress it
    begin = time.perf_counter()
    draft = store.begin("written", secrets.token_hex(4))
    with store.create(draft, "content") as file:
        file.write(content)
    store.publish(draft, "written")
    return time.perf_counter() - begin
