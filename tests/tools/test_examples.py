"""The recipes of examples/ fail where they should. `make recipes`, which has the frameworks, runs all; here one runs, which needs torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
BROKEN = """
import sys
sys.path.insert(0, {examples!r})
import common, pytorch_ddp, torch

def train(folder, stop):
    {fault}
    return pytorch_ddp.train(folder, stop)

if __name__ == "__main__":
    common.main(train)
"""
WRONG_RATE = "common.LR = 1.1e-2"
LOST_MOMENTS = """path = folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path)
        for state in saved["optimizer"]["state"].values():
            state["exp_avg"].zero_()
        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()  # both have read it
        torch.save(saved, path) if torch.distributed.get_rank() == 0 else None
        torch.distributed.barrier()"""


@pytest.mark.parametrize(("fault", "found"), [(WRONG_RATE, "losses: differ by"), (LOST_MOMENTS, "resume: differ by")])
def test_a_recipe_that_differs_fails(fault: str, found: str, tmp_path: Path) -> None:
    """Ranks that train with another learning rate, and first moments that a checkpoint has lost."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(examples=str(EXAMPLES), fault=fault))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert found in done.stdout
    assert ("losses: bitwise; parameters: bitwise" in done.stdout) == (fault is LOST_MOMENTS)


def test_the_runner_prints_what_a_recipe_found(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "run.py", "pytorch_ddp"], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| bitwise | bitwise | bitwise |" in done.stdout
    assert "1 of 1 recipes passed" in done.stdout


def test_a_framework_that_is_missing_is_reported(tmp_path: Path) -> None:
    """With pip's reason where there is one; else it is a failure."""
    names = ("examples/run.py", "examples/install.py")
    (tmp_path / "examples").mkdir()
    for name in names:
        (tmp_path / name).write_text((EXAMPLES.parent / name).read_text())
    script = tmp_path / "examples/run.py"
    reasons = tmp_path / "not_installed"
    reasons.mkdir()
    text = script.read_text().replace('("ray",)', '("no-such-framework",)')
    script.write_text(text.replace("from install import REASONS, ROOT", f"from install import ROOT\nREASONS = Path({str(reasons)!r})"))
    done = subprocess.run([sys.executable, script, "ray_train_ddp"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "not installed: no-such-framework is missing" in done.stdout
    (reasons / "no-such-framework.txt").write_text("it needs torch<2.7")
    done = subprocess.run([sys.executable, script, "ray_train_ddp"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "not installed: it needs torch<2.7" in done.stdout
    assert "0 of 1 recipes passed" in done.stdout


def test_every_recipe_is_run_and_listed() -> None:
    """By run.py, in examples/README.md and, with its own versions, in docs/trainers.md."""
    recipes = {path.stem for path in EXAMPLES.glob("*.py")} - {"common", "install", "run"}
    runner = (EXAMPLES / "run.py").read_text()
    page = (EXAMPLES / "README.md").read_text()
    trainers = (EXAMPLES.parent / "docs/trainers.md").read_text()
    for recipe in recipes:
        assert f'"{recipe}": (' in runner
        assert f"[{recipe}]({recipe}.py)" in page
        assert f"[{recipe}](../examples/{recipe}.py)" in trainers
    for line in (EXAMPLES / "requirements.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if version and name not in ("mpich", "mpi4py"):
            assert f"{name.partition('[')[0]} {version}" in trainers, line
