"""Pruning reads no shard, and never removes the last checkpoint that verifies."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn

import sharded_optim as so
from sharded_optim import checkpoint
from sharded_optim.checkpoint import manifest_json
from sharded_optim.checkpoint.local_store import LocalFile, LocalStore
from sharded_optim.checkpoint.manifest import Manifest

WIDTH = 80  # of layers, which are large beside manifests


def trained() -> dict[str, Any]:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    return {"model": model, "optimizer": so.AdamW(model.parameters(), lr=1e-2, backend="eager")}


def save(root: Any, *steps: int, **options: Any) -> None:
    live = trained()
    for step in steps:
        checkpoint.save(root, step, **live, **options)


def rot(root: Path, *steps: int) -> None:
    """Flip a bit in a shard; its size, and the time of its modification, are as before."""
    for step in steps:
        (path,) = (root / f"step-{step:09d}").glob("*.safetensors")
        before = path.stat()
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rot_unnoticed(root: Path, *steps: int) -> None:
    """As a disk rots: also the file system knows nothing of it."""
    files = LocalStore.files
    before = {f"step-{step:09d}": LocalStore(str(root)).files(f"step-{step:09d}") for step in steps}
    rot(root, *steps)
    mock.patch.object(LocalStore, "files", lambda store, folder: before.get(folder) or files(store, folder)).start()


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    mock.patch.stopall()


def a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("sharded_optim.checkpoint.integrity"), "_known", {})


@contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """Bytes that are read of shards, by step."""
    counts: Counter[str] = Counter()
    read = LocalStore.read

    def counting(store: LocalStore, folder: str, file: str, offset: int, into: memoryview) -> int:
        count = read(store, folder, file, offset, into)
        if file.endswith(".safetensors"):
            counts[folder] += count
        return count

    with mock.patch.object(LocalStore, "read", counting):
        yield counts


# ------------------------------------------------------------------------------------------------------------ the last one stays

READ: dict[str, Callable[[Path], object]] = {
    "written": lambda root: None,
    "loaded": lambda root: checkpoint.load(root, **trained()),
    "loaded one by one": lambda root: [checkpoint.load(root, step=step, **trained()) for step in checkpoint.steps(root)],
    "verified": lambda root: [checkpoint.verify(root, step) for step in checkpoint.steps(root)],
    "exported": lambda root: checkpoint.export_torch(root, root / "export.pt"),
}


@pytest.mark.parametrize("known", READ)
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.filterwarnings("ignore:.*It is skipped")
def test_the_last_that_verifies_is_not_pruned_whatever_was_read_before_it_rotted(known: str, keep: int, tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    READ[known](tmp_path)
    rot(tmp_path, 2, 3)
    checkpoint.prune(tmp_path, keep)
    assert checkpoint.latest(tmp_path) == 1


@pytest.mark.parametrize("find", ["latest", "verify", "load", "load one", "export"])
@pytest.mark.filterwarnings("ignore:.*(It is skipped|Falling back)")
def test_a_failed_verification_ends_the_trust_in_a_step(find: str, tmp_path: Path) -> None:
    """Also where the file system has noticed no change."""
    save(tmp_path, 1, 2, 3)
    for step in (2, 3):
        checkpoint.verify(tmp_path, step)
    rot_unnoticed(tmp_path, 2, 3)
    if find == "latest":
        assert checkpoint.latest(tmp_path) == 1
    elif find == "load":
        checkpoint.load(tmp_path, **trained())
    else:
        for step in (2, 3):
            act = {
                "verify": lambda step=step: checkpoint.verify(tmp_path, step),
                "load one": lambda step=step: checkpoint.load(tmp_path, step=step, **trained()),
                "export": lambda step=step: checkpoint.export_torch(tmp_path, tmp_path / "out.pt", step=step),
            }[find]
            with pytest.raises(checkpoint.DamagedError):
                act()
    assert checkpoint.prune(tmp_path, 1) == []
    save(tmp_path, 4, keep=2)  # neither of the two counts
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 4]
    save(tmp_path, 5, keep=2)
    assert checkpoint.steps(tmp_path) == [4, 5]


def test_damaged_checkpoints_are_not_counted(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4)
    rot(tmp_path, 3)
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.verify(tmp_path, 3)
    with pytest.warns(UserWarning, match=r"step-000000003 was damaged when this process read it"):
        assert checkpoint.prune(tmp_path, 2) == [1]
    assert checkpoint.steps(tmp_path) == [2, 3, 4]


# ------------------------------------------------------------------------------------------------------------ nothing is read


@pytest.mark.parametrize("keep", [2, 5])
def test_a_restarted_job_reads_no_shard_to_prune(keep: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It has loaded one, and until that is to be removed nothing need be read back."""
    save(tmp_path, *range(1, 7))
    a_new_process(monkeypatch)
    live = trained()
    checkpoint.load(tmp_path, **live)
    with counted_reads() as counts:
        for step in range(7, 6 + keep):
            checkpoint.save(tmp_path, step, **live, keep=keep)
            assert checkpoint.steps(tmp_path) == list(range(step - keep + 1, step + 1))
        assert checkpoint.prune(tmp_path, keep) == []
    assert not counts
    with counted_reads() as counts:  # and then one, the newest
        checkpoint.save(tmp_path, 6 + keep, **live, keep=keep)
        assert checkpoint.steps(tmp_path) == list(range(7, 7 + keep))
    assert list(counts) == [f"step-{6 + keep:09d}"]
    with counted_reads() as counts:
        checkpoint.save(tmp_path, 7 + keep, **live, keep=keep)
    assert not counts


def test_nothing_is_read_if_nothing_is_to_be_removed(tmp_path: Path) -> None:
    with counted_reads() as counts:
        save(tmp_path, 1, 2, 3, keep=3)
        assert checkpoint.prune(tmp_path, 3) == []
        assert checkpoint.prune(tmp_path, 7) == []
    assert not counts


def test_pruning_looks_at_each_manifest_once(tmp_path: Path) -> None:
    """They are large where a checkpoint has many chunks, and the other ranks wait."""
    with counted_manifests() as counts:
        save(tmp_path, *range(1, 9), keep=3)
        checkpoint.prune(tmp_path, 3)
    assert counts == {f"step-{step:09d}": 2 if step in (4, 7) else 1 for step in range(1, 9)}, "and once more to be read back"
    rot(tmp_path, 7)
    with counted_manifests() as counts:  # a checkpoint whose files were written to is looked at again
        assert checkpoint.prune(tmp_path, 3) == []
    assert counts == {"step-000000007": 1}


@contextmanager
def counted_manifests() -> Iterator[Counter[str]]:
    """How often manifests are parsed, by step."""
    counts: Counter[str] = Counter()
    parse = manifest_json._parse

    def counting(text: bytes) -> Manifest:
        found = parse(text)
        counts[f"step-{found.step:09d}"] += 1
        return found

    with mock.patch.object(manifest_json, "_parse", counting):
        yield counts


def test_the_record_of_integrity_is_bounded(tmp_path: Path) -> None:
    """By the number of those that there are, whatever they consist of."""
    findings = import_module("sharded_optim.checkpoint.integrity")._known
    before = len(findings)
    for steps in (range(1, 20), range(20, 40)):
        save(tmp_path, *steps, keep=2)
        for step in checkpoint.steps(tmp_path):
            checkpoint.verify(tmp_path, step)
        assert len(findings) - before <= 3
    assert {len(version) for version, _ in findings.values()} == {32}


def test_a_step_that_was_read_back_is_not_read_again_by_a_save_of_it(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    checkpoint.verify(tmp_path, 1)
    rot(tmp_path, 2)
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.verify(tmp_path, 2)
    with counted_reads() as counts:
        with pytest.raises(checkpoint.CheckpointError, match="step 1 is committed already"):
            save(tmp_path, 1)
        with pytest.warns(UserWarning, match="replacing a checkpoint that is damaged: (.|\n)*step-000000002"):
            save(tmp_path, 2)
    assert not counts


# ------------------------------------------------------------------------------------------------------------ what cannot be told


@contextmanager
def a_store_that_lists_sizes_alone() -> Iterator[str]:
    from fsspec.implementations.memory import MemoryFileSystem

    listed = MemoryFileSystem.ls

    def sizes(files: Any, path: str, detail: bool = True, **options: Any) -> Any:
        return [{key: entry[key] for key in ("name", "size", "type")} for entry in listed(files, path, detail=True, **options)]

    with mock.patch.object(MemoryFileSystem, "ls", sizes):
        yield f"memory://{time.monotonic_ns()}"


@pytest.mark.filterwarnings("ignore:.*It is skipped")
def test_a_store_without_times_or_tags_is_read_back_each_time() -> None:
    """A file that was written to looks there as it did when it was read back."""
    from fsspec.implementations.memory import MemoryFileSystem

    with a_store_that_lists_sizes_alone() as root:
        save(root, 1, 2)
        checkpoint.verify(root, 2)
        path = f"/{root.rpartition('/')[2]}/step-000000002/shard-00000-of-00001.safetensors"
        content = MemoryFileSystem().cat_file(path)
        MemoryFileSystem().pipe_file(path, content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
        assert checkpoint.prune(root, 1) == []
        assert checkpoint.latest(root) == 1


def test_a_checkpoint_that_cannot_be_removed_does_not_stop_pruning(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    remove = LocalStore.remove

    def failing(store: LocalStore, folder: str) -> None:
        if folder == "step-000000001":
            raise PermissionError(13, "Permission denied", folder)
        remove(store, folder)

    told = "step-000000001 could not be removed: .*Permission denied"
    with mock.patch.object(LocalStore, "remove", failing):
        with pytest.raises(checkpoint.CheckpointError, match=told):
            checkpoint.prune(tmp_path, 1)
        assert checkpoint.steps(tmp_path) == [1, 3]
        with pytest.warns(UserWarning, match=f"could not be pruned: .*{told}"):
            save(tmp_path, 4, keep=1)
        assert checkpoint.steps(tmp_path) == [1, 4]
    assert checkpoint.prune(tmp_path, 1) == [1]


# ------------------------------------------------------------------------------------------------------------ written wrongly


@contextmanager
def a_disk_that_writes_other_bytes() -> Iterator[None]:
    """And says nothing."""
    write = LocalFile.write

    def wrong(file: LocalFile, content: memoryview) -> None:
        if len(content) > 10_000:  # of a shard
            content = memoryview(bytes(content[:-1]) + bytes([content[-1] ^ 1]))
        write(file, content)

    with mock.patch.object(LocalFile, "write", wrong):
        yield


@pytest.mark.parametrize("act", ["save", "async_save"])
def test_the_last_that_was_read_back_stays_until_the_one_that_replaces_it_was(act: str, tmp_path: Path) -> None:
    live = trained()

    def save_one(step: int) -> None:
        if act == "save":
            checkpoint.save(tmp_path, step, **live, keep=1)
        else:
            checkpoint.async_save(tmp_path, step, **live, keep=1).wait()

    save_one(1)
    checkpoint.load(tmp_path, **live)
    for step in (2, 3):
        with warnings.catch_warnings(record=True) as caught, a_disk_that_writes_other_bytes():
            warnings.simplefilter("always")
            save_one(step)
        told = [str(each.message) for each in caught if "could not be pruned" in str(each.message)]
        assert len(told) == 1
        assert all(word in told[0] for word in (f"step-{step:09d}", "weight", "not those that were saved"))
    assert checkpoint.steps(tmp_path) == [1, 2, 3]
    save_one(4)
    assert checkpoint.steps(tmp_path) == [4]


# ------------------------------------------------------------------------------------------------------------ on two ranks


def check_ranks_read_back_together(folder: str) -> None:
    root = Path(folder)
    torch.manual_seed(0)
    live = trained()
    for step in (1, 2):
        checkpoint.save(root, step, **live)
    with counted_reads() as counts:
        checkpoint.save(root, 3, **live, keep=1)
    size = sum(path.stat().st_size for path in (root / "step-000000003").glob("*.safetensors"))
    read: list[int] = [0, 0]
    dist.all_gather_object(read, counts["step-000000003"])
    assert list(counts) == ["step-000000003"], counts
    assert sum(read) == size, "each byte once"
    assert max(read) <= 0.7 * size, "each its share"
    assert checkpoint.steps(root) == [3]
    dist.barrier()
    with warnings.catch_warnings(), a_disk_that_writes_other_bytes():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="could not be pruned"):  # a rank that raises alone leaves the others waiting
            checkpoint.save(root, 4, **live, keep=1)
    assert checkpoint.steps(root) == [3, 4]
    dist.barrier()
    assert_all_go_on(root, live)
    assert_ranks_share_the_reading_of_what_is_in_the_way(root, live)


def assert_ranks_share_the_reading_of_what_is_in_the_way(root: Path, live: Any) -> None:
    known = {step for where, step in import_module("sharded_optim.checkpoint.integrity")._known if where == str(root)}
    assert known <= {6}, "no rank remembers what is gone"
    checkpoint.save(root, 8, **live)
    (shard, *_) = sorted((root / "step-000000008").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in (root / "step-000000008").glob("*.safetensors"))
    dist.barrier()
    if dist.get_rank() == 0:
        content = shard.read_bytes()
        shard.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    dist.barrier()
    with counted_reads() as counts, pytest.warns(UserWarning, match="replacing a checkpoint that is damaged"):
        checkpoint.save(root, 8, **live)
    read: list[int] = [0, 0]
    dist.all_gather_object(read, counts["step-000000008"])
    assert sum(read) == size, "each byte once"
    assert max(read) <= 0.7 * size, "each its share"
    with pytest.raises(checkpoint.CheckpointError, match="step 8 is committed already"):
        checkpoint.save(root, 8, **live)


def assert_all_go_on(root: Path, live: Any) -> None:
    """Where rank 1 alone cannot read, nothing is removed, and no rank waits for another."""
    read = LocalStore.read

    def failing(store: LocalStore, folder: str, *arguments: Any) -> int:
        if dist.get_rank() == 1 and folder.endswith("5"):
            raise OSError(5, "Input/output error")
        return read(store, folder, *arguments)

    with mock.patch.object(LocalStore, "read", failing), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(root, 5, **live, keep=1)
    dist.barrier()
    assert checkpoint.steps(root) == [3, 4, 5]
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(root, 6, **live, keep=1)
    dist.barrier()
    assert checkpoint.steps(root) == [6]


def test_ranks_read_back_together(tmp_path: Path) -> None:
    ranks.run(check_ranks_read_back_together, 2, str(tmp_path))


def check_a_load_is_a_reading(folder: str, steps: Sequence[int]) -> None:
    live = trained()
    checkpoint.load(folder, **live)
    with counted_reads() as counts:
        checkpoint.save(folder, steps[-1] + 1, **live, keep=2)
    assert not counts
    dist.barrier()
    assert checkpoint.steps(folder) == [steps[-1], steps[-1] + 1]


def test_a_checkpoint_that_ranks_loaded_together_is_trusted(tmp_path: Path) -> None:
    """Though no rank has read all of it."""
    save(tmp_path, 1, 2, 3)
    ranks.run(check_a_load_is_a_reading, 2, str(tmp_path), (1, 2, 3))
