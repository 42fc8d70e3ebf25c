"""The training job picks the GPU by itself, learns, and gives the same losses however it is wrapped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gpu.device import DEVICE, REHEARSAL, environment
from sharded_optim.checkpoint.store import folder_of

MISSING = [package for package in ("pydantic", "yaml", "rich", "matplotlib") if find_spec(package) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the training job needs {', '.join(MISSING)}, which is not installed")

ROOT = Path(__file__).parents[2]
STEPS = 12 if REHEARSAL else 60
ARGUMENTS = [
    *(f"steps={STEPS}", "warmup_steps=4", "batch_size=4", "sequence_length=64", "log_every=2", f"validation_every={STEPS}"),
    *("validation_batches=1", "processes=1", "model.layers=2", "model.heads=2", "model.d_model=64", "optimizer.lr=1e-2"),
]
TIMEOUT = 110.0
CONFIGS = ("single", "fsdp2", "ddp", "zero2", "fsdp1")


def job(folder: Path, config: str, *arguments: str, **variables: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and metrics of a run, with further variables of its environment."""
    command = [sys.executable, "-m", "launch", f"configs/{config}.yaml", *ARGUMENTS, f"runs_folder={folder}", *arguments]
    told = environment(ROOT) | variables
    done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    runs = sorted(folder.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    metrics = [json.loads(line) for line in (runs[-1].parent / "metrics.jsonl").read_text().splitlines()]
    return json.loads(runs[-1].read_text()), [each for each in metrics if "train_loss_bits" in each]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something to train on that is everywhere: this repository's sources."""
    folder = tmp_path_factory.mktemp("text")
    for number, path in enumerate(sorted((ROOT / "sharded_optim").rglob("*.py"))):
        (folder / f"{number:03}.txt").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


@cache
def losses(folder: Path, text: Path, config: str) -> tuple[float, ...]:
    kernels = folder / "kernels"
    summary, metrics = job(folder, config, f"data.path={text}", TRITON_CACHE_DIR=str(kernels))
    assert summary["device"] == DEVICE.type
    assert REHEARSAL or any(kernels.rglob("update_*")), "Triton has compiled no kernel that steps: another backend has stepped"
    assert summary["skipped_steps"] == 0
    return tuple(each["train_loss_bits"] for each in metrics)


@pytest.mark.parametrize("config", CONFIGS[:2] if REHEARSAL else CONFIGS)
def test_the_loss_falls(config: str, text: Path, tmp_path: Path) -> None:
    found = losses(tmp_path, text, config)
    assert all(loss == loss and loss < 9.0 for loss in found)
    assert found[-1] < found[0] - (0.1 if REHEARSAL else 1.0), found


def test_a_run_that_is_saved_and_resumed_gives_the_losses_of_one_that_is_not(text: Path, tmp_path: Path) -> None:
    """On the GPU too the same config gives the same losses, bit for bit."""
    middle = STEPS // 2
    arguments = (f"data.path={text}", f"checkpoint.every={middle}", "run=saved", "resume=auto")
    _, straight = job(tmp_path / "one", "single", f"data.path={text}")
    job(tmp_path / "two", "single", *arguments)
    shutil.rmtree(tmp_path / "two" / "saved" / "checkpoints" / folder_of(STEPS))  # as if it had not come further
    _, resumed = job(tmp_path / "two", "single", *arguments)
    assert [(each["step"], each["train_loss_bits"]) for each in resumed] == [(each["step"], each["train_loss_bits"]) for each in straight]
