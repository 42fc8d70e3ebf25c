"""A checkpoint that cannot be looked at is passed over like one that is damaged, with a warning, and takes no memory and no time."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from typer.testing import CliRunner

import sharded_optim as so
from sharded_optim import checkpoint
from sharded_optim.checkpoint.local_store import LocalStore
from sharded_optim.checkpoint.url_store import UrlStore
from sharded_optim.commands import app

OLDER, STEP = 2, 4
NAME = f"step-{STEP:09d}"
SHARD = "shard-00000-of-00001.safetensors"


def save(root: Any, *steps: int) -> None:
    model = nn.Linear(3, 5)
    for step in steps:
        nn.init.constant_(model.weight, step)
        checkpoint.save(root, step, model=model, extra={"step": step})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save(tmp_path / "run", OLDER, STEP)
    return tmp_path / "run"


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def grown(name: str, size: int) -> Callable[[Path], None]:
    """A file with a hole that is larger than memory."""
    return lambda folder: os.truncate(folder / name, size)


def replaced(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    """A file of the folder, or with "" the folder, by something else."""

    def act(folder: Path) -> None:
        if not name:
            remove(folder)
        else:
            (folder / name).unlink()
        make(folder / name if name else folder)

    return act


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


WAYS: dict[str, Callable[[Path], None]] = {
    "a marker of 64 GiB": grown("COMMITTED", 2**36),
    "a marker with one more byte": grown("COMMITTED", 66),
    "a manifest of 1 TiB": grown("manifest.json", 2**40),
    "a shard of 1 TiB": grown(SHARD, 2**40),
    "a folder that is a link to itself": replaced("", link_to_itself),
    "a folder that is a link to nothing": replaced("", link_to_nothing),
    "a folder that is a file": replaced("", Path.touch),
    "a folder that is a pipe": replaced("", os.mkfifo),
    **{
        f"{name} that is {what}": replaced(name, make)
        for name in ("COMMITTED", "manifest.json", SHARD)
        for what, make in {
            "a pipe": os.mkfifo,
            "a folder": Path.mkdir,
            "a link to itself": link_to_itself,
            "endless zeros": link_to_zeros,
        }.items()
    },
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_a_checkpoint_is_passed_over(way: str, root: Path) -> None:
    WAYS[way](root / NAME)
    assert_passed_over(root)
    assert checkpoint.prune(root, 1) == []
    save(root, STEP)  # as training comes to the step again
    assert checkpoint.verify(root) == STEP


def assert_passed_over(root: Any, *words: str) -> None:
    model = nn.Linear(3, 5)
    with pytest.warns(UserWarning, match=rf"{NAME}(.|\n)*Falling back") as caught:
        assert checkpoint.load(root, model=model) == {"step": OLDER}
    assert all(word in str(caught[0].message) for word in words)
    assert torch.equal(model.weight, torch.full_like(model.weight, OLDER))
    with pytest.warns(UserWarning, match=NAME):
        assert checkpoint.latest(root) == OLDER
    with pytest.raises(checkpoint.DamagedError, match=NAME):
        checkpoint.verify(root, STEP)
    assert OLDER in checkpoint.steps(root)
    with pytest.warns(UserWarning, match=NAME):
        assert checkpoint.prune(root, 1) == []
    result = CliRunner().invoke(app, ["checkpoint", "verify", "--all", str(root)])
    assert (result.exit_code, f"step {OLDER}: verified" in result.stdout, f"step {STEP}: DAMAGED" in result.stdout) == (1, True, True)
    result = CliRunner().invoke(app, ["checkpoint", "ls", str(root)])
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines() if line.strip()][-2:] == [str(OLDER), str(STEP)]


@pytest.fixture(params=[errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOTCONN, errno.EMFILE])
def unlistable(request: pytest.FixtureRequest) -> Iterator[str]:
    """The newest checkpoint's folder cannot be listed: a disk or a server that fails, a folder of somebody else's."""
    scandir, error = os.scandir, OSError(request.param, os.strerror(request.param))

    def failing(path: Any) -> Any:
        if str(path).endswith(NAME):
            raise error
        return scandir(path)

    with mock.patch.object(os, "scandir", failing):
        yield os.strerror(request.param)


def test_a_folder_that_cannot_be_listed_is_passed_over(unlistable: str, root: Path) -> None:
    assert_passed_over(root, unlistable)
    with pytest.raises(checkpoint.CheckpointError, match=rf"step {STEP} is there already, and cannot be read to see(.|\n)*{unlistable}"):
        save(root, STEP)  # it may be whole


@pytest.mark.parametrize("name", [f"step-{99:014d}", "step-٠٠٠٠٠٠٠٩٩", "step-000000099 (copy)", "step-99", "step-+00000099", "step-"])
def test_a_folder_of_almost_the_name_of_a_step_is_none(name: str, root: Path) -> None:
    (root / name).mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.steps(root) == [OLDER, STEP]
        assert checkpoint.latest(root) == STEP
        assert checkpoint.load(root, model=nn.Linear(3, 5)) == {"step": STEP}
        assert checkpoint.prune(root, 1) == [OLDER]
    assert (root / name).is_dir()


# ---------------------------------------------------------------------------------------------------------------- behind a URL


class ClientError(Exception):
    """As the client of a cloud has them: no OSError."""


@pytest.mark.parametrize("call", ["ls", "cat_file"])
@pytest.mark.parametrize("error", [ClientError("503 Slow Down"), PermissionError(errno.EACCES, "Forbidden"), TimeoutError("no answer")])
def test_what_a_server_does_not_give_is_passed_over(call: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    root = f"memory://{time.monotonic_ns()}"
    save(root, OLDER, STEP)
    original = getattr(MemoryFileSystem, call)

    def failing(files: Any, path: str, *arguments: Any, **options: Any) -> Any:
        if NAME in path:
            raise error
        return original(files, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, call, failing)
    assert_passed_over(root, str(error.args[-1]))


def test_a_server_that_ignores_which_bytes_were_asked_for_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    root = f"memory://{time.monotonic_ns()}"
    save(root, OLDER, STEP)
    original = MemoryFileSystem.cat_file

    def everything(files: Any, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        return original(files, path, **options) if NAME in path else original(files, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", everything)
    assert_passed_over(root, "asked for")
    assert UrlStore(root).files(NAME)


# ---------------------------------------------------------------------------------------------------------------- on two ranks


def check_ranks_fall_back_together(folder: str) -> None:
    """One of them has lost its mount."""
    model = nn.Linear(3, 5)
    optimizer = so.AdamW(model.parameters(), lr=1e-2, backend="eager")
    for step in (OLDER, STEP):
        checkpoint.save(folder, step, model=model, optimizer=optimizer, extra={"step": step})
    files = LocalStore.files

    def failing(store: LocalStore, name: str) -> dict[str, int]:
        if dist.get_rank() == 1 and name == NAME:
            raise OSError(errno.ESTALE, "Stale file handle")
        return files(store, name)

    with mock.patch.object(LocalStore, "files", failing), pytest.warns(UserWarning, match=r"rank 1: (.|\n)*Stale file handle"):
        assert checkpoint.load(folder, model=model, optimizer=optimizer) == {"step": OLDER}


def test_ranks_fall_back_together_where_one_cannot_look(tmp_path: Path) -> None:
    ranks.run(check_ranks_fall_back_together, 2, str(tmp_path))
