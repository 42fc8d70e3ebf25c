"""A full, read-only or missing disk, or a rank that fails, is one error on every rank, and committed checkpoints are untouched."""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist

import sharded_optim as so
from benchmarks.given_gradients import Model, Shapes, gradients
from sharded_optim import checkpoint
from sharded_optim.checkpoint import background, local_store, saving, shard_file
from sharded_optim.checkpoint.content import Content
from sharded_optim.checkpoint.local_store import LocalStore
from sharded_optim.checkpoint.reader import CheckpointReader

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")

LAYERS: Shapes = (((7, 3), (7,)), ((9, 4),), ((33, 17), (33,)))


class Failing:
    """In the place of `os` in the local store: one call fails, for paths that end in given words."""

    def __init__(self, call: str, path: str, number: int) -> None:
        self._call, self._path, self._number = call, path, number

    def __getattr__(self, name: str) -> Any:
        return self._fail if name == self._call else getattr(os, name)

    def _fail(self, target: Any, *arguments: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
        if path.endswith(self._path):
            raise OSError(self._number, os.strerror(self._number), path)
        return getattr(os, self._call)(target, *arguments)


@contextmanager
def failing(call: str, path: str, number: int = errno.ENOSPC, *, on: Sequence[int] = (0, 1)) -> Iterator[None]:
    """Let a call fail.

    Args:
        path: its end.
        number: of the error.
        on: which ranks.
    """
    if rank_here() not in on:
        yield
        return
    with mock.patch.object(local_store, "os", Failing(call, path, number)):
        yield


def rank_here() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def trained(steps: int = 2, seed: int = 0) -> dict[str, Any]:
    model = Model(LAYERS, seed=seed)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    options = {"lr": 1e-2, "weight_decay": 0.1, "backend": "eager"}
    optimizer = so.ShardedOptimizer(model, so.StableAdamW, **options) if world_size > 1 else so.StableAdamW(model.parameters(), **options)
    for step in range(1, steps + 1):
        model(gradients(step, LAYERS, rank=rank_here(), world_size=world_size)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def drafts(root: Path) -> list[str]:
    return [path.name for path in root.glob(".*")]


SHARD_OF_ONE = "shard-00000-of-00001.safetensors"
CALLS = [
    ("mkdir", ""),
    ("open", SHARD_OF_ONE),
    ("write", SHARD_OF_ONE),
    ("fsync", SHARD_OF_ONE),
    ("open", "manifest.json"),
    ("write", "manifest.json"),
    ("fsync", "manifest.json"),
    ("open", "COMMITTED"),
    ("write", "COMMITTED"),
    ("fsync", "COMMITTED"),
    ("rename", ""),
    ("fsync", "/run"),  # the root, when the checkpoint has its name already
]
ERRORS = [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT]


@pytest.mark.parametrize("save", ["save", "async_save"])
def test_a_save_that_fails_anywhere_names_the_cause_and_keeps_existing_checkpoints(save: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    live = trained()

    def act(step: int) -> None:
        if save == "save":
            checkpoint.save(root, step, **live)
        else:
            checkpoint.async_save(root, step, **live).wait()

    act(0)
    for step, (call, path) in enumerate(CALLS, 1):
        number = ERRORS[step % len(ERRORS)]
        with failing(call, path, number), pytest.raises(checkpoint.CheckpointError, match=rf"{os.strerror(number)}.*{root}") as caught:
            act(step)
        assert f"step-{step:09d}" in str(caught.value), (call, path)
        assert checkpoint.steps(root) == list(range(step)), (call, path)
        assert not drafts(root), (call, path)
        assert checkpoint.verify(root) == step - 1
        act(step)  # with the same optimizer
    assert checkpoint.verify(root) == len(CALLS)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_save_that_cannot_hash_raises(number: int, tmp_path: Path) -> None:
    """It waited for a thread that had died."""
    live = trained()
    with failing_hash(number), pytest.raises(checkpoint.CheckpointError, match=r"writing .* failed: MemoryError\('to hash'\)"):
        checkpoint.save(tmp_path, 1, **live)
    assert not drafts(tmp_path)
    assert "sharded_optim hash" not in {thread.name for thread in threading.enumerate()}
    checkpoint.save(tmp_path, 1, **live)
    assert checkpoint.verify(tmp_path) == 1


@pytest.mark.timeout(20)
def test_a_save_that_cannot_hash_stops_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes after that is for nothing, and may be hours of a large checkpoint."""
    parts: list[int] = []
    draft = saving.begin(tmp_path, 1, lambda: Content.of(torch.nn.Linear(2, 50), None, None))
    (store, (chunk, *_)) = draft.store, draft.chunks
    store.begin("step-000000001", "draft")

    def content(_: object) -> torch.Tensor:
        parts.append(1)
        time.sleep(0.001)
        return draft.content(chunk)

    with failing_hash(1), pytest.raises(MemoryError):
        shard_file.write_shard(store, ".step-000000001.draft", SHARD_OF_ONE, [chunk] * 200, content, [chunk.key])
    assert len(parts) < 100


@contextmanager
def failing_hash(number: int, *, on: int = 0) -> Iterator[None]:
    """Let the hash of a chunk fail, the `number`-th of a shard, on one rank."""
    hashed = itertools.count(1)

    def failing(content: memoryview) -> str:
        if next(hashed) == number:
            raise MemoryError("to hash")
        return hashlib.sha256(content).hexdigest()

    if rank_here() != on:
        yield
        return
    with mock.patch.object(shard_file, "sha256", failing):
        yield


@pytest.mark.timeout(20)
@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_without_more_threads_nothing_hangs(limit: int, tmp_path: Path) -> None:
    """Loading reads in those that there are, a save in the background goes to the foreground, and one that cannot hash says so."""
    live = trained()
    checkpoint.save(tmp_path, 1, **live)
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith("sharded_optim"):
            if len(started) >= limit:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    with mock.patch.object(threading.Thread, "start", limited):
        assert checkpoint.verify(tmp_path) == 1
        started.clear()
        assert checkpoint.load(tmp_path, **live) is None
        started.clear()
        handle = checkpoint.async_save(tmp_path, 2, **live)
        with nullcontext() if limit > 1 else pytest.raises(checkpoint.CheckpointError, match="can't start new thread"):
            handle.wait()
        assert handle.done()
    assert not drafts(tmp_path)
    assert checkpoint.latest(tmp_path) == (2 if limit > 1 else 1)


def test_a_checkpoint_that_cannot_be_pruned_is_a_warning(tmp_path: Path) -> None:
    """The checkpoint is there."""
    live = trained()
    checkpoint.save(tmp_path, 1, **live)
    with failing("rename", "step-000000001", errno.EACCES), pytest.warns(UserWarning, match=r"could not be pruned: .*Permission denied"):
        checkpoint.save(tmp_path, 2, keep=1, **live)
    assert checkpoint.steps(tmp_path) == [1, 2]
    checkpoint.save(tmp_path, 3, keep=1, **live)
    assert checkpoint.steps(tmp_path) == [3]


def test_pruning_a_linked_step_removes_the_link_and_not_its_target(tmp_path: Path) -> None:
    """A checkpoint that was moved to another disk; a file of one; a link to nothing."""
    root, other = tmp_path / "run", tmp_path / "other"
    live = trained()
    for step in (1, 2, 3, 4):
        checkpoint.save(root, step, **live)
    other.mkdir()
    shutil.move(root / "step-000000001", other / "moved")
    (root / "step-000000001").symlink_to(other / "moved")
    shutil.move(root / "step-000000002" / SHARD_OF_ONE, other / "shard")
    (root / "step-000000002" / SHARD_OF_ONE).symlink_to(other / "shard")
    (root / "step-000000000").symlink_to("nothing")
    assert checkpoint.verify(root, 1) == 1
    assert checkpoint.verify(root, 2) == 2
    assert checkpoint.prune(root, 2) == [0, 1, 2]
    assert sorted(path.name for path in root.iterdir()) == ["step-000000003", "step-000000004"]
    assert {path.name for path in (other / "moved").iterdir()} == {SHARD_OF_ONE, "manifest.json", "COMMITTED"}
    assert (other / "shard").stat().st_size


def test_an_interrupted_removal_does_not_block_others(tmp_path: Path) -> None:
    """In a container every run may have the same process id."""
    live = trained()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, **live)
    shutil.copytree(tmp_path / "step-000000001", tmp_path / f".step-000000001.removed-{os.getpid()}")
    assert checkpoint.prune(tmp_path, 1) == [1]
    assert checkpoint.steps(tmp_path) == [2]


def test_a_relative_root_does_not_follow_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the current folder changes while a save is in the background."""
    live = trained()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    go = threading.Event()
    create = LocalStore.create

    def late(*arguments: Any) -> Any:
        assert go.wait(10)
        return create(*arguments)

    monkeypatch.setattr(LocalStore, "create", late)
    handle = checkpoint.async_save("run", 1, **live)
    monkeypatch.chdir("other")
    go.set()
    handle.wait()
    assert checkpoint.verify(tmp_path / "run") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where it may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("no file system can be mounted")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    root = small_disk / "run"
    live = trained()
    checkpoint.save(root, 1, **live)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(filler, filler.stat().st_size - 4096)
    for save in (checkpoint.save, lambda *arguments, **options: checkpoint.async_save(*arguments, **options).wait()):
        with pytest.raises(checkpoint.CheckpointError, match=r"writing .*step-000000002 failed: .*No space left on device"):
            save(root, 2, **live)
        assert not drafts(root)
    filler.unlink()
    checkpoint.save(root, 2, **live)
    assert checkpoint.verify(root) == 2
    checkpoint.verify(root, 1)


def test_a_folder_that_is_really_read_only(small_disk: Path) -> None:
    live = trained()
    root = small_disk / "run"
    checkpoint.save(root, 1, **live)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(checkpoint.CheckpointError, match=r"step-000000002 failed: .*Read-only file system"):
        checkpoint.save(root, 2, **live)
    assert checkpoint.load(root, **live) is None
    assert checkpoint.latest(root) == 1


# ---------------------------------------------------------------------------------------------------------------------- on two ranks


def assert_all_raise(
    act: Callable[[], object], *words: str, kind: type[Exception] = checkpoint.CheckpointError, same_root: bool = True
) -> None:
    """The same error on both ranks, with these words."""
    error: Exception | None = None
    try:
        act()
    except checkpoint.CheckpointError as caught:
        error = caught
    told: list[Any] = [None, None]
    dist.all_gather_object(told, None if error is None else (type(error), str(error)))
    assert None not in told, told
    assert told[0] == told[1] or not same_root, told
    for type_, message in told:
        assert issubclass(type_, kind), told
        assert all(word in message for word in words), f"{words} not in {message}"


def assert_saved(root: Path, *steps: int) -> None:
    dist.barrier()
    assert checkpoint.steps(root) == list(steps)
    assert not drafts(root)
    assert checkpoint.verify(root) == steps[-1]
    dist.barrier()


SHARD_OF_1 = "shard-00001-of-00002.safetensors"


def check_saving(folder: str) -> None:
    root = Path(folder) / "saving"
    live = trained()
    checkpoint.save(root, 1, **live)
    ways = (
        (1, "open", SHARD_OF_1),
        (1, "write", SHARD_OF_1),
        (1, "fsync", SHARD_OF_1),
        (0, "write", "shard-00000-of-00002.safetensors"),
        (0, "mkdir", ""),
        (0, "write", "manifest.json"),
        (0, "fsync", "COMMITTED"),
        (0, "rename", ""),
        (0, "fsync", "/saving"),
    )
    for step, (rank, call, path) in enumerate(ways, 2):
        with failing(call, path, on=[rank]):
            words = (f"{root}/step-{step:09d} failed: rank {rank}: ", "No space left on device")
            assert_all_raise(partial(checkpoint.save, root, step, **live), *words)
        assert_saved(root, *range(1, step))
        checkpoint.save(root, step, **live)
        assert_saved(root, *range(1, step + 1))
    for number in (1, 4):
        with failing_hash(number, on=1):
            assert_all_raise(partial(checkpoint.save, root, len(ways) + 2, **live), "rank 1: MemoryError('to hash')")
        with failing_hash(number, on=1):
            assert_all_raise(checkpoint.async_save(root, len(ways) + 2, **live).wait, "rank 1: MemoryError('to hash')")
        assert_saved(root, *range(1, len(ways) + 2))
    check_limited_files(root, live, len(ways) + 2)
    check_refusals(root, live)


def check_limited_files(root: Path, live: Any, step: int) -> None:
    """An error of the operating system's own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert_all_raise(lambda: checkpoint.save(root, step, **live), "rank 1: ", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert_saved(root, *range(1, step))


def check_refusals(root: Path, live: Any) -> None:
    rank = dist.get_rank()
    saved = checkpoint.steps(root)
    marker = root / f"step-{saved[-1]:09d}" / "COMMITTED"
    written = marker.stat().st_mtime_ns
    assert_all_raise(lambda: checkpoint.save(root, saved[-1], **live), f"step {saved[-1]} is committed already", "never overwritten")
    assert_all_raise(lambda: checkpoint.save(root, 99, extra={"a": object()} if rank else None, **live), "rank 1: ", "extra['a'] is a ")
    assert_all_raise(lambda: checkpoint.save(root, 99, extra={"a": rank}, **live), "extra is not the same on ranks 0 and 1")
    assert_all_raise(lambda: checkpoint.save(root, -rank, **live), "rank 1: step must be a whole number >= 0, got -1")
    assert_all_raise(lambda: checkpoint.save(root, 99, **(live if rank else {})), "rank 0: there is nothing to save")
    assert_all_raise(
        lambda: checkpoint.save(root, 99, model=live["model"], optimizer=None if rank else live["optimizer"]), "some ranks only"
    )
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:  # which reads what all ranks have written, when memory is short
            patch.setattr(sys.modules["sharded_optim.checkpoint.commit"], "Segment", mock.Mock(side_effect=MemoryError))
        assert_all_raise(lambda: checkpoint.save(root, 99, **live), "committing", "rank 0: MemoryError")
    assert_saved(root, *saved)
    assert marker.stat().st_mtime_ns == written


def check_replacing(folder: str) -> None:
    """A damaged checkpoint, when training has come to its step again."""
    root = Path(folder) / "replacing"
    live = trained()
    checkpoint.save(root, 1, **live)
    checkpoint.save(root, 2, **live)
    dist.barrier()
    if dist.get_rank() == 0:
        with (root / "step-000000002" / SHARD_OF_1).open("ab") as file:
            file.write(b"x")
    dist.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint.save(root, 2, **live)
    told = [str(each.message) for each in caught if "replacing a checkpoint that is damaged" in str(each.message)]
    assert len(told) == 1, "on each rank"
    assert all(SHARD_OF_1 in message for message in told)
    assert_saved(root, 1, 2)


def check_async_saving(folder: str) -> None:
    root = Path(folder) / "async"
    live = trained()
    checkpoint.save(root, 1, **live)
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("sharded_optim").addHandler(handler)

    def fail() -> checkpoint.Saving:
        with failing("write", SHARD_OF_1, on=[1]):
            handle = checkpoint.async_save(root, 2, **live)
            while not handle.done():
                time.sleep(0.01)
        return handle

    words = ("step-000000002 failed: rank 1: ", "No space left on device")
    handle = fail()
    assert_all_raise(handle.wait, *words)
    handle.wait()  # once
    assert_saved(root, 1)
    for act in (
        lambda: checkpoint.save(root, 3, **live),
        lambda: checkpoint.async_save(root, 3, **live),
        lambda: checkpoint.load(root, **live),
    ):
        heard.clear()
        fail()
        assert any("in the background failed" in message and words[1] in message for message in heard), heard
        assert_all_raise(act, *words)
        assert_saved(root, 1)
    with patched_on(1, background, "_stage", MemoryError("no memory to copy to")):
        assert_all_raise(lambda: checkpoint.async_save(root, 2, **live).wait(), "rank 1: MemoryError('no memory to copy to')")
    assert_saved(root, 1)
    handle = checkpoint.async_save(root, 2, **live)
    checkpoint.save(root, 3, **live)  # waits for it
    assert handle.done()
    handle.wait()
    assert_saved(root, 1, 2, 3)
    logging.getLogger("sharded_optim").removeHandler(handler)


def check_loading(folder: str) -> None:
    root = Path(folder) / "loading"
    checkpoint.save(root, 1, **trained(1))
    checkpoint.save(root, 2, **trained(2))
    live = trained(3, seed=1)
    before = [param.clone() for param in live["model"].parameters()]

    def load(**options: Any) -> Any:
        return checkpoint.load(root, **live, **options)

    rank = dist.get_rank()
    with patched_on(1, LocalStore, "read", OSError(errno.EIO, "Input/output error")):
        assert_all_raise(lambda: load(step=2), "rank 1: ", "Input/output error", "step-000000002", kind=checkpoint.DamagedError)
    with patched_on(1, LocalStore, "files", PermissionError(errno.EACCES, "Permission denied")):
        assert_all_raise(lambda: load(step=2), "loading step 2 from", "rank 1: ", "Permission denied")
    with patched_on(0, LocalStore, "folders", PermissionError(errno.EACCES, "Permission denied")):
        assert_all_raise(load, "listing", "rank 0: ", "Permission denied")
    with patched_on(1, LocalStore, "read", ArithmeticError("in a thread")):
        assert_all_raise(lambda: load(step=2), "rank 1: ArithmeticError('in a thread')")
    other = Path(folder) / "elsewhere"
    assert_all_raise(
        lambda: checkpoint.load(other if rank else root, **live), "rank 1: ", f"{other}/step-000000002 is no committed", same_root=False
    )
    assert_all_raise(lambda: checkpoint.load(other, **live), f"there is no checkpoint in {other}")
    assert_all_raise(lambda: load(step=7), "step-000000007 is no committed checkpoint")
    if rank == 0:
        shutil.copytree(root / "step-000000001", other / "step-000000001")
        with (other / "step-000000001" / "manifest.json").open("ab") as file:
            file.write(b"\n")
        marker = local_digest(other / "step-000000001" / "manifest.json")
        (other / "step-000000001" / "COMMITTED").write_text(marker)
    dist.barrier()
    assert_all_raise(
        lambda: checkpoint.load(other if rank else root, step=1, **live), "ranks see different checkpoints", "share", same_root=False
    )
    assert all(torch.equal(param, was) for param, was in zip(live["model"].parameters(), before, strict=True))
    with patched_on(1, CheckpointReader, "load", OSError(errno.EIO, "Input/output error")):
        assert_all_raise(lambda: load(step=2), "after which model and optimizer are unusable", "rank 1: ")
    load()
    assert all(torch.equal(param, was) for param, was in zip(live["model"].parameters(), trained(2)["model"].parameters(), strict=True))


def check_saving_to_different_roots(folder: str) -> None:
    roots = [Path(folder) / "one", Path(folder) / "other"]
    root = roots[dist.get_rank()]
    live = trained()
    assert_all_raise(
        lambda: checkpoint.save(root, 1, **live), "rank 1: ", "No such file or directory", "other/.step-000000001.", same_root=False
    )
    assert not any(path.exists() and list(path.iterdir()) for path in roots)


@contextmanager
def patched_on(rank: int, owner: Any, name: str, error: Exception) -> Iterator[None]:
    if dist.get_rank() != rank:
        yield
        return
    with mock.patch.object(owner, name, side_effect=error):
        yield


def local_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() + "\n"


def check_two_ranks(folder: str) -> None:
    warnings.simplefilter("ignore")
    for check in (check_saving, check_replacing, check_async_saving, check_loading, check_saving_to_different_roots):
        check(folder)
        dist.barrier()


def test_a_failure_on_one_rank_is_the_same_error_on_all(tmp_path: Path) -> None:
    ranks.run(check_two_ranks, 2, str(tmp_path))


# ------------------------------------------------------------------------------------------------------------------------ known bugs


def test_a_folder_without_its_marker_is_replaced_by_a_save(tmp_path: Path) -> None:
    live = trained()
    checkpoint.save(tmp_path, 1, **live)
    (tmp_path / "step-000000001" / "COMMITTED").unlink()
    checkpoint.save(tmp_path, 1, **live)
    assert checkpoint.verify(tmp_path) == 1


def test_an_object_store_keeps_what_is_committed_when_a_rank_is_lost_after_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vote after the commit fails here; on another rank it may have gone well, and `save` has returned."""
    all_or_nothing = saving.all_or_nothing

    def lost(what: str, *arguments: Any, **options: Any) -> Any:
        result = all_or_nothing(what, *arguments, **options)
        if what.startswith("committing"):
            raise RuntimeError("connection closed by peer")
        return result

    root = f"memory://{time.monotonic_ns()}"
    live = trained()
    monkeypatch.setattr(saving, "all_or_nothing", lost)
    with pytest.raises(RuntimeError, match="connection closed"):
        checkpoint.save(root, 1, **live)
    assert checkpoint.steps(root) == [1]


def test_bytes_that_change_between_two_reads_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A disk, cable or network that flips bits now and then."""
    checkpoint.save(tmp_path, 1, **trained())
    read = LocalStore.read
    times: dict[tuple[str, int, int], int] = {}

    def flipping(store: LocalStore, folder: str, file: str, offset: int, into: memoryview) -> int:
        count = read(store, folder, file, offset, into)
        times[file, offset, len(into)] = times.get((file, offset, len(into)), 0) + 1
        if file.endswith(".safetensors") and times[file, offset, len(into)] == 2:
            into[0] ^= 1
        return count

    monkeypatch.setattr(LocalStore, "read", flipping)
    with pytest.raises(checkpoint.DamagedError, match=SHARD_OF_ONE):
        checkpoint.load(tmp_path, **trained(1))


def check_different_steps(folder: str) -> None:
    assert_all_raise(lambda: checkpoint.save(folder, 1 + dist.get_rank(), **trained()), "step", "rank 1")


def test_ranks_that_save_different_steps_are_refused(tmp_path: Path) -> None:
    ranks.run(check_different_steps, 2, str(tmp_path))
