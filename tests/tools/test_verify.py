"""so.verify finds planted faults, and finds none in this library's optimizers under any sharding."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import verify_faults
from deepspeed_models import NEEDS_DEEPSPEED
from verify_faults import Model, batch

import sharded_optim as so
from sharded_optim.tools.verify import SHARDINGS, Report
from sharded_optim.tools.verify.page import page

pytestmark = pytest.mark.timeout(400)
every_sharding = pytest.mark.parametrize(
    "sharding", [pytest.param(name, marks=NEEDS_DEEPSPEED if "deepspeed" in name else ()) for name in SHARDINGS]
)
DEEPSPEED_AND_FSDP1 = [pytest.param(f"deepspeed{stage}", marks=NEEDS_DEEPSPEED) for stage in (1, 2, 3)] + ["fsdp1"]


def verified(optimizer: Any, **options: Any) -> Report:
    if "deepspeed" in str(options.get("sharding")):
        from launch.deepspeed_extension import build

        build()
    return so.verify(options.pop("build_model", Model), batch, optimizer, **{"steps": 4, **options})


@every_sharding
def test_an_optimizer_of_this_library_has_the_bits_of_one_process(sharding: str) -> None:
    report = verified(partial(so.StableAdamW, lr=1e-2), sharding=sharding)
    assert report.is_ok, report.text()
    assert (report.verdict, report.steps, report.tensors) == ("bitwise", 4, len(list(Model().parameters())))


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp1", "zero2", pytest.param("deepspeed3", marks=NEEDS_DEEPSPEED)])
def test_muon_that_a_function_of_the_model_builds_has_the_bits_of_one_process(sharding: str) -> None:
    report = verified(verify_faults.muon, sharding=sharding)
    assert report.verdict == "bitwise", report.text()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", "fsdp1"])
def test_torchs_optimizer_is_equal_up_to_rounding(sharding: str) -> None:
    """Its vector and scalar instructions round differently, and where shards begin decides which one an element gets."""
    report = verified(torch.optim.AdamW, sharding=sharding)
    assert report.is_ok, report.text()
    assert report.rounding < 1e-6


@pytest.mark.parametrize("sharding", DEEPSPEED_AND_FSDP1)
def test_a_statistic_on_a_slice_is_found(sharding: str) -> None:
    optimi = pytest.importorskip("optimi")
    report = verified(partial(optimi.StableAdamW, lr=1e-2, foreach=False, triton=False), sharding=sharding)
    assert "slice" in {reason.kind for reason in report.reasons}, report.text()
    assert report.differences[0].error > 1e-4


def test_a_matrix_on_a_slice_is_found() -> None:
    report = verified(verify_faults.MuonOnLocalShards, sharding="fsdp2")
    assert report.reasons[0].kind == "slice", report.text()
    cut = {name for name, param in Model().named_parameters() if param.ndim == 2 and len(param) > 1}  # one row is whole on one rank
    assert {each.name for each in report.differences} == cut


def test_torchs_muon_fails_at_a_matrix_of_one_row() -> None:
    """Which docs/muon.md says: fails when torch has mended it."""
    report = verified(verify_faults.torchs_muon, sharding="fsdp2")
    assert report.verdict == "failed"
    assert "in-place operations that require placement changes" in report.text()


@pytest.mark.parametrize("sharding", ["fsdp2", "zero2"])
def test_options_of_an_optimizer_that_a_function_builds_are_kept(sharding: str) -> None:
    report = verified(verify_faults.with_low_moments, sharding=sharding)
    assert report.verdict == "bitwise", report.text()


def test_a_counter_per_group_is_found() -> None:
    report = verified(verify_faults.CounterPerGroup, sharding="ddp")
    assert [reason.kind for reason in report.reasons] == ["groups"], report.text()


def test_a_lost_moment_is_found() -> None:
    report = verified(verify_faults.LosesMoment, sharding="fsdp2")
    assert [reason.kind for reason in report.reasons] == ["state lost on load"], report.text()
    assert "exp_avg" in report.reasons[0].text
    assert {each.step for each in report.differences} == {2}


def test_an_optimizer_built_before_sharding_is_found() -> None:
    report = verified(torch.optim.AdamW, sharding=verify_faults.built_before_fully_shard)
    assert "built before sharding" in {reason.kind for reason in report.reasons}, report.text()


def test_replicas_that_start_apart_are_found() -> None:
    report = verified(so.AdamW, sharding="fsdp2", build_model=verify_faults.model_of_rank)
    assert report.reasons[0].kind == "replicas apart", report.text()


@pytest.mark.parametrize("sharding", [pytest.param("deepspeed2", marks=NEEDS_DEEPSPEED)])
def test_clipping_without_effect_is_found(sharding: str) -> None:
    """DeepSpeed keeps gradients to itself."""
    report = verified(so.AdamW, sharding=sharding, max_grad_norm=1.0)
    assert [reason.kind for reason in report.reasons] == ["clipping"], report.text()


def test_clipping_that_works_is_no_fault() -> None:
    report = verified(so.AdamW, sharding="fsdp2", max_grad_norm=1.0)
    assert report.is_ok, report.text()


def test_faults_of_optimizers_that_a_function_builds_are_found() -> None:
    counter = verified(verify_faults.a_counter_per_group, sharding="ddp")
    assert [reason.kind for reason in counter.reasons] == ["groups"], counter.text()
    muon = verified(verify_faults.muon_on_local_shards, sharding="fsdp2")
    assert [reason.kind for reason in muon.reasons] == ["slice"], muon.text()


def test_an_elementwise_optimizer_is_not_blamed_for_slices() -> None:
    report = verified(torch.optim.AdamW, sharding=verify_faults.doubled_rate)
    assert [reason.kind for reason in report.reasons] == ["unknown"], report.text()
    assert "treats every element alike" in report.reasons[0].text


def test_a_moment_that_is_not_saved_is_found() -> None:
    report = verified(verify_faults.LosesStateDict, sharding="fsdp2")
    assert [reason.kind for reason in report.reasons] == ["state lost on load"], report.text()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", "fsdp1"])
def test_unusual_models_are_right(sharding: str) -> None:
    for optimizer in (so.StableAdamW, verify_faults.WithoutClosure):
        report = verified(optimizer, sharding=sharding, build_model=verify_faults.Unusual)
        assert report.is_ok, report.text()


def test_parameters_that_no_step_of_their_dtype_changes_are_no_fault() -> None:
    report = so.verify(verify_faults.low_precision, verify_faults.low_precision_batch, torch.optim.AdamW, steps=2)
    assert report.verdict == "bitwise", report.text()


def test_an_error_of_the_model_is_reported() -> None:
    report = verified(so.AdamW, sharding="ddp", build_model=verify_faults.RaisesInForward)
    assert "this model has no forward (verify_faults.py:" in str(report.failure)


def test_a_failure_on_the_ranks_is_reported_with_its_message() -> None:
    report = verified(verify_faults.fails, sharding="ddp")
    assert not report.is_ok
    assert "rank 0, 1: ValueError: no optimizer for this model" in str(report.failure)


def test_what_cannot_be_sent_to_a_process_is_refused() -> None:
    with pytest.raises(ValueError, match=r"build_batch is sent to processes .* cannot be pickled"):
        so.verify(Model, lambda step: batch(step), so.AdamW)


@pytest.mark.parametrize(("option", "value"), [("sharding", "fsdp3"), ("world_size", 3), ("steps", 1)])
def test_options_out_of_range_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        so.verify(Model, batch, so.AdamW, **{option: value})


def test_the_command_prints_writes_a_page_and_exits_with_1_for_a_fault(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from sharded_optim.cli.commands import app

    html = tmp_path / "report.html"
    arguments = ["verify", "verify_faults:Model", "--batch", "verify_faults:batch", "--steps", "2", "--html", str(html)]
    fine = CliRunner().invoke(app, [*arguments, "-o", "lr=0.01", "--sharding", "ddp", "--json"])
    assert fine.exit_code == 0, fine.output
    (report,) = json.loads(fine.stdout)
    assert (report["verdict"], report["sharding"]) == ("bitwise", "ddp")
    faulty = CliRunner().invoke(app, [*arguments, "--optimizer", "verify_faults.MuonOnLocalShards"])
    assert faulty.exit_code == 1, faulty.output
    assert "fsdp2 on 2 ranks: differs" in faulty.output
    assert "slice" in html.read_text()


def test_names_in_a_page_are_escaped() -> None:
    report = Report(
        sharding="<b>", world_size=2, optimizer="a&b", steps=0, tensors=0, differences=(), reasons=(), rounding=0.0, failure="<i>",
        notes=(), seconds=0.0,
    )  # fmt: skip
    assert "<b>" not in page([report])
    assert "&lt;i&gt;" in page([report])


DOCS = Path(__file__).parents[2] / "docs" / "verify.md"


def test_the_documentation_shows_what_the_command_prints() -> None:
    """But for the sizes of errors, which depend on the processor's last bits."""
    from typer.testing import CliRunner

    from sharded_optim.cli.commands import app

    pytest.importorskip("optimi")
    ((command, shown),) = re.findall(r"```\n\$ sharded-optim (verify .*)\n((?:.*\n)*?)```", DOCS.read_text())
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 1
    assert _without_sizes(result.output) == _without_sizes(shown)


def _without_sizes(text: str) -> list[str]:
    return re.sub(r"\d\.\de-\d\d", "SIZE", text).split()


def test_the_example_of_the_documentation_runs_as_a_script(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text("from verify_faults import Model as build_model, batch\n")
    (tmp_path / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (DOCS.parents[1], Path(__file__).parent)))}
    result = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "sharded_optim.StableAdamW, fsdp2 on 2 ranks: bitwise\n"
