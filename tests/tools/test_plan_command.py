"""The command `sharded-optim plan`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sharded_optim import cli
from sharded_optim.cli.commands import app
from sharded_optim.tools.plan import Setup, compare, plan
from sharded_optim.tools.shapes import from_module, load

GPT2 = from_module("benchmarks.gpt2:GPT2Model")


def run_plan(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.fixture
def gpt2(tmp_path: Path) -> str:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(GPT2.shapes))
    return str(path)


def test_the_command_compares_all_shardings(gpt2: str) -> None:
    result = run_plan(gpt2, "--world-size", "64", "--shard-size", "8")
    assert result.exit_code == 0, result.output
    assert "124,439,808 parameters in 148 tensors" in result.output
    rows = {line[:15].strip(): line[15:].split() for line in result.output.splitlines()[5:-3]}
    assert list(rows) == [each.name for each in compare(load(gpt2), Setup(world_size=64, shard_size=8))]
    assert rows["ddp"] == ["0.464", "0.464", "0.927", "0.000", "0.464", "2.318", "0.913"]
    assert "ms" not in result.output


def test_the_command_tells_one_sharding_in_detail(gpt2: str) -> None:
    result = run_plan(gpt2, "-n", "64", "--sharding", "zero2", "--optimizer", "stableadamw", "--link", "50", "--memory-bandwidth", "3000")
    assert result.exit_code == 0, result.output
    for expected in ("StableAdamW", "reduce-scatter", "which tensors have a gradient", "statistics", "step, one after the other"):
        assert expected in result.output


def test_the_command_prints_json(gpt2: str) -> None:
    result = run_plan(gpt2, "-n", "64", "--sharding", "fsdp2", "--json", "--link", "50", "--tokens", "1024", "--tflops", "100")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    (printed,) = data["plans"]
    expected = plan(load(gpt2), "fsdp2", Setup(world_size=64))
    assert data["parameters"] == 124_439_808
    assert printed["memory"]["total"] == expected.memory.total
    assert printed["sent"] == expected.sent == sum(each["sent"] for each in printed["collectives"])
    assert printed["seconds"]["communication"] == pytest.approx(expected.sent / 50e9)
    assert printed["seconds"]["compute"] == pytest.approx(6 * 124_439_808 * 1024 / 100e12)


def test_the_command_profiles_a_module() -> None:
    arguments = ("-n", "8", "--sharding", "fsdp2", "--tokens", "64", "--sequence-length", "32", "--mfu", "40", "--peak-tflops", "100")
    result = run_plan("llama:Llama", *arguments, "--checkpointing", "full", "--activations", "profile")
    assert result.exit_code == 0, result.output
    assert "activations   of forward and backward, at most" in result.output
    assert "step, at 40.0% MFU" in result.output
    assert "unknown" not in result.output
    (printed,) = json.loads(run_plan("llama:Llama", *arguments, "--json").stdout)["plans"]
    assert printed["seconds"]["longest"] == printed["seconds"]["whole"]


def test_the_command_tells_what_is_unknown(gpt2: str) -> None:
    result = run_plan(gpt2, "-n", "8", "--tokens", "1024", "--tflops", "100", "--sharding", "ddp", "--sequence-length", "1024")
    assert result.exit_code == 0, result.output
    lines = [line.split(":")[1].strip() for line in result.output.splitlines() if line.startswith("unknown: ")]
    assert lines == ["attention", "embeddings", "activations"]
    assert "of what is known" in result.output
    known = run_plan(gpt2, "-n", "8", "--attention", "12x12x64", "--sequence-length", "1024", "--activations", "1.5", "--json")
    data = json.loads(known.stdout)
    assert data["workload"]["attention"] == 12 * 12 * 12 * 64 * 1024
    assert {each["memory"]["activations"] for each in data["plans"]} == {3 * 2**29}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json", "-n", "2"], "error: 'nowhere.json' is not a file; give"),
        (["{gpt2}", "-n", "8", "--sharding", "zero9"], "error: sharding is one of none, ddp"),
        (["{gpt2}", "-n", "8", "--shard-size", "3"], "error: a shard size divides the world size"),
        (["{gpt2}", "-n", "8", "--link", "0"], "error: a rate is a finite number > 0, got 0.0 for link"),
        (["{gpt2}", "-n", "8", "--tflops", "10"], "needs tokens and FLOP/s"),
        (
            ["{gpt2}", "-n", "8", "--mfu", "50", "--peak-tflops", "312", "--tokens", "8"],
            "MFU counts the operations of attention, which are unknown",
        ),
        (["{gpt2}", "-n", "8", "--attention", "12x12"], "as 32x32x128, got '12x12'"),
        (["{gpt2}", "-n", "8", "--activations", "some"], "a number of GiB, or profile, got 'some'"),
        (["{gpt2}", "-n", "8", "--sharding", "ddp", "--reduce-dtype", "bf16"], "a dtype of the reduction is for zero3, fsdp2, hsdp"),
        (["{gpt2}"], "--world-size"),
    ],
)
def test_a_wrong_command_says_why_and_exits_with_2(arguments: list[str], message: str, gpt2: str) -> None:
    result = run_plan(*(argument.format(gpt2=gpt2) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """What the process exits with."""
    monkeypatch.setattr(sys, "argv", ["sharded-optim", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


def test_modules_in_the_current_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_of_test_plan.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(3, 5)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert run_main(monkeypatch, "plan", "model_of_test_plan:build", "-n", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 20


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_typer_or_rich_the_command_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("sharded_optim.cli") or name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    message = f"the command line needs {missing}, which is not installed; pip install rich typer"
    assert run_main(monkeypatch, "plan") == message
