"""Metrics of the last step, derived from its sums, coefficients and times. See `metrics` and `performance` of `ReportingOptimizer`.

Nothing is computed before it is requested, and only `non_finite_ranks` communicates: all else is in the result of the step's all-reduce.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from sharded_optim.formulas import Algorithm, Statistic
from sharded_optim.formulas.weight_decay import L2, decay_amount
from sharded_optim.sharding.names import names_without_wrappers
from sharded_optim.sharding.ranks import gather_objects
from sharded_optim.step.agreement import Agreement
from sharded_optim.step.coefficients import GroupValues
from sharded_optim.step.disagreement import non_finite_here
from sharded_optim.step.kernel_call import KernelCall
from sharded_optim.step.param_set import ParamSet

__all__ = ["group_metrics", "non_finite_ranks", "step_performance", "tensor_metrics"]

PARTS = ("observe", "agree", "matrices", "update")


def tensor_metrics(sets: Iterable[ParamSet], algorithms: Iterable[Algorithm]) -> dict[str, float]:
    """Return `rms/NAME`, `clip_factor/NAME`, `non_finite/NAME`, and `clipped_share` and `non_finite_tensors` of the whole model.

    Waits for the device. Empty if the step had no agreement.

    Args:
        algorithms: the algorithms that the optimizer may run on any rank.
    """
    rms: dict[str, float] = {}
    factors: dict[str, float] = {}
    non_finite: dict[str, float] = {}
    statistics = {each.statistic for each in algorithms if each.statistic is not None}
    agreed = _agreed(sets)
    if not agreed:
        return {}
    for agreement, calls in agreed:
        names = names_without_wrappers(agreement.layout.names)
        means = agreement.named_means()
        rms |= {f"rms/{names[name]}": mean**0.5 for name, mean in means.items()}
        if bool(agreement.verdict.proceed):
            factors |= {f"clip_factor/{names[name]}": factor for name, factor in _clip_factors(means, calls, statistics).items()}
        counts = agreement.non_finite_pieces().tolist()
        pairs = zip(agreement.layout.names, counts, strict=True)
        non_finite |= {f"non_finite/{names[name]}": float(count) for name, count in pairs if count}
    share = {"clipped_share": sum(factor < 1.0 for factor in factors.values()) / len(factors)} if factors else {}
    return rms | factors | share | non_finite | {"non_finite_tensors": float(len(non_finite))}


def non_finite_ranks(sets: Iterable[ParamSet]) -> dict[str, list[int]]:
    """Return the ranks whose piece of a tensor was not finite, keyed by the NAME of `non_finite/NAME`. See `ReportingOptimizer`.

    The all-reduced vector has the number of such pieces but not their ranks, which would make it grow with the number of ranks. So ranks
    communicate here, if a tensor was not finite, and not in every step.
    """
    ranks: dict[str, list[int]] = {}
    for agreement, _ in _agreed(sets):
        layout = agreement.layout
        if agreement.non_finite_pieces().any():  # the same on all ranks
            names = names_without_wrappers(layout.names)
            here = non_finite_here(layout, agreement.contributions)
            for rank, on_rank in enumerate(gather_objects(here, layout.process_group)):
                for name in on_rank:
                    ranks.setdefault(names[name], []).append(rank)
    return ranks


def _agreed(sets: Iterable[ParamSet]) -> list[tuple[Agreement, Sequence[KernelCall]]]:
    """Return the (agreement, kernel calls) pairs of the last step in the order of the agreements, which is the same on all ranks."""
    pairs = [(each.agreement, each.calls) for each in sets if each.agreement is not None]
    return sorted(pairs, key=lambda pair: pair[0].number)


def _clip_factors(means: Mapping[str, float], calls: Sequence[KernelCall], statistics: Collection[Statistic]) -> dict[str, float]:
    """Return the learning-rate factor of each tensor, keyed by name.

    The algorithm and hyperparameters of tensors that only other ranks hold are unknown here: factors that depend on them are omitted.
    """
    factors: dict[str, float] = {}
    if len(statistics) == 1:
        (statistic,) = statistics
        factors = {name: factor for name, mean in means.items() if (factor := _factor(statistic, {}, mean)) is not None}
    for call in calls:
        if call.algorithm.statistic is not None:
            for (_, piece), group in zip(call.pieces, call.group_of, strict=True):
                name = piece.segment.name
                factor = _factor(call.algorithm.statistic, call.members.groups[group], means[name]) if name in means else None
                if factor is not None:
                    factors[name] = factor
    return factors


def _factor(statistic: Statistic, group: Mapping[str, Any], mean: float) -> float | None:
    try:
        return float(statistic.lr_scale(group, mean))  # pyright: ignore[reportArgumentType]  # a float for a float
    except KeyError:
        return None


def group_metrics(stepped: Mapping[int, GroupValues], param_groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return `lr/GROUP` and `weight_decay/GROUP` of the param groups of the last step.

    GROUP is the group's `name`, or its index if it has no unique name. The decay is the share by which the step has shrunk each parameter
    with a gradient, before update clipping; L2 decay has none, because it acts through the gradient.

    Args:
        stepped: the GroupValues in that step, keyed by id(group).
        param_groups: the optimizer's param groups.
    """
    metrics: dict[str, float] = {}
    names = [group.get("name") for group in param_groups]
    for index, group in enumerate(param_groups):
        if id(group) in stepped:
            numbers = stepped[id(group)].numbers
            lr = float(numbers["lr"])
            name = group.get("name")
            name = index if name is None or names.count(name) > 1 else name
            metrics[f"lr/{name}"] = lr
            if numbers["decay_form"] != L2:
                metrics[f"weight_decay/{name}"] = float(decay_amount({**numbers, "lr": lr}) or 0.0)  # type: ignore[arg-type]  # a float for floats
    return metrics


def step_performance(sets: Sequence[ParamSet], times: Sequence[float] | None) -> dict[str, float]:
    """Return `ms/PART`, `bytes` and `gb_per_s` of this rank's last step; empty unless all of it ran on the CPU.

    Args:
        times: when the step began, and when it had observed, agreed, exchanged matrices and updated, in seconds; None without a step.
    """
    stepped = [each for each in sets if each.updates[0] >= 0]
    if times is None or any(call.device.type != "cpu" for each in stepped for call in each.calls):
        return {}
    metrics = {f"ms/{part}": 1e3 * (end - begin) for part, (begin, end) in zip(PARTS, pairwise(times), strict=True)}
    moved = 0.0
    for each in stepped:
        contributions = [] if each.agreement is None else each.agreement.contributions
        # Without an agreement, nothing was observed.
        early = [contribution.is_early for contribution in contributions] or [True] * len(each.calls)
        for call, is_early in zip(each.calls, early, strict=True):
            moved += _bytes_moved(call, observes=not is_early, updates=bool(each.updates[1]))
    metrics["bytes"] = moved
    seconds = (metrics["ms/observe"] + metrics["ms/update"]) / 1e3
    if seconds and not any(call.buffers for each in stepped for call in each.calls):  # Muon's directions are timed with the exchange
        metrics["gb_per_s"] = moved / seconds / 1e9
    return metrics


def _bytes_moved(call: KernelCall, *, observes: bool, updates: bool) -> int:
    """Return the number of bytes that a kernel call reads and writes, in observation and in every pass of its update."""
    elements = sum(piece.segment.numel for _, piece in call.pieces)
    operands, columns = call.operands, []
    if observes:
        columns += [operands.grad, *(operands.state if call.algorithm.statistic is not None else ())]
    if updates:
        columns += [operands.grad, *2 * (*operands.written, *call.buffers)]
    return elements * sum(column.dtype.itemsize for column in columns)
