"""Trackers store what they are given, in every destination; none writes a step twice, and none ends training."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sharded_optim as so
from sharded_optim.trackers import background, several
from sharded_optim.trackers.background import Background
from sharded_optim.trackers.destination import Destination, Run, Status
from sharded_optim.trackers.registry import MODULES, check_installed, destination
from sharded_optim.trackers.run_files import read_records
from sharded_optim.trackers.several import Trackers

PAGE = Path(__file__).parents[2] / "docs" / "trackers.md"
CONFIG = {"lr": 1e-3, "model": {"layers": 2, "name": "tiny"}}
VALUES = {"loss": 1.5, "skipped_steps": 0.0, "rms/blocks.0.weight": 1.25, "rms/head[0]": 0.5}
SILENT = pytest.mark.filterwarnings("error::UserWarning")  # a tracker that fails warns


def needs(name: str) -> None:
    """Skip a test where a client is not installed."""
    try:
        check_installed([name])
    except ImportError as error:
        pytest.skip(str(error))


def run_of(folder: Path, **more: Any) -> Run:
    return Run(folder=folder, name="first", config=CONFIG, **more)


# ------------------------------------------------------------------------------------------------------------------- JSON lines


@SILENT
def test_json_lines_have_a_whole_record_for_each_call_and_null_for_what_is_not_finite(tmp_path: Path) -> None:
    with so.trackers.open(["jsonl"], tmp_path, run="first", config=CONFIG) as trackers:
        trackers.log(1, VALUES | {"rms/nan": math.nan, "rms/inf": -math.inf})
        text = (tmp_path / "first" / "metrics.jsonl").read_text()  # before anything is closed
        trackers.log(2, {"loss": torch.tensor(0.25), "count": 3})
    assert text.endswith("\n")
    assert json.loads(text) == {"step": 1, **VALUES, "rms/nan": None, "rms/inf": None}
    assert read_records(tmp_path / "first" / "metrics.jsonl")[1] == {"step": 2, "loss": 0.25, "count": 3.0}
    assert json.loads((tmp_path / "first" / "config.json").read_text()) == CONFIG


def test_a_resumed_run_has_no_record_twice_in_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "first" / "metrics.jsonl"
    trackers = so.trackers.open(["jsonl"], tmp_path, run="first")
    for step in (1, 2, 3):
        trackers.log(step, {"loss": float(step)})
    with path.open("a") as stream:
        stream.write('{"step": 4, "lo')  # as a killed process leaves it
    trackers = so.trackers.open(["jsonl"], tmp_path, run="first", resume_after=2)
    trackers.log(3, {"loss": 3.0})
    assert read_records(path) == [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    assert path.read_text().count("\n") == 3


def test_a_new_run_keeps_the_records_of_an_earlier_one_of_its_name(tmp_path: Path) -> None:
    for loss in (1.0, 2.0, 3.0):
        so.trackers.open(["jsonl"], tmp_path, run="first").log(1, {"loss": loss})
    names = ("metrics-1.jsonl", "metrics-2.jsonl", "metrics.jsonl")
    assert [read_records(tmp_path / "first" / name) for name in names] == [[{"step": 1, "loss": loss}] for loss in (1.0, 2.0, 3.0)]


# ------------------------------------------------------------------------------------------------------------------- TensorBoard


@SILENT
def test_tensorboard_has_every_value_with_its_step_and_hides_steps_that_are_taken_again(tmp_path: Path) -> None:
    needs("tensorboard")
    accumulators: Any = import_module("tensorboard.backend.event_processing.event_accumulator")
    trackers = so.trackers.open(["tensorboard"], tmp_path, run="first", config=CONFIG)
    for step in (1, 2, 3):
        trackers.log(step, VALUES | {"loss": float(step), "rms/nan": math.nan})
    resumed = so.trackers.open(["tensorboard"], tmp_path, run="first", config=CONFIG, resume_after=2)
    resumed.log(3, VALUES | {"loss": 30.0})
    resumed.finish()
    found = accumulators.EventAccumulator(str(tmp_path / "first" / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == {*VALUES, "rms/nan"}
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [event.value for event in found.Scalars("rms/head[0]")] == [0.5] * 3
    assert math.isnan(found.Scalars("rms/nan")[0].value)
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text) == CONFIG


# --------------------------------------------------------------------------------------------------------------------------- W&B

WANDB = """
import sys, warnings
import sharded_optim as so
warnings.simplefilter("error", UserWarning)
options = {"wandb": {"mode": "offline", "project": "tests"}}
with so.trackers.open(["wandb"], sys.argv[1], run="first", config={"lr": 1e-3}, options=options) as trackers:
    trackers.log(1, {"loss": 1.5, "rms/head[0]": 0.5})
    trackers.log(1, {"validation_loss": 2.5})
    trackers.log(20, {"loss": 0.25, "rms/head[0]": float("nan")})
"""


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: protocol buffers in the log format of LevelDB, in blocks of 32 KiB, behind 7 bytes of W&B's own."""
    messages: Any = import_module("wandb.proto.wandb_internal_pb2")
    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # no place for a header
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of a record, or the last part of it
            record = messages.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb_has_every_value_in_its_offline_files(tmp_path: Path) -> None:
    needs("wandb")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(PAGE.parents[1]), "HOME": str(tmp_path), "WANDB_ERROR_REPORTING": "false"}
    command = [sys.executable, "-c", WANDB, str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "first" / "wandb").glob("offline-run-*/*.wandb")
    records = list(wandb_records(path))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.display_name, run.project) == ("first", "tests")
    config = {item.key: item.value_json for item in run.config.update}
    assert json.loads(config["lr"]) == 1e-3
    history = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    found = {
        entry.step.num: {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in entry.item} for entry in history
    }
    assert found.keys() == {1, 20}
    assert (found[1]["loss"], found[1]["rms/head[0]"], found[1]["validation_loss"]) == (1.5, 0.5, 2.5)  # two calls, one record
    assert found[20]["loss"] == 0.25
    assert math.isnan(float(found[20]["rms/head[0]"]))
    (ending,) = [record.exit for record in records if record.WhichOneof("record_type") == "exit"]
    assert ending.exit_code == 0
    assert json.loads((tmp_path / "first" / "tracker_ids.json").read_text()) == {"wandb": run.run_id}


# ------------------------------------------------------------------------------------------------------------------------ MLflow


@SILENT
def test_mlflow_has_every_value_once_also_where_a_run_is_resumed(tmp_path: Path) -> None:
    needs("mlflow")
    pytest.importorskip("alembic", reason="MLflow's SQLite store needs sqlalchemy and alembic, which mlflow-skinny does not bring")
    mlflow: Any = import_module("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    options = {"mlflow": {"uri": uri, "experiment": "tests"}}
    trackers = so.trackers.open(["mlflow"], tmp_path, run="first", config=CONFIG, options=options)
    for step in (1, 2, 3):
        trackers.log(step, VALUES | {"loss": float(step), "rms/nan": math.nan})
    trackers.finish("interrupted")
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "KILLED")
    resumed = so.trackers.open(["mlflow"], tmp_path, run="first", config=CONFIG, resume_after=2, options=options)
    resumed.log(3, VALUES | {"loss": 30.0})
    resumed.log(3, {"validation_loss": 2.0})  # which was not logged before
    resumed.log(4, VALUES | {"loss": 4.0})
    resumed.finish()
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.001", "model.layers": "2", "model.name": "tiny"}
    assert {"rms/blocks.0.weight", "rms/head_0_", "rms/nan", "validation_loss"} <= run.data.metrics.keys()
    history = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 4
    assert history == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert len(client.get_metric_history(run.info.run_id, "validation_loss")) == 1
    assert math.isnan(run.data.metrics["rms/nan"])


# -------------------------------------------------------------------------------------------------------------------- Prometheus


def scrape(address: tuple[str, int]) -> str:
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/metrics", timeout=10) as answer:
        return answer.read().decode()


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Any]:
    """A tracker on a free port, with two ranks' heartbeats."""
    needs("prometheus")
    tracker: Any = destination("prometheus").opens(
        run_of(tmp_path), port=0, live=lambda: {"healthy_ranks": 2.0, "heartbeat_age_seconds/1": 0.5}
    )
    yield tracker
    tracker.finish("finished")


def test_prometheus_serves_the_last_values_with_labels(prometheus: Any) -> None:
    prometheus.log(10, VALUES | {"lr": 2.0, "lr/0": 1.0, "rms/gone": 7.0, "rms/nan": math.nan, "tokens-per.second": 9.0})
    prometheus.log(10, {"validation_loss": 3.5})
    prometheus.log(20, VALUES | {"loss": 1.25, "lr": 2.0, "lr/0": 1.0, "rms/nan": math.nan, 'rms/quo"te': 4.0, "tokens-per.second": 9.0})
    lines = scrape(prometheus.address).splitlines()
    for line in (
        "# TYPE sharded_optim_rms gauge",
        "sharded_optim_step 20.0",
        "sharded_optim_loss 1.25",
        "sharded_optim_skipped_steps 0.0",
        "sharded_optim_validation_loss 3.5",
        'sharded_optim_rms{tensor="blocks.0.weight"} 1.25',
        'sharded_optim_rms{tensor="nan"} NaN',
        r'sharded_optim_rms{tensor="quo\"te"} 4.0',
        "sharded_optim_lr 2.0",
        'sharded_optim_lr{group="0"} 1.0',
        "sharded_optim_tokens_per_second 9.0",
        "sharded_optim_healthy_ranks 2.0",
        'sharded_optim_heartbeat_age_seconds{rank="1"} 0.5',
    ):
        assert lines.count(line) == 1, line
    assert not [line for line in lines if "gone" in line], "a tensor that is no longer reported has no value"
    assert not [line for line in lines if line.startswith(("python_", "process_"))], "its own registry"


def test_prometheus_keeps_metrics_while_records_have_none(prometheus: Any) -> None:
    """As with metrics_every=10, where they are of the step before; and only until the next that has some."""
    prometheus.log(10, {"loss": 3.0, "skipped_steps": 0.0, "rms/a": 1.5, "rms/b": 2.5})
    prometheus.log(11, {"loss": 2.0})
    lines = scrape(prometheus.address).splitlines()
    assert {"sharded_optim_loss 2.0", 'sharded_optim_rms{tensor="a"} 1.5', 'sharded_optim_rms{tensor="b"} 2.5'} <= set(lines)
    prometheus.log(20, {"loss": 1.0, "skipped_steps": 0.0, "rms/a": 0.5})
    lines = scrape(prometheus.address).splitlines()
    assert {"sharded_optim_loss 1.0", 'sharded_optim_rms{tensor="a"} 0.5'} <= set(lines)
    assert not any('"b"' in line for line in lines)


def test_prometheus_output_is_what_the_clients_own_parser_reads(prometheus: Any) -> None:
    parser: Any = import_module("prometheus_client.parser")
    prometheus.log(1, VALUES)
    samples = [sample for family in parser.text_string_to_metric_families(scrape(prometheus.address)) for sample in family.samples]
    assert {sample.labels["tensor"]: sample.value for sample in samples if sample.name == "sharded_optim_rms"} == {
        "blocks.0.weight": 1.25,
        "head[0]": 0.5,
    }


def listening_addresses(port: int) -> set[str]:
    """The IPv4 and IPv6 addresses, in hexadecimal, on which this machine listens to a port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and int(local.partition(":")[2], 16) == port:
                found.add(local.partition(":")[0])
    return found


def test_prometheus_listens_on_loopback_alone_unless_told_otherwise(prometheus: Any, tmp_path: Path) -> None:
    assert prometheus.address[0] == "127.0.0.1"
    assert listening_addresses(prometheus.address[1]) == {"0100007F"}
    everywhere: Any = destination("prometheus").opens(run_of(tmp_path), host="0.0.0.0", port=0)
    assert listening_addresses(everywhere.address[1]) == {"00000000"}
    everywhere.finish("finished")


def test_a_finished_prometheus_tracker_leaves_no_thread_and_no_port(tmp_path: Path) -> None:
    needs("prometheus")
    before = set(threading.enumerate())
    tracker: Any = destination("prometheus").opens(run_of(tmp_path), port=0)
    scrape(tracker.address)
    tracker.finish("finished")
    assert not listening_addresses(tracker.address[1])
    assert not [thread for thread in set(threading.enumerate()) - before if not thread.daemon]


def test_a_port_that_is_taken_is_a_warning_that_names_it(tmp_path: Path, prometheus: Any) -> None:
    port = prometheus.address[1]
    with pytest.warns(UserWarning, match=rf"the tracker 'prometheus' failed: OSError: cannot listen on host='127.0.0.1', port={port}"):
        trackers = so.trackers.open(["prometheus", "jsonl"], tmp_path, run="first", options={"prometheus": {"port": port}})
    trackers.log(1, VALUES)
    assert len(read_records(tmp_path / "first" / "metrics.jsonl")) == 1


# ----------------------------------------------------------------------------------------------------------------- what can fail


class Broken:
    """A tracker whose server is gone from step 2 to step 3."""

    def __init__(self, run: Run) -> None:
        self.steps: list[int] = []
        self.status: Status | None = None
        TRACKERS.append(self)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step in (2, 3):
            raise ConnectionError("the server is gone")
        self.steps.append(step)

    def finish(self, status: Status) -> None:
        self.status = status


TRACKERS: list[Any] = []


@pytest.fixture(params=[False, True], ids=["in the loop", "on a thread"])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a destination that is one module and one line in the registry."""
    found = Destination(opens=Broken, may_block=request.param)
    monkeypatch.setitem(sys.modules, "test_trackers_broken", SimpleNamespace(DESTINATION=found))
    monkeypatch.setitem(MODULES, "broken", "test_trackers_broken")
    return "broken"


def test_a_tracker_that_fails_warns_once_and_neither_training_nor_the_others_end(tmp_path: Path, broken: str) -> None:
    trackers = so.trackers.open([broken, "jsonl"], tmp_path, run="first")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (1, 2, 3, 4):
            trackers.log(step, VALUES)
        trackers.finish()
        trackers.finish()
    (warning,) = caught
    assert str(warning.message).startswith("the tracker 'broken' failed: ConnectionError: the server is gone.")
    assert TRACKERS[-1].steps == [1, 4], "the server came back"
    assert TRACKERS[-1].status == "finished"
    assert [record["step"] for record in read_records(tmp_path / "first" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_leaving_the_with_block_by_an_error_finishes_as_failed(tmp_path: Path, broken: str) -> None:
    with pytest.raises(ZeroDivisionError), so.trackers.open([broken], tmp_path, run="first"):
        raise ZeroDivisionError
    assert TRACKERS[-1].status == "failed"


def test_a_tracker_that_waits_for_ever_does_not_hold_training_up() -> None:
    """Not even when it finishes, and records that it does not take are dropped with an error."""
    released = threading.Event()

    class Waits:
        def log(self, step: int, values: Mapping[str, float]) -> None:
            released.wait(60.0)

        def finish(self, status: Status) -> None: ...

    tracker = Background("waits", Waits, seconds=0.1)

    def fill() -> None:
        for step in range(2000):
            tracker.log(step, VALUES)

    with pytest.raises(TimeoutError, match=r"1000 records wait to be written; step 100[01] is dropped"):
        fill()
    with pytest.raises(TimeoutError, match="has not written everything within 0 s"):
        tracker.finish("finished")
    released.set()


AT_EXIT = """
import sys, time
from sharded_optim.trackers.background import Background

class Slow:
    def __init__(self):
        time.sleep(0.2)  # the program fails before it is open

    def log(self, step, values):
        time.sleep(0.2)
        print(step, flush=True)

    def finish(self, status):
        print(status, flush=True)

tracker = Background("slow", Slow, seconds=60.0)
for step in (1, 2, 3):
    tracker.log(step, {})
if sys.argv[1] == "finish":
    tracker.finish("finished")
raise ZeroDivisionError
"""


@pytest.mark.parametrize(("how", "status"), [("error", "failed"), ("finish", "finished")])
def test_what_waits_is_written_where_a_program_ends_by_an_error(how: str, status: str) -> None:
    command, environment = [sys.executable, "-c", AT_EXIT, how], os.environ | {"PYTHONPATH": str(PAGE.parents[1])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert "ZeroDivisionError" in result.stderr
    assert result.stdout.split() == ["1", "2", "3", status]


def test_a_run_that_has_failed_does_not_wait_long_for_its_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "SECONDS_AFTER_FAILURE", 0.1)
    released = threading.Event()
    tracker = Background("waits", lambda: SimpleNamespace(finish=lambda status: released.wait(60.0)), seconds=60.0)
    with pytest.raises(TimeoutError, match="has not written everything within 0 s"):
        tracker.finish("failed")
    released.set()


def test_trackers_that_may_wait_finish_at_the_same_time() -> None:
    """The first needs what the second does: one after the other, it would wait until its time is over."""
    written = threading.Event()
    first, second = SimpleNamespace(finish=lambda status: written.wait(60.0)), SimpleNamespace(finish=lambda status: written.set())
    trackers = Trackers(
        {
            "first": lambda: Background("first", lambda: first, seconds=60.0),
            "second": lambda: Background("second", lambda: second, seconds=60.0),
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trackers.finish("failed")
    assert written.is_set()


def test_a_missing_client_is_an_error_that_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a folder of the client's name lies in the current folder, as W&B makes one."""
    (tmp_path / "no_such_client").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    found = Destination(opens=Broken, client="no_such_client", install="'no-such-client>=1'")
    monkeypatch.setitem(sys.modules, "test_trackers_absent", SimpleNamespace(DESTINATION=found))
    monkeypatch.setitem(MODULES, "absent", "test_trackers_absent")
    expected = "the tracker 'absent' needs the package no_such_client, which is not installed: pip install 'no-such-client>=1'"
    with pytest.raises(ImportError, match=re.escape(expected)):
        so.trackers.open(["absent"], tmp_path, run="first")


@pytest.mark.parametrize(
    ("names", "more", "expected"),
    [
        (["tensorbord"], {}, "there is no tracker 'tensorbord'; did you mean tensorboard?"),
        (["xyz"], {}, "there is no tracker 'xyz'; there are jsonl, tensorboard, wandb, mlflow, prometheus"),
        (["jsonl", "jsonl"], {}, "a tracker is opened once, got names=['jsonl', 'jsonl']"),
        (["prometheus"], {"options": {"prometheus": {"prot": 1}}}, "the tracker 'prometheus' has no option prot=1; did you mean port?"),
        (["jsonl"], {"options": {"jsonl": {"path": "x"}}}, "the tracker 'jsonl' has no option path='x'; there are none"),
        (["jsonl"], {"options": {"wandb": {}}}, "options are given for 'wandb', which is not among names=['jsonl']"),
        (["jsonl"], {"run": "../x"}, "run is the name of a folder and may have letters, digits, '.', '_' and '-', got '../x'"),
        (["jsonl"], {"run": ".."}, "run is the name of a folder"),
        (["jsonl"], {"metrics_every": 0}, "metrics_every is a number of steps, a positive int, got 0; leave it out for 1"),
    ],
)
def test_what_cannot_be_opened_is_refused_by_name(tmp_path: Path, names: list[str], more: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        so.trackers.open(names, tmp_path, **{"run": "first"} | more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "error", "expected"),
    [
        ({"loss": "high"}, TypeError, "a tracker's value must be a number or a tensor of one element, got loss='high'"),
        ({"loss": torch.ones(2)}, TypeError, "a tracker's value must be a number or a tensor of one element"),
        ({"step": 1.0}, ValueError, "the key 'step' is the step itself"),
    ],
)
def test_what_cannot_be_logged_is_refused_by_name(tmp_path: Path, values: Any, error: type[Exception], expected: str) -> None:
    trackers = so.trackers.open(["jsonl"], tmp_path, run="first")
    with pytest.raises(error, match=re.escape(expected)):
        trackers.log(1, values)
    trackers.finish()
    with pytest.raises(ValueError, match="step 2 cannot be logged: the trackers are finished"):
        trackers.log(2, {"loss": 1.0})


def test_ranks_other_than_0_open_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(several.dist, "get_rank", lambda: 1)
    trackers = so.trackers.open(["jsonl"], tmp_path, run="first")
    trackers.log(1, VALUES)
    trackers.finish()
    assert not list(tmp_path.iterdir())


def test_metrics_are_read_in_every_kth_step_and_in_no_other(tmp_path: Path) -> None:
    asked: list[int] = []
    with so.trackers.open(["jsonl"], tmp_path, run="first", metrics_every=3) as trackers:
        for step in range(1, 8):
            trackers.log(step, {"loss": 1.0}, metrics=lambda step=step: asked.append(step) or {"rms/a": torch.tensor(0.5)})
    assert asked == [3, 6]
    records = read_records(tmp_path / "first" / "metrics.jsonl")
    assert [record.get("rms/a") for record in records] == [None, None, 0.5, None, None, 0.5, None]


def test_ranks_that_write_nothing_read_no_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(several.dist, "get_rank", lambda: 1)
    so.trackers.open(["jsonl"], tmp_path, run="first").log(1, VALUES, metrics=lambda: pytest.fail("metrics were read"))


# ----------------------------------------------------------------------------------------------------------------------- the page


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop, then the same with a scrape in it, whose lines are those that the page shows."""
    needs("tensorboard")
    needs("prometheus")
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text()
    loop, served = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(loop, "docs/trackers.md", "exec"), {})
    records = read_records(tmp_path / "runs" / "first" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(5, 101, 5))
    assert records[0].keys() == {"step", "loss"}
    assert {"loss", "skipped_steps", "rms/weight"} <= records[1].keys()
    assert list((tmp_path / "runs" / "first" / "tensorboard").glob("events*"))
    port = free_port()
    names: dict[str, Any] = {}
    exec(compile(served.replace("9500", str(port)), "docs/trackers.md", "exec"), names)
    shown = re.search(r"\$ curl .*?\n(.*?)```", page, re.DOTALL)
    assert shown is not None
    series = re.findall(r"^(\w+(?:\{.*\})?) \S+$", shown[1], re.MULTILINE)
    output = scrape(("127.0.0.1", port))
    names["trackers"].finish()
    assert len(series) >= 4
    assert set(series) <= set(re.findall(r"^(\w+(?:\{.*\})?) \S+$", output, re.MULTILINE))
