"""The benchmarks run, compare like with like, and report everyone. No test looks at a time."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import sharded_optim as so
from benchmarks import (
    behind_backward,
    distributed,
    divergence,
    figure,
    first_step,
    fsdp2,
    learning_rates,
    metrics,
    muon,
    report,
    step,
    wrappers,
)
from benchmarks.cases import GPT2, LAYOUTS, Case, Layout, select
from benchmarks.contenders import BASELINE, CONTENDERS, OURS, Contender, by_name
from benchmarks.contest import takes_part
from benchmarks.devices import Cpu
from benchmarks.environment import describe
from benchmarks.gpt2 import GPT2Model
from benchmarks.records import Run
from benchmarks.storage import HUGE_PAGES, ORDINARY, make_params
from benchmarks.timing import Entrant, interleave

CPU = Cpu()
TINY = Layout(name="tiny", shapes=((1000,), (7, 3)))
PAIR = Layout(name="pair", shapes=((7,), (7,)), dtypes=("fp32",), few=True, same_elements="one")
ONE = Layout(name="one", shapes=((14,),), dtypes=("fp32",), few=True)
CASES = [Case(layout=TINY, dtype="fp32"), Case(layout=TINY, dtype="bf16"), *(Case(layout=each, dtype="fp32") for each in (PAIR, ONE))]
# DeepSpeed compiles for a minute where it is installed.
MEASURED = [contender for contender in CONTENDERS if contender.library != "deepspeed" and "cpu" in contender.devices]


def not_installed(params: object) -> torch.optim.Optimizer:
    raise ImportError("No module named 'nobodys_optimizer'")


def diverges(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=math.inf)


NOBODY = Contender(name="nobody's", library="nobody", algorithm="AdamW", make=not_installed)


@pytest.fixture(scope="module")
def tiny_run() -> Run:
    return step.run(CASES, [*MEASURED, NOBODY], CPU, seconds=0.0, least_rounds=2, stream_elements=1000)


def test_the_gpt2_list_is_gpt2() -> None:
    assert len(GPT2) == 148
    assert sum(math.prod(shape) for shape in GPT2) == 124_439_808


def test_every_contender_is_measured_or_has_a_reason(tiny_run: Run) -> None:
    for case, record in zip(CASES, tiny_run.cases, strict=True):
        meant = {contender.name for contender in [*MEASURED, NOBODY] if takes_part(contender, case, CPU)}
        assert {each.contender for each in (*record.results, *record.missing)} == meant
        allowed = (
            {NOBODY.name} if find_spec("sharded_optim.storage.memory") else {each.name for each in MEASURED if each.storage == HUGE_PAGES}
        )
        assert {each.contender for each in record.missing} <= allowed | {NOBODY.name}
        assert all(each.reason for each in record.missing)
        for result in record.results:
            numbers = [result.milliseconds, result.ratio, result.gigabytes_per_second, result.percent_of_stream]
            assert all(math.isfinite(number) and number > 0 for number in numbers), result
            assert result.shared_moments, f"{result.contender} does not see its moments replaced"
        baseline = record.of(BASELINE)
        assert baseline is not None
        assert baseline.ratio == 1.0


def test_bytes_are_those_of_the_table_in_theory(tiny_run: Run) -> None:
    sizes = {(case.dtype, r.contender): r.bytes_per_element for case in tiny_run.cases[:2] for r in case.results}
    assert sizes["fp32", BASELINE] == sizes["fp32", "ours AdamW cpu"] == 28
    assert sizes["fp32", "optimi StableAdamW loop"] == sizes["fp32", "ours StableAdamW cpu"] == 36
    assert sizes["bf16", BASELINE] == 14
    assert sizes["bf16", "torch AdamW fused, fp32 copy"] == 28
    assert sizes["bf16", "optimi AdamW loop"] == 18  # with Kahan
    assert sizes["bf16", "ours AdamW cpu"] == 26  # fp32 moments, with Kahan
    assert sizes["bf16", "ours StableAdamW cpu"] == 32


def test_gradients_are_the_same_for_all(tiny_run: Run) -> None:
    """optimi steps bf16 parameters with Kahan compensation by writing to their gradients."""
    writes = {(case.dtype, r.contender): r.writes_gradients for case in tiny_run.cases[:2] for r in case.results}
    assert writes["bf16", "optimi AdamW foreach"]
    assert not any(value for (_, name), value in writes.items() if name.startswith(("ours", "torch")))
    params = make_params(ORDINARY, TINY.shapes, torch.bfloat16, CPU.place)
    assert all(bool((param.grad != 0).all()) for param in params)


def test_what_diverges_is_not_measured() -> None:
    contender = dataclasses.replace(NOBODY, name="diverges", make=diverges)
    record = step.run([CASES[0]], [by_name(BASELINE), contender], CPU, seconds=0.0, least_rounds=1, stream_elements=1000)
    (missing,) = record.cases[0].missing
    assert "not finite" in missing.reason


def test_spoiled_inputs_are_restored_before_every_step() -> None:
    calls: list[str] = []
    spoiler = Entrant(name="spoiler", step=lambda: calls.append("step"), warm=1e-6, restore=lambda: calls.append("restore"))
    interleave([spoiler], "spoiler", 0.0, CPU, least_rounds=3)
    assert calls == ["restore", "step"] * (len(calls) // 2)
    assert sorted(spoiler.samples) == [0, 1, 2]


def test_reports_have_a_row_for_everyone(tiny_run: Run, tmp_path: Path) -> None:
    text = report.markdown(tiny_run)
    report.write(tmp_path, "step_cpu", tiny_run, text)
    figure.draw(tmp_path / "step_cpu.png", tiny_run)
    assert (tmp_path / "step_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "step_cpu.md").read_text() == text
    record = json.loads((tmp_path / "step_cpu.json").read_text())
    assert [case["name"] for case in record["cases"]] == ["tiny", "tiny", "pair", "one"]
    assert record["environment"]["packages"]["torch"] == torch.__version__
    fp32, bf16 = text.split("## Parameters and gradients in ")[1:]
    for contender in (*MEASURED, NOBODY):
        for dtype, part in (("fp32", fp32), ("bf16", bf16.split("##")[0])):
            assert (f"| {contender.name} |" in part) == (dtype in contender.dtypes)
    assert "pair fp32 / one" in text
    assert f"- {NOBODY.name}, tiny fp32, tiny bf16: No module named 'nobodys_optimizer'" in text


def test_cases_are_chosen_by_name_and_dtype() -> None:
    assert len(select(None, None)) == sum(len(layout.dtypes) for layout in LAYOUTS if "cpu" in layout.devices)
    assert [case.title for case in select(["GPT-2", "1M"], ["bf16"])] == ["1M bf16", "GPT-2 bf16"]
    with pytest.raises(ValueError, match="unknown cases 2M; there are 1M"):
        select(["2M"], None)
    with pytest.raises(ValueError, match="no case is left"):
        select(["10kx1k"], ["bf16"])
    elements = {layout.name: layout.elements for layout in LAYOUTS}
    assert all(elements[layout.same_elements] == layout.elements for layout in LAYOUTS if layout.same_elements)
    assert len({contender.name for contender in CONTENDERS}) == len(CONTENDERS)
    assert any(contender.library == OURS and contender.devices == ("cuda",) for contender in CONTENDERS)


def test_a_step_behind_a_backward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"layers": 1, "width": 16, "vocabulary": 32, "positions": 8}
    monkeypatch.setattr(behind_backward, "MODELS", {"tiny": (tiny, (2, 4))})
    arguments = ["--models", "tiny", "--threads", "1", "2", "--rounds", "2", "--contenders", "ours AdamW cpu", "--output", str(tmp_path)]
    behind_backward.main(arguments)
    cases = json.loads((tmp_path / "behind_backward.json").read_text())["models"]["tiny"]
    assert [case["threads"] for case in cases] == [1, 2]
    assert all([row["contender"] for row in case["results"]] == ["torch AdamW fused", "ours AdamW cpu"] for case in cases)
    assert "| ms | 1 threads | 2 threads |" in (tmp_path / "behind_backward.md").read_text()


def test_first_step_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_step, "OPTIMIZERS", {"ours AdamW": first_step.OPTIMIZERS["ours AdamW"]})
    first_step.main(["--backend", "eager", "--repetitions", "1", "--output", str(tmp_path)])
    (result,) = json.loads((tmp_path / "first_step.json").read_text())["results"]
    assert result["seconds"] > 0
    assert "| ours AdamW | " in (tmp_path / "first_step.md").read_text()


def test_two_fsdp2_ranks(tmp_path: Path) -> None:
    sizes = ["--layers", "1", "--width", "16", "--vocabulary", "9", "--rounds", "2"]
    fsdp2.main([*sizes, "--contenders", "ours AdamW eager", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "fsdp2.json").read_text())
    assert record["tensors"] == 12 + 4
    assert [result["contender"] for result in record["results"]] == [BASELINE, "ours AdamW eager"]
    assert "| ours AdamW eager |" in (tmp_path / "fsdp2.md").read_text()
    with pytest.raises(SystemExit):
        fsdp2.main(["--contenders", "nobody's"])


def test_the_sharded_model_is_the_one_that_is_documented() -> None:
    with torch.device("meta"):
        sizes = [param.numel() for param in fsdp2.Model().parameters()]
    assert (len(sizes), sum(sizes)) == (76, 23_371_776)


def test_training_on_two_ranks(tmp_path: Path) -> None:
    """Everyone has the same loss in the end, or there would be a remark."""
    names = [wrappers.BASELINE, "FSDP2 + torch fused"]
    distributed.main(["--quick", "--cases", "GPT-2", "--contenders", names[1], "--rounds", "1", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "distributed_cpu.json").read_text())
    (case,) = record["cases"]
    assert [result["contender"] for result in case["results"]] == names
    assert case["missing"] == case["remarks"] == []
    for result in case["results"]:
        assert result["whole"]["milliseconds"] > result["optimizer"]["milliseconds"] > 0
        assert math.isfinite(result["peak_mebibytes"])
    assert case["results"][0]["optimizer"]["ratio"] == case["results"][0]["whole"]["ratio"] == 1.0
    assert f"| {names[1]} |" in (tmp_path / "distributed_cpu.md").read_text()
    with pytest.raises(SystemExit):
        distributed.main(["--contenders", "nobody's"])


def test_who_is_missing_on_two_ranks_has_a_reason() -> None:
    case = dataclasses.replace(distributed.CASES[0], sizes=distributed.SMALL)
    record = distributed.run(case, [wrappers.BASELINE, "DeepSpeed ZeRO-1 + torch fused"], 1, {}, {"DeepSpeed ZeRO-1 + torch fused": "no"})
    assert record["missing"] == [{"contender": "DeepSpeed ZeRO-1 + torch fused", "reason": "no"}]
    assert [result["contender"] for result in record["results"]] == [wrappers.BASELINE]


def test_the_gpt2_that_is_trained_has_the_gpt2_list() -> None:
    with torch.device("meta"):
        model = GPT2Model()
    assert tuple(tuple(param.shape) for param in model.parameters()) == GPT2


def test_sharding_divides_what_a_rank_has() -> None:
    sizes = {each.name: each.bytes_in_theory(100, 2) for each in wrappers.CONTENDERS}
    assert sizes[wrappers.BASELINE] == 1600
    assert sizes["DeepSpeed ZeRO-1 + torch fused"] == sizes["DDP + ZeroRedundancyOptimizer"] == 1200
    assert sizes["DeepSpeed ZeRO-2 + torch fused"] == 1000
    assert sizes["FSDP2 + torch fused"] == 800


def test_a_divergence_check_is_measured_beside_steps() -> None:
    record = divergence.run(divergence.SMALL, 1)
    text = divergence.markdown({"environment": describe(CPU.place, "benchmarks.divergence"), **record})
    assert set(record["seconds"]) == {"step", "check"}
    assert f"{record['share'][1]:.2%}" in text


def test_metrics_are_measured_beside_a_step_that_records_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    metrics.main(["--quick"])
    assert "| 3 tensors |" in capsys.readouterr().out
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = so.StableAdamW([("w", param)], lr=1e-2)
    optimizer.step()
    with metrics.without_recording():
        optimizer.step()
    assert optimizer.performance()["ms/update"] == 0.0, "no clock was read"


def test_muon_is_measured_beside_full_tensor_with_what_travels() -> None:
    """Two shards: (S-1)/S + (S-1)/S of 2 bytes."""
    record = muon.run(muon.SMALL, 1)
    text = muon.markdown({"environment": describe(CPU.place, "benchmarks.muon"), **record})
    assert record["bytes_per_element"] == 2.0
    assert record["numel"] == 32 * 32 * (3 + 1 + 4 + 4)
    assert f"takes {record['ratio'][1]:.2f} of the time of full_tensor" in text


def test_learning_rates_are_searched_by_the_mean_and_trained_to_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each optimizer is best at its second rate here, in the mean of the seeds alone; one run of the job is real."""
    runs = []

    def run(optimizer: str, rate: float, seed: int, steps: int) -> float:
        runs.append((optimizer, steps))
        return abs(math.log(rate / learning_rates.RATES[optimizer][1])) + (3 - seed) * 10 - (steps == learning_rates.WHOLE)

    assert 0 < learning_rates.run("Muon", 1e-2, 0, 2) < 10
    monkeypatch.setattr(learning_rates, "run", run)
    learning_rates.main(["--output", str(tmp_path)])
    assert len(runs) == 2 * (4 + 1) * 3
    rows = json.loads((tmp_path / "learning_rates.json").read_text())["rows"]
    ends = {row["optimizer"]: row["lr"] for row in rows if row["steps"] == learning_rates.WHOLE}
    assert ends == {name: rates[1] for name, rates in learning_rates.RATES.items()}
    assert "| Muon | 0.016 | 650 |" in (tmp_path / "learning_rates.md").read_text()
