"""A checkpoint that cannot be read is skipped like a damaged one, with a warning, without using memory or time."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
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
from sharded_optim.cli.commands import app

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
def test_a_path_that_is_not_a_checkpoint_is_skipped(way: str, root: Path) -> None:
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

    patch = mock.patch.object(os, "scandir", failing)
    patch.start()
    yield os.strerror(request.param)
    mock.patch.stopall()


def test_a_folder_that_cannot_be_listed_is_skipped(unlistable: str, root: Path) -> None:
    assert_passed_over(root, unlistable)


def test_training_continues_past_a_step_that_cannot_be_read(unlistable: str, root: Path) -> None:
    """Each restart comes to it again. It may be whole, so it is renamed, and none of its bytes is lost."""
    before = {path.name: path.read_bytes() for path in root.joinpath(NAME).iterdir()}
    with pytest.warns(UserWarning, match=rf"step {STEP} exists already, and cannot be read to see(.|\n)*{unlistable}"):
        save(root, STEP)
    (aside,) = root.glob(f"{NAME}.unreadable-*")
    mock.patch.stopall()
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    assert checkpoint.steps(root) == [OLDER, STEP]


def test_a_shard_that_cannot_be_read_is_not_reported_as_damaged(root: Path) -> None:
    """One error of a disk says nothing of the bytes, and is over with the next reading."""
    read = LocalStore.read

    def failing(store: LocalStore, folder: str, file: str, *arguments: Any) -> int:
        if folder == NAME and file == SHARD:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(store, folder, file, *arguments)

    with mock.patch.object(LocalStore, "read", failing):
        with pytest.raises(checkpoint.DamagedError, match="cannot be read, and may be whole") as caught:
            checkpoint.verify(root, STEP)
        assert "is damaged" not in str(caught.value)
        with pytest.warns(UserWarning, match="cannot be read to see"):
            save(root, STEP)
    assert len(list(root.glob(f"{NAME}.unreadable-*"))) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.prune(root, 1) == [OLDER]


def test_a_step_that_can_be_neither_read_nor_renamed_is_an_error(unlistable: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "rename", mock.Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(checkpoint.CheckpointError, match=r"nor can it be renamed \(.*Read-only(.|\n)*save to another root"):
        save(root, STEP)


@pytest.mark.parametrize("target", ["loop", "COMMITTED/nothing", "x" * 300])
def test_a_stray_link_in_a_folder_does_not_make_its_checkpoint_damaged(target: str, root: Path) -> None:
    (root / NAME / "loop").symlink_to(target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.latest(root) == STEP
        assert checkpoint.load(root, model=nn.Linear(3, 5)) == {"step": STEP}
        with pytest.raises(checkpoint.CheckpointError, match="is committed already"):
            save(root, STEP)


# ---------------------------------------------------------------------------------------------------- what this reader cannot read


UNKNOWN: dict[str, tuple[Any, Callable[[str], str], str]] = {
    "a mark": ((1,), lambda content: content.replace("$tuple", "$deque"), r"marked '\$deque', .*upgrade sharded-optim"),
    "a factory": (defaultdict(list), lambda content: content.replace('["list",', '["set",'), "a defaultdict of 'set', .*upgrade"),
    "a dtype of an array": (np.uint32(3), lambda content: content.replace('"<u4"', '"<c8"'), "an array of '<c8', .*upgrade"),
    "a dtype of a tensor": (None, lambda content: content.replace('"F32"', '"F4"'), "has no dtype 'F4'.*upgrade"),
    "a feature": (None, lambda content: content.replace('"requires": []', '"requires": ["$new"]'), r"requires \$new.*upgrade"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_a_checkpoint_that_this_version_cannot_read_is_kept(what: str, tmp_path: Path) -> None:
    """A later version of the library reads it: a load does not fall back, and a save does not replace it."""
    extra, edit, words = UNKNOWN[what]
    model = nn.Linear(3, 5)
    checkpoint.save(tmp_path, OLDER, model=model)
    checkpoint.save(tmp_path, STEP, model=model, extra={"value": extra})
    folder = tmp_path / NAME
    content = edit((folder / "manifest.json").read_text()).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "COMMITTED").write_text(hashlib.sha256(content).hexdigest() + "\n")
    acts = (
        lambda: checkpoint.load(tmp_path, model=model),
        lambda: checkpoint.verify(tmp_path),
        lambda: checkpoint.save(tmp_path, STEP, model=model),
    )
    for act in acts:
        with pytest.raises(checkpoint.MismatchError, match=rf"{NAME}/manifest.json: .*{words}"):
            act()
    with pytest.warns(UserWarning, match=words):
        assert checkpoint.latest(tmp_path) == OLDER
    with pytest.warns(UserWarning, match=words):
        assert checkpoint.prune(tmp_path, 1) == []
    assert (folder / "manifest.json").read_bytes() == content


def test_manifests_list_the_features_that_older_versions_lack(tmp_path: Path) -> None:
    """They name what they refuse, and do not take the checkpoint for damaged."""
    model = nn.Linear(3, 5)
    for step, extra in enumerate(((1, b"a", {2: torch.ones(1)}), {"a": [Counter("a"), np.float32(1)]}, {"$Counter": "$array"})):
        checkpoint.save(tmp_path, step, model=model, extra=extra)
    required = [json.loads(path.read_text())["requires"] for path in sorted(tmp_path.glob("*/manifest.json"))]
    assert required == [[], ["$Counter", "$scalar"], []]
    assert checkpoint.verify(tmp_path, 1) == 1


def test_a_checkpoint_is_read_from_deep_inside_a_program(tmp_path: Path) -> None:
    """How deep the caller is says nothing of the checkpoint."""
    value: Any = 1
    for _ in range(100):
        value = {1: value}
    checkpoint.save(tmp_path, 1, model=nn.Linear(1, 1), extra=value)

    def at(depth: int) -> Any:
        return at(depth - 1) if depth else checkpoint.latest(tmp_path)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert at(800 - len(inspect.stack(0))) == 1


@pytest.mark.parametrize("name", [f"step-{99:014d}", "step-٠٠٠٠٠٠٠٩٩", "step-000000099 (copy)", "step-99", "step-+00000099", "step-"])
def test_a_folder_with_almost_the_name_of_a_step_is_ignored(name: str, root: Path) -> None:
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
def test_a_checkpoint_that_a_server_does_not_return_is_skipped(call: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_server_that_ignores_the_requested_range_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    root = f"memory://{time.monotonic_ns()}"
    save(root, OLDER, STEP)
    original = MemoryFileSystem.cat_file

    def everything(files: Any, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        return original(files, path, **options) if NAME in path else original(files, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", everything)
    assert_passed_over(root, "for a request of")
    assert UrlStore(root).files(NAME)


# ---------------------------------------------------------------------------------------------------------------- on two ranks


def check_ranks_fall_back_together(folder: str) -> None:
    """One of them has lost its mount."""
    model = nn.Linear(3, 5)
    optimizer = so.AdamW(model.parameters(), lr=1e-2, backend="eager")
    for step in (OLDER, STEP):
        checkpoint.save(folder, step, model=model, optimizer=optimizer, extra={"step": step})
    files = LocalStore.files

    def failing(store: LocalStore, name: str) -> dict[str, tuple[int, Hashable]]:
        if dist.get_rank() == 1 and name == NAME:
            raise OSError(errno.ESTALE, "Stale file handle")
        return files(store, name)

    with mock.patch.object(LocalStore, "files", failing), pytest.warns(UserWarning, match=r"rank 1: (.|\n)*Stale file handle"):
        assert checkpoint.load(folder, model=model, optimizer=optimizer) == {"step": OLDER}


def test_ranks_fall_back_together_if_one_cannot_read(tmp_path: Path) -> None:
    ranks.run(check_ranks_fall_back_together, 2, str(tmp_path))
