"""The job hands its records to the trackers that its config names, and its run folder has every metric of the optimizer."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import launch.__main__ as launcher
from launch.config import Config, ConfigError, load
from launch.records import Resumption, Training, Validation
from launch.run_folder import RunFolder
from launch.tracking import Tracking, check_installed
from launch.watch import heartbeats
from sharded_optim import trackers
from sharded_optim.trackers.destination import Destination, Run, Status
from sharded_optim.trackers.registry import MODULES

ROOT = Path(__file__).parents[2]
FSDP2 = ROOT / "configs" / "fsdp2.yaml"
RECORD = Training(
    step=2,
    train_loss_bits=7.5,
    lr=0.01,
    tokens_per_second=1000.0,
    largest_rms=math.nan,
    largest_rms_name="head.weight",
    skipped_steps=1,
    optimizer={"skipped_steps": 1.0, "rms/head.weight": math.nan, "rms/block.weight": 0.5},
)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["trackers=[tensorbord]"],
            "trackers.0='tensorbord': it should be 'tensorboard', 'wandb', 'mlflow' or 'prometheus'; did you mean tensorboard?",
        ),
        (["trackers=[jsonl]"], "trackers.0='jsonl': it should be 'tensorboard', 'wandb', 'mlflow' or 'prometheus'"),
        (["trackers=wandb"], "trackers='wandb': it should be a valid list"),
        (["trackers=[wandb, wandb]"], "trackers=['wandb', 'wandb'] names one twice"),
        (["tracker_options.wandb.mode=offline"], "tracker_options.wandb={'mode': 'offline'}, but trackers=[]; add 'wandb' there"),
        (
            ["trackers=[prometheus]", "tracker_options.prometheus.prot=1"],
            "the tracker 'prometheus' has no option prot=1; did you mean port?",
        ),
    ],
)
def test_trackers_that_there_are_not_are_refused_by_name(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(FSDP2, overrides)
    assert expected in str(caught.value)


def test_the_commands_of_the_page_are_configs() -> None:
    section = (ROOT / "docs" / "training-job.md").read_text().partition("## Trackers")[2].partition("\n## ")[0]
    commands = [shlex.split(line, comments=True) for line in section.splitlines() if line.startswith("make train ")]
    configs = [load(FSDP2, command[2].removeprefix("ARGS=").split()) for command in commands]
    assert [config.trackers for config in configs] == [["tensorboard"], ["wandb", "mlflow"], ["prometheus"]]
    assert [config.tracker_options for config in configs] == [{}, {"wandb": {"mode": "offline"}}, {"prometheus": {"port": 9500}}]


def test_a_missing_client_is_refused_before_any_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Destination, "is_installed", False)
    expected = "trackers=['wandb']: the tracker 'wandb' needs the package wandb, which is not installed: pip install wandb, or leave it out"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        check_installed(load(FSDP2, ["trackers=[wandb]"]))
    with pytest.raises(SystemExit):  # and not os.execv
        launcher.main([str(FSDP2), "trackers=[wandb]", f"runs_folder={tmp_path}"])
    assert capsys.readouterr().err == f"error: {expected}\n"
    assert not list(tmp_path.iterdir())


class Recorded:
    """A tracker that keeps what it is given."""

    last: Any = None

    def __init__(self, run: Run, *, live: Any = None) -> None:
        self.run, self.live = run, live
        self.records: list[tuple[int, Mapping[str, float]]] = []
        self.status: Status | None = None
        Recorded.last = self

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.records.append((step, values))

    def finish(self, status: Status) -> None:
        self.status = status


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Of a job whose tracker `prometheus` keeps what it is given."""
    monkeypatch.setitem(sys.modules, "test_tracking_recorded", SimpleNamespace(DESTINATION=Destination(opens=Recorded)))
    monkeypatch.setitem(MODULES, "prometheus", "test_tracking_recorded")
    return load(FSDP2, ["trackers=[prometheus]", f"runs_folder={tmp_path}"])


def test_metrics_every_is_a_multiple_of_log_every() -> None:
    assert load(FSDP2, ["log_every=10", "metrics_every=30"]).metrics_every == 30
    expected = "metrics_every=15 is no multiple of log_every=10, and only records have metrics; use metrics_every=20, or log more often"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load(FSDP2, ["log_every=10", "metrics_every=15"])


def test_trackers_have_what_the_job_says_and_all_metrics_of_the_optimizer(config: Config, tmp_path: Path) -> None:
    tracking = Tracking(config, tmp_path / "first", dict)
    tracking.start(Resumption(step=1, saved_by=2, world_size=2))
    tracking.training(RECORD)
    tracking.validation(Validation(step=2, val_bits_per_byte=8.0))
    tracking.stop(2, "asked to stop")
    tracker = Recorded.last
    assert (tracker.run.path, tracker.run.resume_after) == (tmp_path / "first", 1)
    assert tracker.run.config["optimizer"]["name"] == "StableAdamW"
    (step, values), validation = tracker.records
    assert (step, values["loss"], values["tokens_per_second"]) == (2, 7.5, 1000.0)
    assert {*values} == {"loss", "tokens_per_second", *RECORD.optimizer}
    assert validation == (2, {"validation_loss": 8.0})
    assert tracker.status == "interrupted"


def test_trackers_are_told_of_a_failure_before_the_process_ends(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what hangs meanwhile keeps the process for a bounded time."""
    exits: list[int] = []
    monkeypatch.setattr(heartbeats.os, "_exit", exits.append)
    monkeypatch.setattr(heartbeats, "SECONDS_TO_FLUSH", 5.0)
    tracking = Tracking(config, tmp_path / "first", dict)
    heartbeats.before_end(tracking.fail)
    tracking.start(None)
    tracking.training(RECORD)
    heartbeats.end()
    assert (Recorded.last.status, exits) == ("failed", [1])
    released = threading.Event()
    monkeypatch.setattr(heartbeats, "SECONDS_TO_FLUSH", 0.1)
    heartbeats.before_end(lambda: released.wait(60.0))
    heartbeats.end()
    released.set()
    assert exits == [1, 1]


def test_prometheus_has_the_ranks_that_were_heard_of_at_any_time(config: Config, tmp_path: Path) -> None:
    ages = {0: 0.25, 1: 0.5, 2: 12.0}
    Tracking(config, tmp_path / "first", lambda: ages).start(None)
    expected = {"healthy_ranks": 2.0, "heartbeat_age_seconds/0": 0.25, "heartbeat_age_seconds/1": 0.5, "heartbeat_age_seconds/2": 12.0}
    assert Recorded.last.live() == expected
    ages[1] = 3.5
    assert Recorded.last.live()["healthy_ranks"] == 1.0


def test_the_run_folder_has_all_metrics_of_the_optimizer_and_null_for_nan(tmp_path: Path) -> None:
    folder = RunFolder(load(FSDP2, [f"runs_folder={tmp_path}"]))
    folder.training(RECORD)
    folder.training(RECORD)  # of a step that is taken once more
    path = folder.path / "metrics.jsonl"
    record = json.loads(path.read_text().splitlines()[0])
    assert record["optimizer"] == {"skipped_steps": 1.0, "rms/head.weight": None, "rms/block.weight": 0.5}
    text = path.read_text().splitlines(keepends=True)[0]
    folder.start(Resumption(step=2, saved_by=2, world_size=2))
    assert path.read_text() == 2 * text
    assert math.isnan(folder._training[0].optimizer["rms/head.weight"])
    assert folder._training[0].optimizer["rms/block.weight"] == 0.5
    folder.start(Resumption(step=1, saved_by=2, world_size=2))
    assert path.read_text() == ""


def test_the_records_of_an_older_version_are_loaded(tmp_path: Path) -> None:
    """Which have no metrics of the optimizer."""
    folder = RunFolder(load(FSDP2, [f"runs_folder={tmp_path}"]))
    line = {"step": 1, "train_loss_bits": 8.0, "lr": 0.1, "tokens_per_second": 9.0, "largest_rms": None, "largest_rms_name": None}
    (folder.path / "metrics.jsonl").write_text(json.dumps(line | {"skipped_steps": 0}) + '\n{"step": 2, "train_lo')
    folder.start(Resumption(step=5, saved_by=2, world_size=2))
    (training,) = folder._training
    assert (training.train_loss_bits, training.largest_rms, training.optimizer) == (8.0, None, {})
    assert json.loads((folder.path / "metrics.jsonl").read_text()) == line | {"skipped_steps": 0}


def run_job(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", "configs/single.yaml", *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.timeout(240)
def test_a_job_that_goes_on_has_each_step_once_in_its_trackers(tmp_path: Path) -> None:
    try:
        trackers.check_installed(["tensorboard"])
    except ImportError as error:
        pytest.skip(str(error))
    accumulators: Any = import_module("tensorboard.backend.event_processing.event_accumulator")
    (tmp_path / "text").write_text("".join(random.Random(0).choices("abcdefghij ", k=20_000)))
    job = "warmup_steps=1 batch_size=4 sequence_length=32 log_every=1 validation_every=4 validation_batches=2 device=cpu checkpoint.every=3"
    job += f" model.layers=1 model.heads=2 model.d_model=16 data.path={tmp_path / 'text'} runs_folder={tmp_path / 'runs'}"
    job += " trackers=[tensorboard] metrics_every=2"
    first = run_job(*job.split(), "steps=4")
    assert first.returncode == 0, first.stderr
    run = (tmp_path / "runs" / "latest").resolve()
    shutil.rmtree(run / "checkpoints" / "step-000000004")
    second = run_job(*job.split(), "steps=6", "resume=auto")
    assert second.returncode == 0, second.stderr
    assert "resuming from the checkpoint" in second.stdout
    assert "failed" not in first.stderr + second.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if "train_loss_bits" in record]
    assert [record["step"] for record in training] == list(range(1, 7))
    with_metrics = [record for record in training if record["optimizer"]]
    assert [record["step"] for record in with_metrics] == [2, 4, 6]
    for record in with_metrics:
        assert record["optimizer"][f"rms/{record['largest_rms_name']}"] == record["largest_rms"]
        assert record["optimizer"]["skipped_steps"] == record["skipped_steps"] == 0
        assert record["non_finite_ranks"] == {}
    found = accumulators.EventAccumulator(str(run / "tensorboard")).Reload()
    for tag, records, values in (
        ("loss", training, [record["train_loss_bits"] for record in training]),
        ("rms/embedding.weight", with_metrics, [record["optimizer"]["rms/embedding.weight"] for record in with_metrics]),
    ):
        assert [event.step for event in found.Scalars(tag)] == [record["step"] for record in records]
        assert [event.value for event in found.Scalars(tag)] == pytest.approx(values, rel=1e-6)  # which TensorBoard stores in float32
    assert [event.step for event in found.Scalars("validation_loss")] == [4, 6]
