"""`make gpu-check` as far as a machine without a GPU can try it: its tests are sound, and it tells what became of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.gpu import __main__ as check
from tests.gpu.__main__ import Outcome, Stage, main, run_all, verdict_of

# Tests of a few seconds; the whole rehearsal takes minutes.
QUICK = "round_alike or (replays_give and AdamW-fp32-plain and not Stable)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("there is no GPU that torch can use; ")


def test_a_rehearsal_runs_the_tests_of_a_gpu_and_tells_of_each_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--rehearse", "kernels", "graphs", "-k", QUICK, "--output", str(tmp_path / "results")])
    output = capsys.readouterr().out
    assert status == 0, output
    content = json.loads((tmp_path / "results.json").read_text())
    passed = {stage["stage"]: stage["passed"] for stage in content["stages"]}
    assert passed.pop("kernels") > 0
    assert passed == {"graphs": 1}
    assert content["machine"]["torch"] == torch.__version__
    page = (tmp_path / "results.md").read_text()
    assert page.rstrip().splitlines()[-1].startswith("All is as it should be")
    for text in (page, output):
        assert "| graphs | 1 | 0 | 0 |" in text


def test_a_stage_that_does_not_end_is_ended_and_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rehearse", "graphs", "--seconds", "1.2", "--output", str(tmp_path / "results")]) == 1
    assert "ended after 1 s, its time" in capsys.readouterr().out
    assert "Something is wrong" in (tmp_path / "results.md").read_text()


def test_a_stage_that_does_not_exist_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rehearse", "kernel graphs"])
    assert "no stage is called 'kernel graphs'; there are kernels, optimizers, " in capsys.readouterr().err


def test_what_did_not_run_is_in_the_verdict() -> None:
    graphs = Outcome(stage="graphs", proves="", passed=3)
    job = Outcome(stage="training job", proves="", skipped={"the training job needs pydantic, which is not installed": 6})
    assert verdict_of([graphs], 7.0) == "All is as it should be, after 7 s."
    assert verdict_of([graphs, job], 7.0) == (
        "All that ran is as it should be, after 7 s. Not proven here, or not all of it: "
        "training job (the training job needs pydantic, which is not installed)."
    )
    assert verdict_of([job], 7.0) == "Something is wrong, after 7 s."


def test_what_goes_wrong_in_one_stage_loses_nothing_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that was torn as its process was ended, and an error of the check itself."""
    stages = [Stage(name=name, file=f"{name}.py", proves="", seconds=1.0) for name in ("torn", "broken")]
    record = tmp_path / "record"
    record.write_text('{"test": "one", "outcome": "passed", "seconds": 0.1}\n{"test": "two", "outc')

    def run(stage: Stage, *arguments: object, rehearse: bool) -> Outcome:
        if stage.name == "broken":
            raise OSError("no space left")
        return check._read(stage, record)

    monkeypatch.setattr(check, "run", run)
    torn, broken = run_all(stages, 60.0, (), rehearse=True)
    assert (torn.passed, torn.is_right) == (1, True)
    assert (broken.problem, broken.is_right) == ("OSError: no space left", False)
