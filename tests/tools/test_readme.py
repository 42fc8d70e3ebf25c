"""What the README shows works as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import sharded_optim as so

README = Path(__file__).parents[2] / "README.md"


def test_the_examples_run_on_two_ranks(tmp_path: Path) -> None:
    """The first as it stands, printing a line for each step; then the one of checkpoints, with the schedule that it speaks of."""
    example, checkpoints = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    script = tmp_path / "example.py"
    schedule = "schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)"
    end = "import gc; del model, optimizer; gc.collect(); dist.destroy_process_group()"  # see launch/process_group.py
    script.write_text(f"{example}\n{schedule}\n{checkpoints}\nassert extra == schedule.state_dict()\n{end}\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    printed = re.findall(r"^step (\d+)  loss (\d+\.\d+)  largest rms of an update (\d+\.\d+)$", result.stdout, re.MULTILINE)
    assert [int(step) for step, _, _ in printed] == list(range(10))
    assert float(printed[-1][1]) < float(printed[0][1]), "it trains"
    assert all(float(rms) > 0 for _, _, rms in printed)
    assert so.checkpoint.steps(tmp_path / "checkpoints") == [9]


def test_every_command_of_the_readme_is_tried() -> None:
    """By `make wheel` (pip install), by the test above (torchrun), or here: make knows how to make its targets."""
    commands = re.findall(r"^(pip|make) ([^#\n]*)", README.read_text(), re.MULTILINE)
    targets = [rest.strip() for program, rest in commands if program == "make"]
    assert {"train", "test", "help"} <= set(targets)
    assert [rest.strip() for program, rest in commands if program == "pip"] == ["install .", "install '.[cpu]'"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=README.parent, capture_output=True, check=True, timeout=60)
    shown = subprocess.run(["make", "help"], cwd=README.parent, capture_output=True, text=True, check=True, timeout=60).stdout
    assert all(re.search(rf"^{target} ", shown, re.MULTILINE) for target in ("train", "test", "wheel"))


def test_every_extra_that_is_to_be_installed_exists() -> None:
    root = README.parent
    pages = [root / "README.md", *(root / "docs").glob("*.md")]
    named = {extra for page in pages for group in re.findall(r"'\.\[([\w,]+)\]'", page.read_text()) for extra in group.split(",")}
    extras = re.findall(r"^(\w+) = \[", (root / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1], re.MULTILINE)
    assert {"cpu", "cli"} <= named
    assert named <= set(extras)


def test_the_citation_is_of_this_version_and_the_license_that_of_the_package() -> None:
    citation = (README.parent / "CITATION.cff").read_text()
    assert f"\nversion: {so.__version__}\n" in citation
    assert "\nlicense: Apache-2.0\n" in citation
    assert '\nlicense = "Apache-2.0"\n' in (README.parent / "pyproject.toml").read_text()
    assert "Apache License\n" in (README.parent / "LICENSE").read_text()


def test_every_file_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README.read_text())
    assert links
    missing = [link for link in links if not (README.parent / link).exists()]
    assert not missing
