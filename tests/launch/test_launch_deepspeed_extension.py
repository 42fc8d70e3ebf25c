"""What DeepSpeed compiles is built before ranks start, and nothing waits for it without end."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from launch import __main__ as launch_main
from launch import deepspeed_extension
from launch.deepspeed_extension import build
from launch.errors import ConfigError

ROOT = Path(__file__).parents[2]
NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed; pip install 'deepspeed>=0.19,<0.20'"
)
# As a killed build leaves it, or as another's that goes on.
TAKE_LOCK = """
import os, time
from pathlib import Path
folder = Path(os.environ["TORCH_EXTENSIONS_DIR"], "deepspeed_shm_comm")
folder.mkdir(parents=True)
(folder / "lock").touch()
try:
    (folder / "started").touch()
    time.sleep(60.0)
finally:
    (folder / "lock").unlink()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the extension, and empty."""
    for name in ("DS_ACCELERATOR", "PATH"):  # so that the test's end restores them
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path / "deepspeed_shm_comm"


def refuse_to_start(*args: object, **kwargs: object) -> None:
    raise AssertionError("a process was started")


def test_without_deepspeed_a_job_is_refused_before_any_process_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deepspeed_extension, "find_spec", lambda name: None)
    monkeypatch.setattr("os.execv", refuse_to_start)
    monkeypatch.setattr("subprocess.Popen", refuse_to_start)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        launch_main.main(["configs/deepspeed.yaml", f"runs_folder={tmp_path}"])
    assert caught.value.code == 2
    assert "error: sharding='deepspeed' needs DeepSpeed" in (error := capsys.readouterr().err)
    assert "pip install 'deepspeed>=0.19,<0.20'" in error


@NEEDS_DEEPSPEED
def test_a_lock_that_was_left_behind_is_named_after_a_time_and_not_removed(folder):
    folder.mkdir()
    (folder / "deepspeed_shm_comm.so").touch()  # as after an earlier build
    (folder / "lock").touch()
    with pytest.raises(ConfigError, match=rf"not compiled within 4 s; if nothing else is compiling it, remove {folder}/lock"):
        build(timeout=4.0)
    assert (folder / "lock").exists()


@NEEDS_DEEPSPEED
def test_a_build_that_takes_too_long_is_interrupted_and_leaves_no_lock(folder, monkeypatch):
    monkeypatch.setattr(deepspeed_extension, "START", TAKE_LOCK)
    with pytest.raises(ConfigError, match="not compiled within 5 s; start again"):
        build(timeout=5.0)
    assert (folder / "started").exists()
    assert not (folder / "lock").exists()


@NEEDS_DEEPSPEED
@pytest.mark.usefixtures("folder")
def test_a_build_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(deepspeed_extension, "START", "raise SystemExit('there is no g++')")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler and ninja:\nthere is no g\+\+"):
        build()


@NEEDS_DEEPSPEED
def test_nothing_is_built_for_a_gpu_or_twice(folder, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", refuse_to_start)
    build("cuda")
    assert os.environ["DS_ACCELERATOR"] == "cuda"
    monkeypatch.delenv("DS_ACCELERATOR")
    folder.mkdir()
    (folder / "deepspeed_shm_comm.so").touch()
    build()
    assert os.environ["DS_ACCELERATOR"] == "cpu"
