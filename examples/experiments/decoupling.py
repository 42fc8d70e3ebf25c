"""Best weight decay as a function of the learning rate, coupled and decoupled: `python -m examples.experiments.decoupling`.

Tests the common claim on decoupled weight decay, as in F. Schaipp's note "How to jointly tune learning rate and weight decay for AdamW"
(2024-02-19): where a step multiplies weights by 1 - lr * lambda (`decay_form="coupled"`, torch's AdamW), the best lambda is
proportional to 1 / lr; where it multiplies them by 1 - s_t * lambda with s_t = lr_t / lr (`"decoupled"`), it does not depend on lr. In
log-log coordinates of lambda over lr these are slopes of -1 and 0.

The model is linear, trained by this library's AdamW on batches of squared errors, with a cosine schedule down to 0. Weight decay is its
only regularization, in the place of ridge regression's penalty. There are two tasks:

    noise            more examples than weights, which begin at 0: decay keeps the weights from fitting the noise of the targets
    initial weights  fewer examples than weights, which begin at random: decay removes what the examples say nothing about

Both forms are one algorithm with lambda(decoupled) = lr * lambda(coupled), so their slopes differ by 1 whatever the task. The experiment
measures which of the two has the slope of 0.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import sharded_optim as so
from benchmarks import report
from benchmarks.environment import describe, summary
from examples.experiments.intervals import Interval, interval

__all__ = ["FORMS", "TASKS", "Fit", "Grid", "Task", "final_errors", "fit", "main", "markdown", "sentences"]

RESULTS = Path(__file__).parent / "results"
FIGURE = Path(__file__).parents[2] / "docs" / "decoupling.png"
BETAS, EPS = (0.9, 0.999), 1e-8
FORMS = {"coupled": -1.0, "decoupled": 0.0}  # and the slope that is claimed of each
TOLERANCE = 0.2  # a slope is the claimed one if it is this close to it
NEAR_BEST = 1.05  # times the least error: learning rates with which some decay gets there are fitted
LEAST_RATES = 3
VALIDATION = 1000  # examples
SEEDS, QUICK_SEEDS = 10, 2


@dataclass(frozen=True, kw_only=True)
class Task:
    """A linear regression with standard normal true weights.

    Attributes:
        input_power: input k has the variance k^-input_power.
        noise: standard deviation of the noise of the targets.
        initial: standard deviation of the initial weights.
    """

    name: str
    examples: int
    weights: int = 50
    input_power: float
    noise: float
    initial: float
    batch: int = 10
    steps: int = 500


TASKS = (
    Task(name="noise", examples=60, input_power=1.0, noise=1.0, initial=0.0),
    Task(name="initial weights", examples=30, input_power=0.0, noise=0.5, initial=1.0),
)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values of learning rate and weight decay, equal steps of their logarithms apart."""

    rates: tuple[float, float] = (1e-2, 3.162)  # least and largest
    rate_count: int = 11
    decays: tuple[tuple[str, tuple[float, float]], ...] = (("coupled", (1e-3, 10.0)), ("decoupled", (1e-4, 1.0)))
    decay_count: int = 25

    def learning_rates(self) -> list[float]:
        return _geometric(*self.rates, self.rate_count)

    def weight_decays(self, form: str) -> list[float]:
        return _geometric(*dict(self.decays)[form], self.decay_count)


QUICK = Grid(rate_count=5, decay_count=7)


def _geometric(first: float, last: float, count: int) -> list[float]:
    return [first * (last / first) ** (k / (count - 1)) for k in range(count)]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data of all seeds."""

    inputs: Tensor  # (seeds, examples, weights)
    targets: Tensor  # (seeds, examples)
    validation_inputs: Tensor  # (seeds, VALIDATION, weights)
    validation_targets: Tensor  # (seeds, VALIDATION), without noise
    initial: Tensor  # (seeds, weights)


def make_data(task: Task, seeds: int) -> Data:
    """Draw data for seeds 0, 1, ..."""
    fields: dict[str, list[Tensor]] = {name: [] for name in Data.__dataclass_fields__}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        scale = torch.arange(1, task.weights + 1).float() ** (-task.input_power / 2)
        true = torch.randn(task.weights, generator=generator)
        inputs = scale * torch.randn(task.examples + VALIDATION, task.weights, generator=generator)
        noise = task.noise * torch.randn(task.examples, generator=generator)
        fields["inputs"].append(inputs[: task.examples])
        fields["targets"].append(inputs[: task.examples] @ true + noise)
        fields["validation_inputs"].append(inputs[task.examples :])
        fields["validation_targets"].append(inputs[task.examples :] @ true)
        fields["initial"].append(task.initial * torch.randn(task.weights, generator=generator))
    return Data(**{name: torch.stack(values) for name, values in fields.items()})


def final_errors(task: Task, grid: Grid, form: str, seeds: int) -> Tensor:
    """Train with every learning rate and weight decay on every seed, all at once.

    Returns:
        Mean squared errors on validation data, (learning rates, weight decays, seeds); infinite where a run diverged.
    """
    data = make_data(task, seeds)
    cells = [(lr, decay) for lr in grid.learning_rates() for decay in grid.weight_decays(form)]
    weights = data.initial.expand(len(cells), -1, -1).clone()  # (cells, seeds, weights), stepped through views
    grads = torch.zeros_like(weights)
    groups = []
    for cell, (lr, decay) in enumerate(cells):
        param = nn.Parameter(weights[cell])
        param.grad = grads[cell]
        groups.append({"params": [param], "lr": lr, "weight_decay": decay})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoupled decays of 1e-3 or more are meant
        # A cell that diverges must not keep the others from their steps.
        optimizer = so.AdamW(groups, betas=BETAS, eps=EPS, decay_form=form, nonfinite="allow")
    generator = torch.Generator().manual_seed(seeds)
    each_seed = torch.arange(seeds)[:, None]
    for step in range(task.steps):
        schedule = 0.5 * (1 + math.cos(math.pi * step / task.steps))
        for group, (lr, _) in zip(optimizer.param_groups, cells, strict=True):
            group["lr"] = lr * schedule
        batch = torch.randint(task.examples, (seeds, task.batch), generator=generator)
        inputs, targets = data.inputs[each_seed, batch], data.targets[each_seed, batch]
        residuals = torch.einsum("sbw,csw->csb", inputs, weights) - targets
        grads.copy_(torch.einsum("csb,sbw->csw", residuals / task.batch, inputs))
        optimizer.step()
    residuals = torch.einsum("svw,csw->csv", data.validation_inputs, weights) - data.validation_targets
    errors = residuals.square().mean(-1).view(grid.rate_count, grid.decay_count, seeds)
    return torch.where(errors.isfinite(), errors, math.inf)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The valley of a map: best weight decay over learning rate.

    Attributes:
        rates: learning rates that were fitted: the mean error over seeds gets near the least, with a decay inside the grid.
        best: for each of them, log10 of the best weight decay of the mean error.
        slopes: of each seed's own best weight decays inside the grid, by least squares in log-log coordinates.
        least: mean over seeds of the least error.
    """

    task: str
    form: str
    rates: list[float]
    best: list[float]
    slopes: list[float]
    least: float

    @property
    def slope(self) -> Interval:
        return interval(self.slopes)


def _best_decay(errors: Tensor, decays: Sequence[float]) -> float | None:
    """Return log10 of the weight decay with the least error, between grid points by a parabola through the least and those beside it.

    Args:
        errors: (weight decays,).

    Returns:
        None where the least error is at the grid's edge: the best decay is outside, or none at all.
    """
    least = int(errors.argmin())
    if least in (0, len(decays) - 1):
        return None
    before, here, after = (float(errors[least + k]) for k in (-1, 0, 1))
    curvature = before - 2 * here + after
    shift = 0.5 * (before - after) / curvature if math.isfinite(curvature) and curvature > 0 else 0.0
    return math.log10(decays[least]) + shift * math.log10(decays[1] / decays[0])


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of a least-squares line."""
    mean_x, mean_y = mean(x), mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def fit(task: str, form: str, errors: Tensor, grid: Grid) -> Fit:
    """Fit the valley of a map.

    Args:
        errors: (learning rates, weight decays, seeds), as of `final_errors`.
    """
    rates, decays = grid.learning_rates(), grid.weight_decays(form)
    mean_errors = errors.mean(-1)
    least = float(mean_errors.min())
    valley = {k: best for k in range(len(rates)) if (best := _best_decay(mean_errors[k], decays)) is not None}
    near = [k for k in valley if float(mean_errors[k].min()) <= NEAR_BEST * least]
    if len(near) < LEAST_RATES:  # only on coarse grids
        near = sorted(sorted(valley, key=lambda k: float(mean_errors[k].min()))[:LEAST_RATES])
    slopes = []
    for seed in range(errors.shape[-1]):
        of_seed = {math.log10(rates[k]): best for k in near if (best := _best_decay(errors[k, :, seed], decays)) is not None}
        slopes.append(_slope(list(of_seed), list(of_seed.values())))
    return Fit(task=task, form=form, rates=[rates[k] for k in near], best=[valley[k] for k in near], slopes=slopes, least=least)


def sentences(fits: Sequence[Fit]) -> list[str]:
    """Return for each task whether the claim held, from the fits alone."""
    found = []
    for task in dict.fromkeys(each.task for each in fits):
        of_task = {each.form: each for each in fits if each.task == task}
        held = [abs(of_task[form].slope.mean - claimed) <= TOLERANCE for form, claimed in FORMS.items()]
        verdict = "held" if all(held) else "held in part" if any(held) else "did not hold"
        slopes = " and ".join(f"{of_task[form].slope.text()} {form} ({claimed:.0f} is claimed)" for form, claimed in FORMS.items())
        flattest = min(of_task.values(), key=lambda each: abs(each.slope.mean)).form
        found.append(f'Task "{task}": the claim {verdict}: slopes {slopes}; the {flattest} decay depends less on the learning rate.')
    return found


def markdown(record: dict[str, Any]) -> str:
    """Return the table of a record, with the sentences first."""
    fits = [Fit(**each) for each in record["fits"]]
    rows = [
        [
            each.task,
            each.form,
            each.slope.text(),
            f"{FORMS[each.form]:.0f}",
            f"{min(each.rates):.2g} to {max(each.rates):.2g}",
            f"{10 ** each.best[0]:.2g} to {10 ** each.best[-1]:.2g}",
            f"{each.least:.3f}",
        ]
        for each in fits
    ]
    header = ["task", "decay", "slope", "claimed", "learning rates fitted", "best decay at these ends", "least error"]
    parts = [
        "# Slope of the best weight decay over the learning rate",
        *sentences(fits),
        f"Slopes are in log-log coordinates, means over {len(fits[0].slopes)} seeds with 95 % intervals.",
        f"A slope within {TOLERANCE} of the claimed one counts as it.",
        f"Fitted are learning rates whose best decay is inside the grid and gets the mean error below {NEAR_BEST} times the map's least.",
        report.table(header, rows, text=2),
        summary(record["environment"]),
        f"`{record['environment']['command']}`, commit {record['environment']['commit']}.",
    ]
    return "\n\n".join(parts) + "\n"


def draw(path: Path, maps: dict[tuple[str, str], Tensor], fits: Sequence[Fit], grid: Grid) -> None:
    """Write a PNG of all maps, relative to the least error, with the fitted valleys."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state as in pyplot
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    tasks = list(dict.fromkeys(each.task for each in fits))
    grid_of_axes = figure.subplots(len(tasks), len(FORMS), squeeze=False)
    mesh = None
    for each in fits:
        axes = grid_of_axes[tasks.index(each.task)][list(FORMS).index(each.form)]
        errors = maps[each.task, each.form].mean(-1)
        mesh = axes.pcolormesh(
            grid.learning_rates(),
            grid.weight_decays(each.form),
            (errors / each.least).clamp(max=4.0).T.numpy(),
            norm=LogNorm(1.0, 4.0),
            cmap="viridis_r",
            shading="nearest",
        )
        axes.plot(each.rates, [10**best for best in each.best], "o-", color="white", markersize=4, linewidth=1)
        axes.set(xscale="log", yscale="log", title=f"{each.task}, {each.form}: slope {each.slope.text()}", ylabel="weight decay")
        axes.title.set_fontsize(10)
        axes.set_xlabel("learning rate")
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=grid_of_axes, label="error on validation data, relative to the least", extend="max")
    bar.set_ticks([1, 1.5, 2, 3, 4], labels=["1", "1.5", "2", "3", "4"])
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment; write table, record and figure."""
    parser = argparse.ArgumentParser(prog="python -m examples.experiments.decoupling", description="Fits best weight decays.")
    parser.add_argument("--quick", action="store_true", help=f"a smoke run of seconds: a coarse grid, {QUICK_SEEDS} seeds")
    parser.add_argument("--seeds", type=int, help=f"default: {SEEDS}, with --quick {QUICK_SEEDS}")
    parser.add_argument("--output", type=Path, help="folder of all files; default: examples/experiments/results/, and docs/ for the figure")
    options = parser.parse_args(arguments)
    if options.quick and options.output is None:
        parser.error("a --quick run is no result: say with --output where to write it")
    torch.set_num_threads(1)
    grid, seeds = (QUICK, QUICK_SEEDS) if options.quick else (Grid(), SEEDS)
    seeds = options.seeds or seeds
    tasks = [replace(task, steps=50) for task in TASKS] if options.quick else list(TASKS)
    environment = describe(torch.device("cpu"), "examples.experiments.decoupling")
    maps, fits = {}, []
    for task in tasks:
        for form in FORMS:
            maps[task.name, form] = final_errors(task, grid, form, seeds)
            fits.append(fit(task.name, form, maps[task.name, form], grid))
            print(f"{task.name}, {form}: slope {fits[-1].slope.text()}", file=sys.stderr, flush=True)
    record = {
        "environment": environment,
        "betas": BETAS,
        "eps": EPS,
        "tasks": [asdict(task) for task in tasks],
        "grid": asdict(grid),
        "fits": [asdict(each) for each in fits],
    }
    text = markdown(record)
    report.write(options.output or RESULTS, "decoupling", record, text)
    draw(FIGURE if options.output is None else options.output / FIGURE.name, maps, fits, grid)
    print(text)


if __name__ == "__main__":
    main()
