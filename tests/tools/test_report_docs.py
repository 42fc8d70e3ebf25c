"""What docs/report.md shows works as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from launch.config import from_arguments
from sharded_optim.cli.commands import app
from sharded_optim.tools.report.sections import sections_of
from sharded_optim.tools.report.sections.spikes import RUNNING_LOSSES
from sharded_optim.tools.runs import read_run
from sharded_optim.tools.spikes import LOSS_DEVIATIONS, RMS_THRESHOLD
from tests.run_folders import write_run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
TRAINING_JOB = (ROOT / "docs" / "training-job.md").read_text(encoding="utf-8")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the runs that the page names, which is the current one."""
    for name in ("a", "b", "example"):
        write_run(tmp_path / "runs" / name, steps=50)
    (tmp_path / "runs" / "latest").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_page_and_of_the_training_jobs_runs(runs: Path) -> None:
    commands = re.findall(r"^(?:\$ )?(sharded-optim [^\n]*)", PAGE + TRAINING_JOB, re.MULTILINE)
    commands += re.findall(r"`(sharded-optim [a-z]+ runs[^`]*)`", PAGE)
    assert len(commands) == 8
    for command in dict.fromkeys(" ".join(shlex.split(command, comments=True)) for command in commands):
        result = CliRunner().invoke(app, command.split()[1:])
        assert result.exit_code == 0, (command, result.output)
    assert {"runs/a/report.html", "compare.html", "pictures/rms_example.png"} <= {str(path.relative_to(runs)) for path in runs.rglob("*")}


def test_the_python_of_the_page_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out.startswith("finished ")


def test_the_job_of_the_picture_is_one_that_the_job_takes() -> None:
    ((config, arguments),) = re.findall(r'`make train CONFIG=(\S+) ARGS="([^"]*)"`', PAGE)
    found = from_arguments([str(ROOT / config), *arguments.split()], "make train")
    assert (found.run, found.steps, found.log_every) == ("example", 120, 1)
    picture = ROOT / "docs" / "report.png"
    assert picture.stat().st_size < 200_000
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_the_frame_of_the_page_has_the_lines_of_a_frame(runs: Path) -> None:
    ((shown),) = re.findall(r"\$ sharded-optim watch runs/example --once\n(.*?)```", PAGE, re.DOTALL)
    printed = CliRunner().invoke(app, ["watch", "runs/example", "--once"]).stdout

    def names(text: str) -> list[str]:
        return re.findall(r"^(\w[\w/ ]*?)  ", text, re.MULTILINE)

    assert names(shown) == names(printed)


def test_the_page_names_every_section_and_the_definition_of_spikes(runs: Path) -> None:
    run = read_run(runs / "runs" / "a")
    for section in sections_of({"a": run}):
        assert section.title in PAGE, section.title
    assert f"an RMS of {RMS_THRESHOLD}\nor more; a loss more than {LOSS_DEVIATIONS} running deviations" in PAGE
    assert f"over {RUNNING_LOSSES} records" in PAGE
