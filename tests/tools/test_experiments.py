"""The experiments run, and what they say follows from their numbers. No test looks at whether a claim holds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import nn

from examples.experiments import decoupling, spikes
from examples.experiments.intervals import interval
from examples.experiments.shifting_task import Batches, Transformer
from examples.experiments.spike_events import events, lags, loss_spikes, rises, rms_spikes

ROOT = Path(__file__).parents[2]
SHORT = replace(spikes.QUICK, steps=12, first_shift=6, period=3)
BY_NAME = {arm.name: arm for arm in spikes.ARMS}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The experiments set the number of threads of the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("experiment", [spikes, decoupling], ids=["spikes", "decoupling"])
def test_a_quick_run_writes_all_files_with_its_sentences(experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment.main(["--quick", "--output", str(tmp_path)])
    stem = experiment.__name__.rpartition(".")[2]
    record = json.loads((tmp_path / f"{stem}.json").read_text())
    text = (tmp_path / f"{stem}.md").read_text()
    assert text == experiment.markdown(record), "the table is computed from the record"
    assert text in capsys.readouterr().out
    assert "laim" in text
    assert 5_000 < (tmp_path / f"{stem}.png").stat().st_size < 200_000


@pytest.mark.parametrize("experiment", [spikes, decoupling], ids=["spikes", "decoupling"])
def test_a_quick_run_does_not_overwrite_the_results(experiment) -> None:
    with pytest.raises(SystemExit):
        experiment.main(["--quick"])


@pytest.mark.parametrize("experiment", [spikes, decoupling], ids=["spikes", "decoupling"])
def test_the_committed_table_is_that_of_the_committed_record(experiment) -> None:
    """And its sentences are those of docs/experiments.md."""
    stem = experiment.__name__.rpartition(".")[2]
    record = json.loads((experiment.RESULTS / f"{stem}.json").read_text())
    text = experiment.markdown(record)
    assert (experiment.RESULTS / f"{stem}.md").read_text() == text
    page = (ROOT / "docs/experiments.md").read_text()
    if experiment is spikes:
        said = [spikes.sentences([spikes.Outcome(**row) for row in run["outcomes"]]) for run in record["runs"]]
    else:
        said = [decoupling.sentences([decoupling.Fit(**row) for row in record["fits"]])]
    for sentence in (sentence for sentences in said for sentence in sentences):
        assert sentence in " ".join(page.split())
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert table in page


def test_arms_start_from_the_same_weights_and_data() -> None:
    """So that the first loss, before any step, is the same."""
    assert len({spikes.train(arm, SHORT, 3).losses[0] for arm in spikes.ARMS}) == 1
    assert spikes.train(spikes.ARMS[0], SHORT, 4).losses[0] != spikes.train(spikes.ARMS[0], SHORT, 3).losses[0]


def test_the_rms_that_is_computed_beside_an_optimizer_is_that_of_the_optimizers_metrics() -> None:
    torch.manual_seed(0)
    model, batches = Transformer(SHORT), Batches(SHORT, 0)
    named = list(model.named_parameters())
    optimizer, update_rms = BY_NAME[spikes.STABLE].make(named), spikes.UpdateRms(named)
    for step in range(SHORT.steps):
        inputs, classes = batches.draw(step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), classes).backward()
        rms = update_rms.observe()
        optimizer.step()
        metrics = optimizer.metrics()
        for name, value in rms.items():
            assert value == pytest.approx(metrics[f"rms/{name}"], rel=1e-4), (step, name)


def test_flat_shards_share_memory_with_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    before = torch.cat([param.detach().reshape(-1) for param in model.parameters()])
    shards = spikes.flat_shards(model, 2)
    assert [shard.numel() for shard in shards] == [16, 16]
    model(torch.ones(1, 3)).sum().backward()
    grads = torch.cat([param.grad.reshape(-1) for param in model.parameters()])
    torch.testing.assert_close(torch.cat([shard.grad for shard in shards]), grads, rtol=0, atol=0)
    assert grads.count_nonzero() > 16
    with torch.no_grad():
        for shard in shards:
            shard += 1
    after = torch.cat([param.detach().reshape(-1) for param in model.parameters()])
    torch.testing.assert_close(after, before + 1, rtol=0, atol=0)


def test_optimis_formula_per_tensor_is_ours_and_on_flat_shards_is_not() -> None:
    """The flat arms differ from StableAdamW by what the RMS is taken over, and by nothing else."""
    ours = spikes.train(BY_NAME[spikes.STABLE], SHORT, 0).losses
    per_tensor = spikes.train(replace(BY_NAME[spikes.HALVES], shards=0), SHORT, 0).losses
    assert per_tensor == pytest.approx(ours, rel=1e-3)
    for name in (spikes.HALVES, spikes.WHOLE):
        assert spikes.train(BY_NAME[name], SHORT, 0).losses != pytest.approx(ours, rel=1e-3)


def test_steps_close_together_are_one_event() -> None:
    assert events([3, 5, 14, 30, 39, 60]) == [3, 30, 60]
    assert events([3, 5, 14, 30, 39, 60], least=2) == [3, 30]
    assert events([]) == []


def test_spikes_are_found_where_they_are() -> None:
    losses = [1.0 + 0.01 * (step % 2) for step in range(120)]
    losses[80:83] = [2.0, 1.9, 1.5]
    losses[100] = 1.9  # one batch alone
    assert loss_spikes(losses, 50) == [80]
    assert max(rises(losses, 50)) == pytest.approx(0.995)
    assert rms_spikes([1.0] * 60 + [2.29, 2.3, 4.0] + [1.0] * 20, 50) == [61]
    assert rms_spikes([5.0] * 40 + [1.0] * 20, 45) == []
    assert loss_spikes([*losses[:80], math.nan, math.nan], 50) == [80]


def test_lags_refer_to_the_last_rms_spike_before() -> None:
    assert lags([5, 20, 43, 60], [20, 40, 50]) == [None, 0, 3, 10]


def test_intervals_are_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert not found.positive
    assert interval([1.0]).half_width == math.inf
    assert interval([-0.001, -0.001]).text() == "0.00 ± 0.00"
    assert interval([1.0, 1.1, 0.9]).positive


def outcomes(arms: dict[str, tuple[list[int | None], float]]) -> list[spikes.Outcome]:
    """Made-up outcomes of five seeds: the lags of each run's loss spikes, and its largest rise."""
    return [
        spikes.Outcome(
            arm=arm,
            seed=seed,
            rms_spikes=4,
            loss_spikes=len(found),
            lags=found,
            shift_rise=0.1,
            largest_rise=rise + 0.01 * (seed % 2),
            final_loss=1.0,
            chance=0.1,
            largest_rms=5.0,
            largest_other_rms=2.0,
        )
        for arm, (found, rise) in arms.items()
        for seed in range(5)
    ]


SPIKING = {spikes.ADAMW: ([1, 2, 8], 2.0), spikes.CLIPPED: ([1], 1.0), spikes.HALVES: ([1], 1.5), spikes.WHOLE: ([], 0.3)}


@pytest.mark.parametrize(
    ("arms", "verdict"),
    [
        (SPIKING | {spikes.STABLE: ([], 0.5)}, "The claim held: 15 of 15"),
        (SPIKING | {spikes.ADAMW: ([1, 0, None], 2.0), spikes.STABLE: ([], 0.5)}, "The claim held in part: 5 of 15"),
        (SPIKING | {spikes.STABLE: ([1, 2, 3], 2.0)}, "The claim held in part: 15 of 15"),
        (SPIKING | {spikes.ADAMW: ([9], 0.5), spikes.STABLE: ([1, 2], 0.9)}, "The claim did not hold: 0 of 5"),
        (SPIKING | {spikes.ADAMW: ([], 0.5), spikes.STABLE: ([], 0.5)}, "The claim did not hold: 0 of 0"),
    ],
)
def test_the_verdict_on_spikes_follows_the_numbers(arms: dict[str, tuple[list[int | None], float]], verdict: str) -> None:
    assert spikes.sentences(outcomes(arms))[0].startswith(verdict)


def test_differences_are_worded_by_their_sign_and_interval() -> None:
    claim, clipping, halves, whole = spikes.sentences(outcomes(SPIKING | {spikes.STABLE: ([1], 0.5)}))
    assert "AdamW has 2.00 ± 0.00 more loss spikes" in claim
    assert "1.50 ± 0.00 higher" in claim
    assert "neither more nor fewer (0.00 ± 0.00) loss spikes per run, the largest rise 0.50 ± 0.00 higher" in clipping
    assert "the largest rise 1.00 ± 0.00 higher" in halves
    assert "the final loss neither higher nor lower" in halves
    assert "the largest rise 0.20 ± 0.00 lower" in whole


def valley(slope: float, grid: decoupling.Grid, form: str) -> torch.Tensor:
    """A made-up map of two seeds, whose best decay is in the middle of the grid at the middle learning rate."""
    rates = torch.tensor(grid.learning_rates()).log10()[:, None, None]
    decays = torch.tensor(grid.weight_decays(form)).log10()[None, :, None]
    best = decays.mean() + slope * (rates - rates.mean()) + torch.tensor([0.0, 0.1])
    return 1 + (decays - best) ** 2


@pytest.mark.parametrize(
    ("coupled", "decoupled", "verdict"),
    [
        (-1.0, 0.0, 'Task "made up": the claim held: slopes -1.00 ± 0.00 coupled (-1 is claimed) and 0.00 ± 0.00 decoupled'),
        (0.0, 0.9, 'Task "made up": the claim did not hold: slopes 0.00 ± 0.00 coupled'),
        (-0.5, 0.1, 'Task "made up": the claim held in part: slopes -0.50 ± 0.00 coupled'),
    ],
)
def test_the_verdict_on_decoupling_follows_the_slopes(coupled: float, decoupled: float, verdict: str) -> None:
    grid = decoupling.Grid(rates=(0.1, 1.0), rate_count=5, decay_count=33)
    slopes = {"coupled": coupled, "decoupled": decoupled}
    fits = [decoupling.fit("made up", form, valley(slope, grid, form), grid) for form, slope in slopes.items()]
    (sentence,) = decoupling.sentences(fits)
    assert sentence.startswith(verdict)


def test_learning_rates_that_are_far_from_the_best_are_not_fitted() -> None:
    """Nor those without a best decay inside the grid, nor runs that diverged."""
    grid = decoupling.Grid(rates=(0.1, 1.0), rate_count=6, decay_count=33)
    errors = valley(-0.5, grid, "coupled")
    errors[0], errors[-1] = 2.0, math.inf
    errors[1] = torch.linspace(1, 2, 33)[:, None]
    found = decoupling.fit("made up", "coupled", errors, grid)
    assert found.rates == grid.learning_rates()[2:-1]
    assert found.slope.mean == pytest.approx(-0.5, abs=1e-3)


def test_cells_of_a_map_do_not_influence_each_other() -> None:
    """A cell is a run of its own, also beside one that diverges."""
    task = replace(decoupling.TASKS[0], steps=20)
    grid = decoupling.Grid(rates=(0.01, 1.0), rate_count=2, decays=(("coupled", (0.1, 1e30)),), decay_count=2)
    whole = decoupling.final_errors(task, grid, "coupled", 2)
    tame = decoupling.final_errors(task, replace(grid, decays=(("coupled", (0.1, 0.2)),)), "coupled", 2)
    assert whole[:, 1].isinf().all()
    torch.testing.assert_close(whole[:, 0], tame[:, 0])
