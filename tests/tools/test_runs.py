"""Reading run folders: what is read is what was written, also while it is written, after restarts, and of runs that others have made."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sharded_optim as so
from launch.config import load
from launch.records import Resumption, Summary, Training, Validation
from launch.run_folder import RunFolder
from sharded_optim.tools import runs
from sharded_optim.tools.imported import MissingPackageError
from sharded_optim.tools.runs import Follower, Records, RunFolderError, find_run, labels_of, read_run
from tests.run_folders import training_record, validation_record, write_run

ROOT = Path(__file__).parents[2]
NESTED = {"steps": 20, "model": {"layers": 2}}


def append(folder: Path, *records: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


def steps_of(records: Records) -> list[int]:
    return [record.step for record in records.training]


def test_what_the_training_job_writes_is_read(tmp_path: Path) -> None:
    """Through its own classes, so that a renamed field fails here. A run that it resumes is one curve."""
    config = load(ROOT / "configs/single.yaml", [f"runs_folder={tmp_path}", "steps=40"])
    folder = RunFolder(config)

    def train(step: int, loss: float) -> None:
        name, rms = ("w", math.nan) if step == 10 else ("w", 0.5)
        folder.training(
            Training(
                step=step, train_loss_bits=loss, lr=1e-3, tokens_per_second=9.0, largest_rms=rms, largest_rms_name=name, skipped_steps=1
            )
        )

    folder.start(None)
    for step in (10, 20, 30):
        train(step, 8.0 - step)
    folder.validation(Validation(step=30, val_bits_per_byte=3.0))
    folder.start(Resumption(step=20, saved_by=1, world_size=1))
    train(30, 7.5)
    run = read_run(find_run(tmp_path / "latest"))
    assert [(record.step, record.loss) for record in run.records.training] == [(10, -2.0), (20, -12.0), (30, 7.5)]
    assert run.records.validation == [], "that of a step that is taken again is dropped"
    first, second, _ = run.records.training
    assert math.isnan(first.largest_rms)
    assert (second.largest_rms, second.largest_rms_name, second.lr, second.skipped_steps) == (0.5, "w", 1e-3, 1)
    assert (run.steps, run.config["optimizer"]["name"], run.path) == (40, "StableAdamW", folder.path)
    assert {"world_size", "status", "unigram_bits_per_byte", "zlib_bits_per_byte"} <= Summary.__dataclass_fields__.keys()


def logged(folder: Path, records: list[tuple[int, dict[str, float]]], **options: Any) -> runs.Run:
    """The run of a user's own loop, with the tracker `jsonl`."""
    with so.trackers.open(["jsonl"], folder, run="own", **options) as trackers:
        for step, values in records:
            trackers.log(step, values)
    return read_run(find_run(folder / "own"))


def test_what_the_tracker_writes_is_read(tmp_path: Path) -> None:
    """Its keys are the user's `loss` and `validation_loss`, and the optimizer's own, in one line or several of a step."""
    metrics = {"skipped_steps": 1.0, "rms/a": 0.5, "rms/b": 2.5, "lr/0": 1e-3, "clipped_share": 0.5}
    run = logged(
        tmp_path, [(10, {"loss": 3.0, **metrics}), (20, {"loss": 2.0}), (20, {"validation_loss": 2.5}), (20, metrics)], config=NESTED
    )
    first, second = run.records.training
    assert first == replace(second, step=10, loss=3.0)
    assert (second.step, second.loss, second.skipped_steps, second.optimizer) == (20, 2.0, 1, metrics)
    assert (second.largest_rms, second.largest_rms_name) == (2.5, "b")
    assert [(record.step, record.loss) for record in run.records.validation] == [(20, 2.5)]
    assert (run.records.restarts, run.records.unreadable, run.records.loss_unit) == ([], 0, "")
    assert (run.status, run.config, run.steps) == ("finished", NESTED, 20)


def test_a_step_that_the_tracker_logs_again_replaces_the_one_before(tmp_path: Path) -> None:
    records = logged(tmp_path, [(1, {"loss": 3.0}), (2, {"loss": 2.0}), (2, {"loss": 1.0})]).records
    assert [(record.step, record.loss) for record in records.training] == [(1, 3.0), (2, 1.0)]
    assert records.restarts == [2]


def test_a_tracker_without_a_loss_has_records_without_one(tmp_path: Path) -> None:
    (record,) = logged(tmp_path, [(1, {"rms/a": math.nan})]).records.training
    assert record.loss is None
    assert record.largest_rms_name == "a"
    assert math.isnan(record.largest_rms)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_tracker_writes_down_how_a_run_ended(tmp_path: Path, error: type[BaseException] | None) -> None:
    with pytest.raises(error) if error else nullcontext(), so.trackers.open(["jsonl"], tmp_path, run="own") as trackers:
        trackers.log(1, {"loss": 1.0})
        assert read_run(tmp_path / "own").status == "running or interrupted"
        if error:
            raise error
    assert read_run(tmp_path / "own").status == {None: "finished", ValueError: "failed", KeyboardInterrupt: "interrupted"}[error]


def test_metrics_of_the_optimizer_are_read_by_kind(tmp_path: Path) -> None:
    write_run(tmp_path, tensors=["a", "b/c"])
    record = read_run(tmp_path).records.training[0]
    assert record.by_name("rms").keys() == {"a", "b/c"}
    assert record.by_name("ms").keys() == {"observe", "agree", "matrices", "update"}


def test_a_restart_that_the_file_shows_replaces_the_steps_after_it(tmp_path: Path) -> None:
    """As where a job was killed before it could drop them, or another program appends."""
    write_run(tmp_path, steps=60, validation_every=20)
    append(tmp_path, training_record(50, train_loss_bits=1.5), validation_record(60))
    records = read_run(tmp_path).records
    assert steps_of(records) == [10, 20, 30, 40, 50]
    assert records.training[-1].loss == 1.5
    assert [record.step for record in records.validation] == [20, 40, 60]
    assert records.restarts == [50]


def test_half_a_line_is_left_for_the_next_reading(tmp_path: Path) -> None:
    write_run(tmp_path, steps=20)
    follower = Follower(tmp_path)
    line = json.dumps(training_record(30)) + "\n"
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(line[:40])
        stream.flush()
        records = follower.read().records
        assert (steps_of(records), records.unreadable) == ([10, 20], 0)
        stream.write(line[40:])
    assert steps_of(follower.read().records) == [10, 20, 30]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 30, "train_lo{"step": 40}',
        "[]",
        "7",
        '{"step": "30", "train_loss_bits": 1}',
        '{"step": true, "train_loss_bits": 1}',
        "\xff",
    ],
)
def test_lines_that_are_no_records_are_counted_and_left_out(tmp_path: Path, line: str) -> None:
    write_run(tmp_path, steps=20)
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(line.encode("latin-1") + b"\n")
    append(tmp_path, training_record(30))
    records = read_run(tmp_path).records
    assert (steps_of(records), records.unreadable) == ([10, 20, 30], 1)


@pytest.mark.parametrize("value", [None, "1", [1], 10**400])
def test_a_value_that_is_no_finite_number_is_nan(tmp_path: Path, value: Any) -> None:
    write_run(tmp_path, steps=10)
    append(tmp_path, training_record(20, train_loss_bits=value, optimizer={"rms/a": value}) | {"optimizer": {"rms/a": value}})
    last = read_run(tmp_path).records.training[-1]
    assert math.isnan(last.loss)
    assert math.isnan(last.optimizer["rms/a"])


def test_a_follower_reads_only_what_was_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, steps=1000)
    follower = Follower(tmp_path)
    follower.read()
    lines: list[bytes] = []
    add = Records.add
    monkeypatch.setattr(Records, "add", lambda self, line: (lines.append(line), add(self, line)))
    append(tmp_path, training_record(1010))
    assert steps_of(follower.read().records)[-2:] == [1000, 1010]
    assert len(lines) == 1


@pytest.mark.parametrize("longer", [False, True])
def test_a_follower_begins_anew_where_the_file_was_replaced(tmp_path: Path, longer: bool) -> None:
    """As the job does that resumes a run: also where the new file is longer than the one that was read, and has its inode."""
    write_run(tmp_path, steps=50)
    follower = Follower(tmp_path)
    follower.read()
    write_run(tmp_path, steps=90 if longer else 20, seed=1)
    expected = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = follower.read().records
    assert [record.loss for record in found.training] == [each["train_loss_bits"] for each in expected if "train_loss_bits" in each]
    assert found.restarts == []


def test_a_run_that_has_just_begun_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 7\n")
    run = read_run(find_run(tmp_path))
    assert (run.records.training, run.steps, run.seconds_since_record, run.status) == ([], 7, None, "no summary yet")


@pytest.mark.parametrize("content", ["", "[", "[1]", "steps: [", "steps: x"])
def test_a_config_and_a_summary_that_cannot_be_read_are_as_none(tmp_path: Path, content: str) -> None:
    write_run(tmp_path, steps=10)
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "summary.json").write_text(content)
    run = read_run(tmp_path)
    assert (run.steps, run.ranks, run.summary, len(run.records.training)) == (None, None, {}, 1)


def test_a_folder_that_is_no_run_is_refused_with_what_is_missing_and_the_runs_beside_it(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old")):
        write_run(tmp_path / name, steps=10)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / "latest").symlink_to("new")
    empty = tmp_path / "empty"
    empty.mkdir()
    beside = f"run folders beside it, newest first: {tmp_path}/new, {tmp_path}/old"
    with pytest.raises(RunFolderError) as refused:
        find_run(empty)
    assert str(refused.value) == f"'{empty}' is no run folder: it has neither config.yaml nor metrics.jsonl; {beside}"
    with pytest.raises(RunFolderError, match="there is no such folder; run folders beside it"):
        find_run(tmp_path / "absent")
    with pytest.raises(RunFolderError, match="run folders in it, newest first"):
        find_run(tmp_path)
    with pytest.raises(RunFolderError, match=r"it is a file; give the folder that holds metrics\.jsonl"):
        find_run(tmp_path / "new" / "metrics.jsonl")
    with pytest.raises(RunFolderError, match="no run folder is beside it"):
        find_run(tmp_path / "absent" / "absent")


def test_runs_of_the_same_name_are_told_apart_by_their_parents() -> None:
    assert labels_of([Path("/r/x/a/run"), Path("/r/y/a/run"), Path("/r/y/b/run")]) == ["x/a/run", "y/a/run", "y/b/run"]


def test_without_pyyaml_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, steps=10)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingPackageError, match=r"config\.yaml needs pyyaml, which is not installed; pip install pyyaml"):
        read_run(tmp_path)
