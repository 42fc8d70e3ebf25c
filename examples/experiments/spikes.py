"""Loss spikes of AdamW after its second moments have gone stale, and StableAdamW against them: `python -m examples.experiments.spikes`.

Tests the report of Wortsman et al. 2023 (arXiv 2304.13013) on CLIP: with beta2 close to 1, loss spikes of AdamW follow by 1 to 8
steps a spike in the RMS of the patch embedding's update,

    RMS = sqrt(mean over the tensor of g^2 / max(v / (1 - beta2^t), eps^2)),

and StableAdamW, which divides a tensor's learning rate by max(1, RMS), prevents them, better than clipping gradients does. Here a small
vision transformer is trained on data that change (`shifting_task.py`). Two further arms run optimi's StableAdamW on flat shards, as an
optimizer that does not know where tensors lie runs under ZeRO or FSDP1: the RMS is then that of a range of the flat buffer.

The share of a tensor in a range of the buffer decides how much of its RMS shows there. So all is run twice, the second time with a
classifier of so many outputs that the patch embedding is a small part of the model.

All arms have the same data, initial weights and hyperparameters for a seed. The task was tuned on seed 0 until AdamW's loss spiked; the
seeds that are measured begin at 1.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from optimi import StableAdamW as OptimiStableAdamW
from torch import nn

import sharded_optim as so
from benchmarks import report
from benchmarks.environment import describe, summary
from examples.experiments.intervals import Interval, interval
from examples.experiments.shifting_task import PATCH_EMBEDDING, Batches, Task, Transformer
from examples.experiments.spike_events import FOLLOWS, RMS_THRESHOLD, WINDOW, lags, loss_spikes, rises, rms_spikes

__all__ = [
    "ARMS",
    "Arm",
    "Outcome",
    "Trace",
    "draw",
    "flat_shards",
    "main",
    "markdown",
    "mean_curves",
    "measure",
    "outcome",
    "sentences",
    "table",
    "train",
]

RESULTS = Path(__file__).parent / "results"
FIGURE = Path(__file__).parents[2] / "docs" / "spikes.png"
LR, BETA2, EPS, WEIGHT_DECAY, WARM_UP = 1e-2, 0.999, 1e-6, 1e-2, 50
SEEDS, QUICK_SEEDS = 8, 2
TASKS = (Task(), Task(outputs=4096))
QUICK = Task(steps=110, batch=16, groups=2, first_shift=80, period=15, measured_from=WINDOW)
MOST_UNEXPLAINED = 2 / 30  # of loss spikes: 28 of the paper's 30 followed an RMS spike
LAST = 50  # steps whose mean loss is the final one
ADAMW, CLIPPED, STABLE = "AdamW", "AdamW, gradients clipped at norm 1", "StableAdamW, per tensor"
HALVES, WHOLE = "StableAdamW, halves of a flat buffer", "StableAdamW, one flat buffer"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """An optimizer, and how gradients and parameters are passed to it.

    Attributes:
        make: build the optimizer of named parameters.
        clip: norm at which gradients are clipped.
        shards: into how many parts the flat buffer of all parameters is cut; 0 leaves tensors apart.
    """

    name: str
    color: str
    make: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
    clip: float | None = None
    shards: int = 0


def _ours(kind: type[so.AdamW] | type[so.StableAdamW], named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return kind(named, lr=LR, betas=(0.9, BETA2), eps=EPS, weight_decay=WEIGHT_DECAY)


def _optimi(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    params = [param for _, param in named]
    return OptimiStableAdamW(params, lr=LR, betas=(0.9, BETA2), eps=EPS, weight_decay=WEIGHT_DECAY, foreach=False, triton=False)


ARMS = (
    Arm(name=ADAMW, color="#9aa5b1", make=partial(_ours, so.AdamW)),
    Arm(name=CLIPPED, color="#e0a030", make=partial(_ours, so.AdamW), clip=1.0),
    Arm(name=STABLE, color="#1b6ca8", make=partial(_ours, so.StableAdamW)),
    Arm(name=HALVES, color="#d1495b", make=_optimi, shards=2),
    Arm(name=WHOLE, color="#7b3f61", make=_optimi, shards=1),
)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Losses and RMS of a run, by step."""

    arm: str
    seed: int
    losses: list[float]
    rms: dict[str, list[float]]  # of each tensor's update


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Spikes and other measurements of a run.

    Attributes:
        lags: of each loss spike, steps since the last RMS spike of the patch embedding began; None if there was none before.
        shift_rise: mean over the shifts of the loss's rise above its running mean at the first batch of the new data, before any update.
        largest_rise: of the loss above its running mean.
        chance: part of all steps that are 1 to 8 steps after the beginning of an RMS spike.
        largest_rms, largest_other_rms: of the patch embedding and of any other tensor.
    """

    arm: str
    seed: int
    rms_spikes: int
    loss_spikes: int
    lags: list[int | None]
    shift_rise: float
    largest_rise: float
    final_loss: float
    chance: float
    largest_rms: float
    largest_other_rms: float


class UpdateRms:
    """The statistic of StableAdamW's algorithm, per tensor, beside any optimizer: from gradients alone, with moments of its own."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._names, self._params = [name for name, _ in named], [param for _, param in named]
        self._exp_avg_sq = [torch.zeros_like(param) for param in self._params]
        self._step = 0

    @torch.no_grad()
    def observe(self) -> dict[str, float]:
        """Return the RMS of each tensor's update in the step that is about to come."""
        self._step += 1
        means = []
        for param, exp_avg_sq in zip(self._params, self._exp_avg_sq, strict=True):
            assert param.grad is not None
            square = param.grad.square()
            exp_avg_sq.lerp_(square, 1 - BETA2)
            means.append((square / (exp_avg_sq / (1 - BETA2**self._step)).clamp(min=EPS**2)).mean())
        return dict(zip(self._names, torch.stack(means).sqrt().tolist(), strict=True))


def flat_shards(model: nn.Module, shards: int) -> list[nn.Parameter]:
    """Move a model's parameters and gradients into one flat buffer each and cut both into equal parts.

    Returns:
        The parts as parameters with gradients, which share the memory of the model's. Gradients must be zeroed in place.
    """
    params = list(model.parameters())
    flat = torch.cat([param.detach().reshape(-1) for param in params])
    grad = torch.zeros_like(flat)
    offset = 0
    for param in params:
        end = offset + param.numel()
        param.data = flat[offset:end].view(param.shape)
        param.grad = grad[offset:end].view(param.shape)
        offset = end
    parts = [nn.Parameter(part) for part in flat.tensor_split(shards)]
    for part, part_grad in zip(parts, grad.tensor_split(shards), strict=True):
        part.grad = part_grad
    return parts


def train(arm: Arm, task: Task, seed: int) -> Trace:
    """Train a model from a seed: the seed determines its weights and the data, whatever the arm."""
    torch.manual_seed(seed)
    model = Transformer(task)
    batches = Batches(task, seed)
    named = list(model.named_parameters())
    stepped = [(f"shard {k}", part) for k, part in enumerate(flat_shards(model, arm.shards))] if arm.shards else named
    optimizer = arm.make(stepped)
    update_rms = UpdateRms(named)
    trace = Trace(arm=arm.name, seed=seed, losses=[], rms={name: [] for name, _ in named})
    for step in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARM_UP)
        inputs, classes = batches.draw(step)
        loss = F.cross_entropy(model(inputs), classes, label_smoothing=task.label_smoothing)
        model.zero_grad(set_to_none=False)  # flat shards see gradients only in their own memory
        loss.backward()
        if arm.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), arm.clip)
        ours = isinstance(optimizer, so.StableAdamW)
        rms = {} if ours else update_rms.observe()
        optimizer.step()
        if ours:
            metrics = optimizer.metrics()
            rms = {name: metrics[f"rms/{name}"] for name, _ in named}
        trace.losses.append(loss.item())
        for name, value in rms.items():
            trace.rms[name].append(value)
    return trace


def outcome(trace: Trace, task: Task) -> Outcome:
    """Find the spikes of a run, from `task.measured_from` on."""
    start = task.measured_from
    patch_rms = trace.rms[PATCH_EMBEDDING]
    of_rms, of_loss = rms_spikes(patch_rms, start), loss_spikes(trace.losses, start)
    above = rises(trace.losses, start)
    explained_steps = {step + lag for step in of_rms for lag in FOLLOWS if step + lag < len(trace.losses)}
    return Outcome(
        arm=trace.arm,
        seed=trace.seed,
        rms_spikes=len(of_rms),
        loss_spikes=len(of_loss),
        lags=lags(of_loss, of_rms),
        shift_rise=mean(above[shift - start] for shift in task.shifts),
        largest_rise=max(above),
        final_loss=mean(trace.losses[-LAST:]),
        chance=len(explained_steps) / len(above),
        largest_rms=max(patch_rms[start:]),
        largest_other_rms=max(max(rms[start:]) for name, rms in trace.rms.items() if name != PATCH_EMBEDDING),
    )


def measure(task: Task, seed: int) -> list[Trace]:
    """Train all arms on a seed."""
    traces = [train(arm, task, seed) for arm in ARMS]
    finals = ", ".join(f"{trace.arm} {mean(trace.losses[-LAST:]):.3f}" for trace in traces)
    print(f"{task.outputs} outputs, seed {seed}: final losses: {finals}", file=sys.stderr, flush=True)
    return traces


def _of(outcomes: Sequence[Outcome], arm: str) -> list[Outcome]:
    return sorted((each for each in outcomes if each.arm == arm), key=lambda each: each.seed)


def _difference(outcomes: Sequence[Outcome], arm: str, other: str, value: Callable[[Outcome], float]) -> Interval:
    """Return the mean over seeds of an arm's value less that of another for the same seed."""
    pairs = zip(_of(outcomes, arm), _of(outcomes, other), strict=True)
    return interval([value(first) - value(second) for first, second in pairs])


def _spikes(each: Outcome) -> float:
    return each.loss_spikes


def _rise(each: Outcome) -> float:
    return each.largest_rise


def _compared(difference: Interval, more: str, less: str) -> str:
    """Word a difference: `more` or `less` by how much, or that the interval has 0 in it."""
    if difference.holds(0.0):
        return f"neither {more} nor {less} ({difference.text()})"
    return f"{abs(difference.mean):.2f} ± {difference.half_width:.2f} {more if difference.mean > 0 else less}"


def sentences(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the verdicts on the paper's claim, on clipping, and on flat shards, from the numbers alone."""
    found = [lag for each in _of(outcomes, ADAMW) for lag in each.lags]
    followed = sum(lag in FOLLOWS for lag in found)
    chance = mean(each.chance for each in _of(outcomes, ADAMW))
    spikes, rise = _difference(outcomes, ADAMW, STABLE, _spikes), _difference(outcomes, ADAMW, STABLE, _rise)
    parts = [bool(found) and followed >= (1 - MOST_UNEXPLAINED) * len(found), spikes.positive, rise.positive]
    verdict = "The claim held" if all(parts) else "The claim held in part" if any(parts) else "The claim did not hold"
    claim = (
        f"{verdict}: {followed} of {len(found)} loss spikes of AdamW began 1 to 8 steps after an RMS spike of the patch embedding "
        f"({100 * chance:.0f} % of all steps do); against StableAdamW, AdamW has {_compared(spikes, 'more', 'fewer')} loss spikes per run, "
        f"and the largest rise of its loss is {_compared(rise, 'higher', 'lower')}."
    )
    spikes, rise = _difference(outcomes, CLIPPED, STABLE, _spikes), _difference(outcomes, CLIPPED, STABLE, _rise)
    clipping = (
        f"Clipping gradients at norm 1 instead of StableAdamW: {_compared(spikes, 'more', 'fewer')} loss spikes per run, "
        f"the largest rise {_compared(rise, 'higher', 'lower')}."
    )
    flat = []
    for name, arm in (("in halves of a flat buffer", HALVES), ("in one flat buffer", WHOLE)):
        rise = _difference(outcomes, arm, STABLE, _rise)
        final = _difference(outcomes, arm, STABLE, lambda each: each.final_loss)
        flat.append(
            f"The RMS {name} instead of per tensor: the largest rise {_compared(rise, 'higher', 'lower')}, "
            f"the final loss {_compared(final, 'higher', 'lower')}."
        )
    return [claim, clipping, *flat]


def _lag_text(found: Sequence[int | None]) -> str:
    """Count lags: 1 to 8, and what else there is."""
    inside = sorted(lag for lag in found if lag is not None and lag in FOLLOWS)
    others = ["none before" if lag is None else str(lag) for lag in found if lag is None or lag not in FOLLOWS]
    median = f", median {inside[len(inside) // 2]}" if inside else ""
    return f"{len(inside)} of {len(found)}{median}" + (f"; others {', '.join(others)}" if others else "")


def markdown(record: dict[str, Any]) -> str:
    """Return the tables of a record, each after its sentences."""
    parts = ["# Spikes of the loss after spikes of the update's RMS"]
    for run in record["runs"]:
        outcomes = [Outcome(**each) for each in run["outcomes"]]
        parts += [f"## The patch embedding is {100 * run['share']:.0f} % of the model", *sentences(outcomes), table(outcomes)]
    task, *others = (run["task"] for run in record["runs"])
    settings = record["hyperparameters"] | task
    differences = [f"{name} {value}" for other in others for name, value in other.items() if value != task[name]]
    parts += [
        "## Settings",
        ", ".join(f"{name} {value}" for name, value in settings.items()) + (f"; then {', '.join(differences)}" if others else "") + ".",
        f"`{record['environment']['command']}`, commit {record['environment']['commit']}. {summary(record['environment'])}",
    ]
    return "\n\n".join(parts) + "\n"


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table of all arms, means over seeds with their intervals, under a caption."""
    header = ["", "RMS spikes", "largest RMS, patch embedding", "largest RMS, others", "loss spikes", "1 to 8 steps after an RMS spike"]
    header += ["largest rise of the loss", "final loss"]
    rows = []
    for arm in dict.fromkeys(each.arm for each in outcomes):
        runs = _of(outcomes, arm)
        cells = [
            interval([each.rms_spikes for each in runs]).text(1),
            interval([each.largest_rms for each in runs]).text(1),
            interval([each.largest_other_rms for each in runs]).text(1),
            interval([each.loss_spikes for each in runs]).text(1),
            _lag_text([lag for each in runs for lag in each.lags]),
            interval([each.largest_rise for each in runs]).text(),
            interval([each.final_loss for each in runs]).text(),
        ]
        rows.append([arm, *cells])
    shift = interval([each.shift_rise for each in _of(outcomes, STABLE)])
    caption = (
        f"Per run, means over {len({each.seed for each in outcomes})} seeds with 95 % intervals; rises are above the mean of the {WINDOW} "
        f"losses before. New data alone, before any update on them, raise StableAdamW's loss by {shift.text()}."
    )
    return f"{caption}\n\n{report.table(header, rows)}"


def mean_curves(traces: Sequence[Trace], task: Task) -> dict[str, Any]:
    """Return means over seeds of RMS and loss around the first two shifts, for the figure."""
    first, last = task.first_shift - 15, min(task.steps, task.first_shift + task.period + 60)
    curves = {}
    for arm in dict.fromkeys(trace.arm for trace in traces):
        of_arm = [trace for trace in traces if trace.arm == arm]
        both = {"rms": [trace.rms[PATCH_EMBEDDING] for trace in of_arm], "loss": [trace.losses for trace in of_arm]}
        curves[arm] = {name: [round(mean(values), 4) for values in zip(*rows, strict=True)][first:last] for name, rows in both.items()}
    return {"first": first, "arms": curves}


def draw(path: Path, record: dict[str, Any]) -> None:
    """Write a PNG: RMS and loss of the first model around the first two shifts, and the largest rise of each arm for every model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state as in pyplot
    from matplotlib.figure import Figure

    runs = record["runs"]
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.7, 1))[0]
    panels = left.subplots(2, 1, sharex=True)
    curves, task = runs[0]["curves"], Task(**runs[0]["task"])
    for axes, name, label in zip(panels, ("rms", "loss"), ("RMS of the update", "loss"), strict=True):
        for arm in ARMS:
            curve = curves["arms"][arm.name][name]
            axes.plot(range(curves["first"], curves["first"] + len(curve)), curve, color=arm.color, label=arm.name, linewidth=1.3)
        for shift in task.shifts:
            if shift < curves["first"] + len(curves["arms"][ADAMW][name]):
                axes.axvline(shift, color="black", linewidth=0.7, linestyle=":")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].axhline(RMS_THRESHOLD, color="black", linewidth=0.7, linestyle="--")
    panels[0].set_title("RMS of the patch embedding and loss, mean over seeds; data change at dotted lines", fontsize=9)
    panels[0].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.15, 1.0))  # between the first two shifts
    panels[1].set_xlabel("step")
    for axes, run in zip(right.subplots(len(runs), 1, squeeze=False)[:, 0], runs, strict=True):
        for place, arm in enumerate(ARMS):
            rise = interval([each["largest_rise"] for each in run["outcomes"] if each["arm"] == arm.name])
            axes.barh(place, rise.mean, xerr=rise.half_width if math.isfinite(rise.half_width) else None, color=arm.color, capsize=3)
        axes.set_yticks(range(len(ARMS)), [arm.name.replace(", ", ",\n") for arm in ARMS], fontsize=7)
        axes.invert_yaxis()
        axes.set_title(f"Patch embedding: {100 * run['share']:.0f} % of the model", fontsize=8, loc="right")
        axes.set_xlabel("largest rise of the loss", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment; write table, record and figure."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.experiments.spikes", description="Compares loss spikes of AdamW and StableAdamW."
    )
    parser.add_argument("--quick", action="store_true", help=f"a smoke run of seconds: {QUICK.steps} steps, {QUICK_SEEDS} seeds")
    parser.add_argument("--seeds", type=int, help=f"default: {SEEDS}, with --quick {QUICK_SEEDS}")
    parser.add_argument("--output", type=Path, help="folder of all files; default: examples/experiments/results/, and docs/ for the figure")
    options = parser.parse_args(arguments)
    if options.quick and options.output is None:
        parser.error("a --quick run is no result: say with --output where to write it")
    torch.set_num_threads(1)  # matrices are too small for more
    environment = describe(torch.device("cpu"), "examples.experiments.spikes")
    tasks = (QUICK,) if options.quick else TASKS
    traces: list[list[Trace]] = [[] for _ in tasks]
    text = ""
    for seed in range(1, 1 + (options.seeds or (QUICK_SEEDS if options.quick else SEEDS))):  # the task was tuned on seed 0
        for task, of_task in zip(tasks, traces, strict=True):
            of_task += measure(task, seed)
        # After every seed: a run that is interrupted leaves the result of those that it has.
        record = {
            "environment": environment,
            "hyperparameters": {"lr": LR, "beta1": 0.9, "beta2": BETA2, "eps": EPS, "weight_decay": WEIGHT_DECAY, "warm-up": WARM_UP},
            "runs": [run_record(task, of_task) for task, of_task in zip(tasks, traces, strict=True)],
        }
        text = markdown(record)
        report.write(options.output or RESULTS, "spikes", record, text)
        draw(FIGURE if options.output is None else options.output / FIGURE.name, record)
    print(text)


def run_record(task: Task, traces: Sequence[Trace]) -> dict[str, Any]:
    """Return the part of a record that is about one task."""
    sizes = {name: param.numel() for name, param in Transformer(task).named_parameters()}
    return {
        "share": sizes[PATCH_EMBEDDING] / sum(sizes.values()),
        "task": asdict(task),
        "outcomes": [asdict(outcome(trace, task)) for trace in traces],
        "curves": mean_curves(traces, task),
    }


if __name__ == "__main__":
    main()
