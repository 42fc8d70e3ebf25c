"""The training job runs as a user runs it, leaves what it promises, and gives the same losses however the model is sharded."""

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import sharded_optim as so
from launch import deepspeed_extension
from launch.config import Config, ConfigError, OptimizerConfig, load
from launch.model import GPT
from launch.optimizer import build_optimizer, build_schedule
from launch.run_folder import RunFolder, find, find_run
from launch.train import largest_rms

ROOT = Path(__file__).parents[2]
STEPS = 10
TINY = (
    f"steps={STEPS} warmup_steps=3 batch_size=4 sequence_length=32 log_every=1 validation_every=5 validation_batches=2 device=cpu "
    "model.layers=2 model.heads=2 model.d_model=32 optimizer.lr=1e-2"
).split()
TIMEOUT = 90.0  # seconds; a run takes about 8


LAUNCH = [sys.executable, "-m", "launch"]


def launch(*arguments: str, starter: list[str] = LAUNCH) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*starter, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)


@dataclass
class Run:
    """A finished run."""

    folder: Path
    output: str

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    def metrics(self) -> list[dict[str, Any]]:
        """What depends on the config and not on the clock."""
        records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        for record in records:
            record.pop("tokens_per_second", None)
            for key in [key for key in record.get("optimizer", ()) if key.partition("/")[0] in ("ms", "bytes", "gb_per_s")]:
                del record["optimizer"][key]
        return records

    def losses(self) -> list[float]:
        """Of training and validation, in the order they came."""
        return [record["train_loss_bits"] if "train_loss_bits" in record else record["val_bits_per_byte"] for record in self.metrics()]


class Runs:
    """Tiny runs over one text, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, str], Run] = {}
        generator = random.Random(0)
        words = ["".join(generator.choices("abcdefghij", k=5)) for _ in range(40)]
        for index in range(20):
            path = folder / "text" / f"{index:02}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(" ".join(generator.choices(words, k=300)))

    def of(self, sharding: str, attempt: str = "first", starter: list[str] = LAUNCH) -> Run:
        if (sharding, attempt) not in self._made:
            runs = self._folder / f"{sharding}-{attempt}"
            arguments = [f"configs/{sharding}.yaml", *TINY, f"data.path={self._folder / 'text'}", f"runs_folder={runs}"]
            finished = launch(*arguments, starter=starter)
            assert finished.returncode == 0, finished.stderr
            self._made[sharding, attempt] = Run(folder=runs / "latest", output=finished.stdout + finished.stderr)
        return self._made[sharding, attempt]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("launch"))


# -------------------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_leaves_a_folder_that_tells_all_about_it(runs):
    run = runs.of("fsdp2")
    assert run.folder.is_symlink()
    assert run.folder.resolve().name.endswith("-fsdp2")
    summary = run.summary()
    assert (summary["status"], summary["steps"]) == ("finished", STEPS)
    assert (summary["world_size"], summary["optimizer"], summary["sharding"]) == (2, "StableAdamW", "fsdp2")
    for key in ("val_bits_per_byte", "unigram_bits_per_byte", "zlib_bits_per_byte", "train_loss_bits", "seconds", "tokens_per_second"):
        assert 0.0 < summary[key] < math.inf, key
    assert summary["skipped_steps"] == 0
    assert summary["parameters"] == 2 * 256 * 32 + 2 * (12 * 32 * 32 + 2 * 32) + 32  # of the whole model, not of a shard
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert (written["steps"], written["optimizer"]["lr"], written["processes"]) == (STEPS, 0.01, 2)
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.timeout(300)
def test_a_job_goes_on_from_its_newest_checkpoint_as_if_it_had_not_ended(runs, tmp_path):
    """Also under another wrapper; and it refuses to write over what an earlier job has left."""
    whole = runs.of("fsdp2").losses()
    runs_folder = tmp_path / "runs"
    arguments = [*TINY, f"data.path={runs._folder / 'text'}", f"runs_folder={runs_folder}", "name=job"]
    saving = launch("configs/zero2.yaml", *arguments, "checkpoint.every=4", "checkpoint.keep=3")
    assert saving.returncode == 0, saving.stderr
    first = (runs_folder / "latest").resolve()
    folder = first / "checkpoints"
    assert so.checkpoint.steps(folder) == [4, 8, STEPS]
    with pytest.raises(ConfigError, match=f"run='{first.name}': .* exists already; use resume=auto to resume it, or another name"):
        find(load(ROOT / "configs/zero2.yaml", [*arguments, f"run={first.name}"]))
    shutil.rmtree(folder / "step-000000010")
    (first / "metrics.jsonl").write_text((first / "metrics.jsonl").read_text() + '{"step": 11, "train_lo')  # as when it was killed
    resumed = launch("configs/fsdp2.yaml", *arguments, "checkpoint.every=4", "resume=auto", "checkpoint.keep=1")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from the checkpoint" in resumed.stdout
    assert (runs_folder / "latest").resolve() == first
    assert Run(folder=first, output="").losses() == whole  # one curve
    assert so.checkpoint.steps(folder) == [STEPS]
    done = launch("configs/fsdp2.yaml", *arguments, "resume=auto", f"run={first.name}")
    assert done.returncode == 0  # an elastic launcher must not take it for a failure
    assert "steps=10 are done" in done.stdout


def test_metrics_have_every_step_and_a_living_rms_with_its_tensor(runs):
    training = [record for record in runs.of("fsdp2").metrics() if "train_loss_bits" in record]
    assert [record["step"] for record in training] == list(range(1, STEPS + 1))
    assert training[0]["train_loss_bits"] == pytest.approx(8.7, abs=0.3)  # knowing nothing of bytes is 8 bits, and random logits cost 0.7
    assert training[-1]["train_loss_bits"] < 7.0
    assert len({record["largest_rms"] for record in training}) == STEPS
    names = {name for name, _ in GPT(layers=2, heads=2, d_model=32, sequence_length=32).named_parameters()}
    assert {record["largest_rms_name"] for record in training} <= names


def test_validation_is_printed_next_to_what_it_is_compared_with(runs):
    run = runs.of("fsdp2")
    summary = run.summary()
    last = [record for record in run.metrics() if "val_bits_per_byte" in record][-1]
    assert last == {"step": STEPS, "val_bits_per_byte": summary["val_bits_per_byte"]}
    assert f"validation {last['val_bits_per_byte']:.3f} bits/byte  (unigram {summary['unigram_bits_per_byte']:.3f}" in run.output
    assert f"step 1/{STEPS}  loss {run.losses()[0]:.3f} bits/byte" in run.output


def test_losses_do_not_depend_on_the_number_of_ranks(runs):
    """Two ranks of half a batch each, and one of a whole: the same training. Only the order of sums over a batch differs."""
    assert runs.of("single").losses() == pytest.approx(runs.of("fsdp2").losses(), rel=1e-5)


@pytest.fixture(scope="module")
def deepspeed() -> None:
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; pip install 'deepspeed>=0.19,<0.20'")
    deepspeed_extension.build()


@pytest.mark.timeout(400)  # of which building takes up to 300
@pytest.mark.usefixtures("deepspeed")
def test_a_run_of_deepspeed_leaves_the_same_and_says_nothing_more(runs):
    run, other = runs.of("deepspeed"), runs.of("fsdp2")
    assert run.losses() == pytest.approx(other.losses(), rel=1e-5)
    assert [record.keys() for record in run.metrics()] == [record.keys() for record in other.metrics()]
    assert [record.get("lr") for record in run.metrics()] == [record.get("lr") for record in other.metrics()]
    assert [record.get("largest_rms_name") for record in run.metrics()] == [record.get("largest_rms_name") for record in other.metrics()]
    assert run.summary().keys() == other.summary().keys()
    assert run.summary()["parameters"] == other.summary()["parameters"]
    assert run.output.count("\n") == other.output.count("\n")
    written = yaml.safe_load((run.folder / "config.yaml").read_text())  # with what came from the JSON file
    assert (written["optimizer"]["name"], written["deepspeed"]["zero_optimization"]["stage"]) == ("StableAdamW", 2)


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("deepspeed")
def test_the_deepspeed_launcher_starts_the_job_too(runs):
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_accelerators", "2", "--master_port", port]
    run = runs.of("deepspeed", "launcher", starter=[*launcher, "--module", "launch.train"])
    assert run.losses() == pytest.approx(runs.of("fsdp2").losses(), rel=1e-5)
    assert run.summary()["world_size"] == 2


def test_the_same_config_twice_gives_the_same_metrics(runs):
    assert runs.of("fsdp2").metrics() == runs.of("fsdp2", "second").metrics()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["configs/fsdp2.yaml", "optimizer.rl=1e-3"], "optimizer.rl=0.001: there is no such key; did you mean optimizer.lr?"),
        (["configs/fsdp2.yaml", "data.path=/no/such/folder"], "data.path='/no/such/folder'"),
        (
            ["configs/fsdp2.yaml", "device=cuda", "processes=1000", "batch_size=1000"],
            "device='cuda' needs a GPU for each of the 1000 processes here, there are ",
        ),
    ],
)
def test_a_mistake_is_reported_once_and_nothing_starts(tmp_path, arguments, expected):
    finished = launch(*arguments, f"runs_folder={tmp_path}")
    assert finished.returncode == 2
    assert finished.stderr.count(expected) == 1
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.filterwarnings("ignore:weight_decay")
@pytest.mark.parametrize("name", ["StableAdamW", "Adam", "AdamW", "DecoupledAdamW", "DecoupledSGDW"])
@pytest.mark.parametrize("constructor", [None, so.ShardedOptimizer])
def test_every_optimizer_is_built_by_name_without_decay_of_gains(name, constructor):
    model = GPT(layers=1, heads=2, d_model=8, sequence_length=4)
    dimensions = {name: param.ndim for name, param in model.named_parameters()}
    config = OptimizerConfig(name=name, lr=1e-3, weight_decay=0.25)
    optimizer = build_optimizer(model.named_parameters(), config, dimensions, constructor)
    assert type(optimizer) is (constructor or getattr(so, name))
    assert name in repr(optimizer)
    matrices, gains = optimizer.param_groups
    assert (matrices["weight_decay"], gains["weight_decay"]) == (0.25, 0.0)
    assert all(param.ndim == 2 for param in matrices["params"])
    assert all(param.ndim == 1 for param in gains["params"])
    assert {*matrices["param_names"], *gains["param_names"]} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
def test_the_learning_rate_warms_up_to_its_peak_and_ends_at_zero(warmup_steps):
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=2.0)
    schedule = build_schedule(optimizer, warmup_steps, 50)
    used = []
    for _ in range(50):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert used[warmup_steps] == max(used) == pytest.approx(2.0)
    assert used[: warmup_steps + 1] == sorted(used[: warmup_steps + 1])
    assert used[warmup_steps:] == sorted(used[warmup_steps:], reverse=True)
    assert 0.0 < used[-1] < 0.01
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_the_largest_rms_is_named_and_nan_is_the_largest():
    assert largest_rms({"skipped_steps": 0.0}) == (None, None)
    assert largest_rms({"skipped_steps": 9.0, "rms/a": 0.5, "rms/b": 1.5}) == ("b", 1.5)
    name, value = largest_rms({"rms/a": 0.5, "rms/b": math.nan, "rms/c": 1.5})
    assert name == "b"
    assert value is not None
    assert math.isnan(value)


def test_what_goes_on_is_the_newest_run_of_a_name_that_has_saved_and_is_not_done(tmp_path, monkeypatch):
    """Or the one that is asked for. A launcher that starts ranks again means the run that they were at, done or not."""
    saved: dict[Path, int] = {}
    monkeypatch.setattr(so.checkpoint, "steps", lambda folder: [saved[folder.parent]] if folder.parent in saved else [])
    monkeypatch.setattr(so.checkpoint, "latest", lambda folder: saved[folder.parent])

    def config(*overrides: str) -> Config:
        return load(ROOT / "configs" / "fsdp2.yaml", [f"runs_folder={tmp_path}", *overrides])

    assert find_run(config("resume=auto"), is_restart=False) == (None, None)
    paths = [RunFolder(config("name=other")).path, *(RunFolder(config()).path for _ in range(3))]
    for age, path in enumerate(reversed(paths)):
        os.utime(path / "config.yaml", (1e9 - age, 1e9 - age))
    saved |= {paths[0]: 5, paths[1]: 3, paths[2]: 7}  # the newest has not come so far
    assert find_run(config(), is_restart=False) == (None, None)
    assert find_run(config("resume=auto"), is_restart=False) == (None, None)  # the newest of its name has saved nothing
    saved[paths[3]] = 9
    assert find_run(config("resume=auto"), is_restart=False) == (paths[3], None)
    assert find_run(config("resume=auto", "name=other"), is_restart=False) == (paths[0], None)
    assert find_run(config("resume=auto", f"run={paths[1].name}"), is_restart=False) == (paths[1], None)
    del saved[paths[2]]  # a run that is named is continued though it has saved nothing, as when a rank failed before the first checkpoint
    assert find_run(config("resume=auto", f"run={paths[2].name}"), is_restart=True) == (paths[2], None)
    assert find_run(config("resume=auto", "steps=9"), is_restart=False) == (None, None)
    for path, told in (
        find_run(config("resume=auto", "steps=9"), is_restart=True),
        find_run(config("resume=auto", "steps=9", f"run={paths[3].name}"), is_restart=False),
    ):
        assert path == paths[3]
        assert told is not None
        assert told.startswith("steps=9 are done")


def test_a_run_that_is_killed_has_left_its_curve_and_summary(tmp_path, runs):
    """All its processes at once, so that nobody can write anything any more."""
    job = [f"data.path={runs._folder / 'text'}", f"runs_folder={tmp_path}", "run=killed"]
    command = [*LAUNCH, "configs/single.yaml", *TINY, *job, "steps=100000", "validation_every=5"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    folder = tmp_path / "killed"
    until = time.monotonic() + TIMEOUT
    while not (folder / "loss.png").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "running or interrupted"
    assert 0 < summary["steps"] < 100_000
    assert summary["train_loss_bits"] > 0.0
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path):
    config = load(ROOT / "configs" / "fsdp2.yaml", [f"runs_folder={tmp_path}"])
    folders = [RunFolder(config).path for _ in range(3)]
    assert len(set(folders)) == 3
    assert (tmp_path / "latest").resolve() == folders[-1].resolve()
    assert not (tmp_path / "latest").readlink().is_absolute()  # the folder can be moved
