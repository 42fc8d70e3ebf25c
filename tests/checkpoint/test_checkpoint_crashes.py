"""After a power cut at any disk operation of a save, the old or the new checkpoint loads."""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from recorded_disk import LOSSES, Disk, Operation, Recorder, merged
from torch import Tensor

import sharded_optim as so
from benchmarks.given_gradients import Model, Shapes, gradients
from sharded_optim import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")

LAYERS: Shapes = (((7, 3),), ((),))
OLD, NEW = 3, 5  # steps
State = Mapping[str, Tensor]


@cache
def trained(steps: int) -> tuple[Model, so.StableAdamW]:
    model = Model(LAYERS)
    optimizer = so.StableAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, backend="eager")
    for step in range(1, steps + 1):
        for param, grad in zip(model.parameters(), gradients(step, LAYERS), strict=True):
            param.grad = grad
        optimizer.step()
    return model, optimizer


def state_of(model: Model, optimizer: Any) -> State:
    found = {name: param.detach() for name, param in model.named_parameters()}
    return found | {f"{kind}/{name}": value for name, param in model.named_parameters() for kind, value in optimizer.state[param].items()}


def save(root: Path, step: int, **options: Any) -> None:
    model, optimizer = trained(step)
    checkpoint.save(root, step, model=model, optimizer=optimizer, **options)


@torch.no_grad()
def assert_loads(root: Path, step: int) -> None:
    model, optimizer = trained(1)
    found = state_of(model, optimizer)
    for value in found.values():
        value.fill_(torch.nan)
    checkpoint.load(root, step=step, model=model, optimizer=optimizer)
    found = state_of(model, optimizer)
    for name, value in state_of(*trained(step)).items():
        assert torch.equal(found[name], value), f"step {step}: {name}"


# -------------------------------------------------------------------------------------------------------- every moment of a save


def assert_old_or_new(disk: Disk, operations: Sequence[Operation], tmp_path: Path, *, old: int | None = OLD, damaged: bool = False) -> None:
    """After each operation, whatever is lost that was not synced; and when all are done, it is the new one.

    Args:
        operations: of a save of step `NEW` under `tmp_path / "disk/run"`.
        disk: before them.
        damaged: whether there was a checkpoint of step `NEW` that is damaged.
    """
    seen: dict[Any, int | None] = {}  # the latest step, by all that is left
    for done in range(len(operations) + 1):
        for lost in LOSSES:
            copy = tmp_path / f"after-{done}-{lost.replace(' ', '-')}"
            root = copy / "run"
            disk.after_power_cut(copy, lost, done)
            left = frozenset((path.relative_to(copy), path.read_bytes() if path.is_file() else None) for path in copy.rglob("*"))
            where = f"{lost} lost after {[(each.call, each.path) for each in operations[:done]][-2:]}"
            if left in seen:
                assert seen[left] == NEW or done < len(operations), where
                shutil.rmtree(copy)
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if damaged else "error")  # of what is damaged
                latest = checkpoint.latest(root)
            assert latest in ((NEW,) if done == len(operations) else (old, NEW)), where
            for step in [latest] if damaged else checkpoint.steps(root):
                if step is not None:
                    assert_loads(root, step)
            seen[left] = latest
            if lost == "nothing":  # and training goes on: no draft is in its way
                save(root, NEW + 1)
                assert checkpoint.latest(root) == NEW + 1, where
                assert not list(root.glob(".*")), where
            shutil.rmtree(copy)
        if done < len(operations):
            disk.apply(operations[done])
    assert set(seen.values()) == {old, NEW}


def save_first(root: Path) -> None:
    save(root, NEW)


def save_beside_another(root: Path) -> None:
    save(root, NEW)


def save_and_prune(root: Path) -> None:
    save(root, NEW, keep=1)


def save_in_the_background(root: Path) -> None:
    model, optimizer = trained(NEW)
    checkpoint.async_save(root, NEW, model=model, optimizer=optimizer).wait()


def save_where_a_process_has_died(root: Path) -> None:
    save(root, NEW)
    assert sorted(path.name for path in root.iterdir()) == [f"step-{step:09d}" for step in (OLD, NEW)]


def save_in_the_place_of_a_damaged_one(root: Path) -> None:
    with pytest.warns(UserWarning, match=r"replacing a checkpoint that is damaged:(.|\n)*bytes \d+ to \d+, of 'exp_avg"):
        save(root, NEW)


@pytest.mark.parametrize(
    "act",
    [
        save_first,
        save_beside_another,
        save_and_prune,
        save_in_the_background,
        save_where_a_process_has_died,
        save_in_the_place_of_a_damaged_one,
    ],
)
def test_after_a_power_cut_at_any_time_the_old_or_the_new_checkpoint_is_intact(act: Callable[[Path], None], tmp_path: Path) -> None:
    root = tmp_path / "disk" / "run"
    (tmp_path / "disk").mkdir()
    if act is not save_first:
        save(tmp_path / "template", OLD)
        shutil.copytree(tmp_path / "template", root)  # not by this process, which is then a new one
    if act is save_where_a_process_has_died:
        shutil.copytree(root / f"step-{OLD:09d}", root / f".step-{NEW:09d}.0123abcd")
        (root / f".step-{NEW:09d}.0123abcd" / "COMMITTED").unlink()
        shutil.copytree(root / f"step-{OLD:09d}", root / f".step-{1:09d}.removed-1")
    if act is save_in_the_place_of_a_damaged_one:
        save(tmp_path / "template", NEW)
        shutil.copytree(tmp_path / "template" / f"step-{NEW:09d}", root / f"step-{NEW:09d}")
        flip(root / f"step-{NEW:09d}" / "shard-00000-of-00001.safetensors", -40)
    disk = Disk(tmp_path / "disk")
    with Recorder.at_work() as recorder:
        act(root)
    assert_old_or_new(
        disk,
        recorder.operations,
        tmp_path,
        old=None if act is save_first else OLD,
        damaged=act is save_in_the_place_of_a_damaged_one,
    )


def flip(path: Path, index: int) -> None:
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


def record_a_save_by_two_ranks(folder: str) -> None:
    with Recorder.at_work() as recorder:
        save(Path(folder) / "disk" / "run", NEW, keep=1)
    Path(folder, f"log-{dist.get_rank()}").write_bytes(pickle.dumps(recorder.operations))


def test_after_a_power_cut_while_two_ranks_write_a_checkpoint_is_intact(tmp_path: Path) -> None:
    save(tmp_path / "disk" / "run", OLD)
    disk = Disk(tmp_path / "disk")
    ranks.run(record_a_save_by_two_ranks, 2, str(tmp_path))
    logs = [pickle.loads((tmp_path / f"log-{rank}").read_bytes()) for rank in range(2)]
    assert all(any(operation.call == "write" for operation in log) for log in logs)
    assert_old_or_new(disk, merged(logs), tmp_path)


# ------------------------------------------------------------------------------------------------------------------ the disk itself


@pytest.mark.parametrize(("synced", "lost"), list(product(((), ("file",), ("folder",), ("file", "folder")), LOSSES)))
def test_a_disk_loses_only_what_was_not_synced(synced: tuple[str, ...], lost: str, tmp_path: Path) -> None:
    """Else the tests above would show nothing."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "there").write_bytes(b"before")
    disk = Disk(tmp_path / "disk")
    file, folder = str(tmp_path / "disk" / "new"), str(tmp_path / "disk")
    disk.apply(Operation(0.0, "create", file))
    disk.apply(Operation(0.0, "write", file, b"content!"))
    for what in synced:
        disk.apply(Operation(0.0, "fsync", {"file": file, "folder": folder}[what]))
    disk.after_power_cut(tmp_path / "left", lost, 0)
    assert (tmp_path / "left" / "there").read_bytes() == b"before"
    left = tmp_path / "left" / "new"
    assert left.exists() or ("folder" not in synced and lost in ("everything", "names", "anything", "anything else"))
    if left.exists():
        assert left.read_bytes() == b"content!" or ("file" not in synced and lost not in ("nothing", "names", "names of folders"))
    if lost == "everything":
        assert left.exists() == ("folder" in synced)
    if lost == "data" and "file" not in synced:
        assert left.read_bytes() == b""
