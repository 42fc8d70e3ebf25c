"""`sharded-optim checkpoint`: the output and exit status of each command."""

from __future__ import annotations

import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from typer.testing import CliRunner

import sharded_optim as so
from sharded_optim import checkpoint
from sharded_optim.cli.commands import app


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])


def printed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def rows_of(output: str) -> list[list[str]]:
    """The cells of all lines of tables."""
    return [re.split(r" {2,}", line.strip()) for line in output.splitlines() if line.startswith(" ") and line.strip("- ─")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints of steps 3, 5 and 12."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).bfloat16()
    named = [{"params": list(model[0].named_parameters("0")), "weight_decay": 0.1}, {"params": list(model[2].named_parameters("2"))}]
    optimizer = so.StableAdamW(named, lr=1e-2)
    for step in (3, 5, 12):
        model(torch.randn(4, 3).bfloat16()).float().square().sum().backward()
        optimizer.step()
        extra = {"scheduler": {"last_epoch": step}, "note": "[bold]" + "x" * 200}
        checkpoint.save(tmp_path / "run", step, model=model, optimizer=optimizer, extra=extra)
    return tmp_path / "run"


def damage(root: Path, step: int, pattern: str) -> Path:
    (path,) = (root / f"step-{step:09d}").glob(pattern)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    return path


# ------------------------------------------------------------------------------------------------------------------------ ls


def test_ls_lists_checkpoints_from_their_manifests(root: Path) -> None:
    heading, *rows = rows_of(printed("ls", root))
    assert heading == ["step", "size", "tensors", "files", "ranks", "optimizer", "state"]
    manifest = checkpoint.describe(root, 3)
    size = f"{manifest.size / 1000:.2f} kB"
    assert rows == [[step, size, str(len(manifest.tensors)), "1", "1", "StableAdamW", "committed"] for step in ("3", "5", "12")]


def test_ls_marks_damaged_uncommitted_and_newer_checkpoints(root: Path) -> None:
    damage(root, 3, "manifest.json")
    (root / "step-000000005" / "COMMITTED").unlink()
    checkpoint.save(root, 20, model=nn.Linear(2, 2))
    (root / "notes").mkdir()
    rows = rows_of(printed("ls", root))[1:]
    assert [(row[0], row[-1]) for row in rows] == [
        ("3", "damaged manifest"),
        ("5", "not committed"),
        ("12", "committed"),
        ("20", "committed"),
    ]
    assert rows[-1][-2] == "-"


# ------------------------------------------------------------------------------------------------------------------------ show


def test_show_prints_tensors_hyperparameters_steps_and_extra(root: Path) -> None:
    output = printed("show", root)
    assert output.startswith(f"{root}/step-000000012: ")
    assert "in 1 file, saved on 1 rank by sharded_optim" in output.splitlines()[0]
    rows = rows_of(output)
    assert ["model", "0.weight", "5x3", "bfloat16", "30 B", "1"] in rows
    assert ["model", "1.num_batches_tracked", "()", "int64", "8 B", "1"] in rows
    assert ["exp_avg_sq", "2.bias", "2", "float32", "8 B", "1"] in rows
    assert ["kahan_comp", "2.weight", "2x5", "bfloat16", "20 B", "1"] in rows
    assert "total: exp_avg 128 B, exp_avg_sq 128 B, kahan_comp 64 B, model 112 B" in output
    assert ["StableAdamW", "param group 0", "param group 1"] in rows
    assert ["weight_decay", "0.1", "0.01"] in rows
    assert ["betas", "(0.9, 0.99)", "(0.9, 0.99)"] in rows
    assert "steps taken: 3 (4 parameters)\n" in output
    assert "extra['scheduler']: {'last_epoch': 12}" in output
    assert "extra['note']: '[bold]xxx" in output
    assert "(208 characters)" in output
    assert "shard-" not in output


def test_show_prints_the_location_of_each_chunk(root: Path) -> None:
    rows = rows_of(printed("show", root, "--step", "5", "--extents"))
    manifest = checkpoint.describe(root, 5)
    for entry in manifest.tensors.values():
        (chunk,) = entry.chunks
        numel = torch.Size(entry.shape).numel()
        expected = [entry.key, f"[0, {numel})", f"{entry.size} B", chunk.file, f"[{chunk.offset}, {chunk.offset + chunk.size})"]
        assert expected in rows


def test_show_does_without_an_optimizer_and_without_extra(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "run", 0, model=nn.Linear(2, 2))
    output = printed("show", tmp_path / "run")
    assert "param group" not in output
    assert "extra" not in output


# -------------------------------------------------------------------------------------------------------------- verify and prune


def test_verify_says_which_step_it_has_verified(root: Path) -> None:
    assert printed("verify", root).startswith("step 12: verified, ")
    assert printed("verify", root, "--step", "3").startswith("step 3: verified, ")
    assert [line.split(":")[0] for line in printed("verify", root, "--all").splitlines()] == ["step 3", "step 5", "step 12"]


@pytest.mark.parametrize("pattern", ["*.safetensors", "manifest.json", "COMMITTED"])
def test_verify_names_what_is_damaged_and_exits_with_1(pattern: str, root: Path) -> None:
    path = damage(root, 5, pattern)
    result = run("verify", root, "--all")
    assert result.exit_code == 1
    assert re.search(
        r"step 3: verified.*\nstep 5: DAMAGED\n  .*" + re.escape(path.name) + r".*\n(?:  .*\n)*step 12: verified", result.stdout
    )
    assert run("verify", root, "--step", "5").exit_code == 1
    shutil.rmtree(root / "step-000000012")
    result = run("verify", root)
    assert (result.exit_code, result.stdout.splitlines()[0]) == (1, "step 5: DAMAGED")
    shutil.rmtree(root / "step-000000005")
    assert run("verify", root).exit_code == 0


def test_prune_keeps_the_newest_that_verify(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("sharded_optim.checkpoint.integrity"), "_known", {})  # as in a process of its own
    damage(root, 12, "*.safetensors")
    result = run("prune", root, "--keep", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout == "removed 3; remaining 5, 12\n"
    assert "warning: " in result.stderr
    assert checkpoint.steps(root) == [5, 12]


# ------------------------------------------------------------------------------------------------------------ export and import


def test_export_and_import_go_there_and_back(root: Path, tmp_path: Path) -> None:
    """A torch file holds all that a checkpoint does."""
    assert printed("export", root, tmp_path / "all.pt", "--format", "torch", "--step", "5") == f"{tmp_path}/all.pt\n"
    assert printed("import", tmp_path / "all.pt", tmp_path / "back", "--step", "7", "--unpickle", "--optimizer", "StableAdamW") == (
        "step 7: 21 tensors, StableAdamW\n"
    )
    before, after = checkpoint.describe(root, 5), checkpoint.describe(tmp_path / "back", 7)
    assert {key: [chunk.sha256 for chunk in entry.chunks] for key, entry in after.tensors.items()} == {
        key: [chunk.sha256 for chunk in entry.chunks] for key, entry in before.tensors.items()
    }
    assert after.parameters == before.parameters
    assert after.extra == {"extra": before.extra, "step": 5}


def test_names_of_parameters_are_read_from_a_file(root: Path, tmp_path: Path) -> None:
    printed("export", root, tmp_path / "all.pt", "--format", "torch")
    content = torch.load(tmp_path / "all.pt", weights_only=True)
    names = [name for group in content["optimizer"]["param_groups"] for name in group.pop("param_names")]
    torch.save(content, tmp_path / "nameless.pt")
    result = run("import", tmp_path / "nameless.pt", tmp_path / "back", "--step", "1", "--unpickle")
    assert (result.exit_code, "2 param groups without names; give the names" in result.stderr) == (2, True)
    (tmp_path / "names").write_text("\n".join(names))
    printed("import", tmp_path / "nameless.pt", tmp_path / "back", "--step", "1", "--unpickle", "--names", tmp_path / "names")
    assert checkpoint.describe(tmp_path / "back").parameters.group_of == checkpoint.describe(root).parameters.group_of


def test_export_writes_a_folder_of_safetensors(root: Path, tmp_path: Path) -> None:
    assert printed("export", root, tmp_path / "model") == f"{tmp_path}/model/model.safetensors\n"
    assert len(safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")) == 9


# ----------------------------------------------------------------------------------------------------------------- wrong commands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "{none}"], "error: there is no checkpoint in "),
        (["show", "{none}"], "error: there is no checkpoint in "),
        (["show", "{root}", "--step", "4"], "error: there is no checkpoint of step 4 in {root}; there are [3, 5, 12]"),
        (["verify", "{none}"], "error: there is no checkpoint in "),
        (["verify", "{none}", "--all"], "error: there is no checkpoint in "),
        (["verify", "{root}", "--all", "--step", "3"], "error: --all and --step contradict each other"),
        (["verify", "{root}", "--step", "4"], "error: there is no checkpoint of step 4"),
        (["prune", "{root}", "--keep", "0"], "error: keep must be a whole number >= 1, got 0"),
        (["prune", "{root}"], "--keep"),
        (["export", "{root}", "{none}/out", "--format", "zip"], "error: --format is one of safetensors, torch, got 'zip'"),
        (["export", "{root}", "{root}"], "an export overwrites nothing"),
        (["export", "{none}", "{none}/out"], "error: there is no checkpoint in "),
        (["import", "{none}", "{root}", "--step", "20", "--unpickle"], "does not exist; give a folder of DCP or DeepSpeed"),
        (["import", "{root}", "{root}", "--step", "20", "--unpickle"], "has no .metadata as of DCP"),
        (["import", "{root}", "{root}", "--step", "20", "--format", "zip"], "error: the format is auto, or one of dcp, deepspeed"),
        (["import", "{root}", "{root}"], "--step"),
    ],
)
def test_a_wrong_command_says_why_and_exits_with_2(arguments: list[str], message: str, root: Path, tmp_path: Path) -> None:
    places = {"root": str(root), "none": str(tmp_path / "none")}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message.format(**places) in result.stderr
    assert "Traceback" not in result.output
    assert checkpoint.steps(root) == [3, 5, 12]


def test_a_damaged_manifest_ends_show_and_export_with_1(root: Path, tmp_path: Path) -> None:
    damage(root, 12, "manifest.json")
    for arguments in (["show", root], ["export", root, tmp_path / "out"]):
        result = run(*arguments)
        assert result.exit_code == 1
        assert "error: " in result.stderr
        assert "manifest.json is not the one that was committed" in result.stderr
