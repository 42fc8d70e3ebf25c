"""Reports about the last step, for Composer's monitors and for `metrics()`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sharded_optim.formulas import Algorithm
from sharded_optim.sharding import Layout, LocalParam
from sharded_optim.step import metrics, step_metrics
from sharded_optim.step.coefficients import GroupValues
from sharded_optim.step.param_set import ParamSet, ParamSets
from sharded_optim.step.stateful import StatefulOptimizer

__all__ = ["ReportingOptimizer", "Reports"]

Rows = list[tuple[metrics.Update, int]]


class Reports:
    """Computes reports of param sets, and records the names under which they were asked for.

    Attributes:
        rows: of the last step, by a parameter's id; made when asked for. To be None when a step begins.
        times: of the last step; see `step_metrics.step_performance`.
        values: of the param groups in the last step, by their ids.
        grad_norm: of the last step, before clipping; None if it was not computed.
    """

    def __init__(self) -> None:
        self._reported: dict[str, tuple[Tensor, int]] = {}  # (parameter, which of its pieces) by the name of its metrics
        self.rows: dict[int, Rows] | None = None
        self.times: tuple[float, ...] | None = None
        self.grad_norm: Tensor | None = None
        self.values: dict[int, GroupValues] = {}

    def metrics(
        self, sets: Sequence[ParamSet], param_groups: Sequence[dict[str, Any]], algorithms: Iterable[Algorithm]
    ) -> dict[str, float]:
        """Return the metrics of the last step; see `ReportingOptimizer.metrics`. Waits for the device."""
        norm = {} if self.grad_norm is None else {"grad_norm": float(self.grad_norm)}
        verdicts = [bool(each.agreement.verdict.proceed) for each in sets if each.agreement is not None]
        values = self.values if any(verdicts) or not verdicts else {}  # on a device the host has not known of a skipped step before
        return step_metrics.tensor_metrics(sets, algorithms) | step_metrics.group_metrics(values, param_groups) | norm

    def forget(self, sets: Iterable[ParamSet]) -> None:
        """Drop all that is known of the last step, as where a state dict is loaded."""
        self.rows, self.times, self.grad_norm, self.values = None, None, None, {}
        for each in sets:
            each.forget_reports()

    def param_report(self, entry: LocalParam, name: str, state: dict[str, Any], sets: Iterable[ParamSet]) -> dict[str, Tensor]:
        """Return `metrics.report` of each piece of a parameter."""
        result = {}
        last = self._updates_of(entry.param, sets) or [None] * len(entry.pieces)
        for index, (piece, update) in enumerate(zip(entry.pieces, last, strict=True)):
            called = name if piece.offset is None else piece.segment.name
            self._reported[called] = (entry.param, index)
            result |= {f"{kind}/{called}": value for kind, value in metrics.report(entry, piece, state, update).items()}
        return result

    def pre_reduced(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """See `metrics.pre_reduce`."""
        return metrics.pre_reduce(optimizer_metrics, self._reported)

    def reduced(self, optimizer_metrics: dict[str, Any], layout: Layout, process_group: dist.ProcessGroup | None) -> dict[str, Any]:
        """See `metrics.dist_reduce`. A collective."""
        places = dict(zip(layout.params, layout.first_piece, strict=True))
        index_of = {name: places[param] + index for name, (param, index) in self._reported.items() if param in places}
        return metrics.dist_reduce(optimizer_metrics, layout, index_of.get, process_group)

    def _updates_of(self, param: Tensor, sets: Iterable[ParamSet]) -> Rows:
        """Return, for each piece of a parameter, the update of the last step that wrote it, and its row there."""
        if self.rows is None:
            self.rows = {}
            sets = list(sets)
            for each in sets:
                each.measures = True
            for each in sorted((each for each in sets if each.updates[0] >= 0), key=lambda each: each.updates[0]):
                rows: dict[int, Rows] = {id(param): [] for param in each.layout.params}
                for update in each.updates[1]:
                    for row, (entry, _) in enumerate(update.pieces):
                        rows[id(entry.param)].append((update, row))
                self.rows |= rows
        return self.rows.get(id(param), [])


class ReportingOptimizer(StatefulOptimizer):
    """The public methods of an optimizer that report about its last step."""

    _sets: ParamSets
    _reports: Reports
    _skipped: int | Tensor

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were skipped because a gradient was not finite. Waits for the device.

        DeepSpeed's ZeRO steps each param group, or sub-group, by itself, and each counts; steps that DeepSpeed skips do not.
        """
        return int(self._skipped)

    def metrics(self) -> dict[str, float]:
        """Return metrics of the last step, already reduced over all ranks. Waits for the device.

        NAME is a tensor of the model, also of those that other ranks hold, without wrappers' prefixes. GROUP is a param group's `name`, or
        its index.

        Returns:
            `skipped_steps`: since the beginning.
            `rms/NAME`: the root mean of the statistic over the whole tensor, of what has elements and had a gradient and whose algorithm
                has a statistic. NaN where it was not finite.
            `clip_factor/NAME`: the factor in (0, 1] by which update clipping has multiplied its learning rate.
            `clipped_share`: share of these tensors whose factor was below 1.
            `non_finite/NAME`: number of its pieces, over all ranks, whose gradient or statistic was not finite, where there was one;
                `non_finite_tensors`: number of such tensors. Neither is known where ranks do not agree (`nonfinite="allow"`).
                `non_finite_ranks` has the ranks.
            `lr/GROUP`, `weight_decay/GROUP`: learning rate, and the share that the step has taken away of each parameter with a gradient,
                before clipping; L2 decay has none. A learning rate that is a tensor on a device is read now.
            `grad_norm`: norm of all gradients before clipping, where `so.clip_grad_norm_` was given the optimizer before the step.
        """
        return {"skipped_steps": float(self.skipped_steps)} | self._reports.metrics(
            list(self._sets), self.param_groups, self.algorithms.values()
        )

    def non_finite_ranks(self) -> dict[str, list[int]]:
        """Return on which ranks a tensor was not finite in the last step: the ranks of the process group that hold such a piece of it.

        A collective, in which every rank must take part, but only where `metrics()` names a tensor as `non_finite/NAME`, which it does on
        all ranks or on none. Where a wrapper reduces gradients over ranks, a piece is not finite on its holder, whichever rank's data was
        the cause.

        Returns:
            ranks, ascending, by NAME; empty where all was finite, or ranks do not agree.
        """
        return step_metrics.non_finite_ranks(self._sets)

    def performance(self) -> dict[str, float]:
        """Return what the last step took of this rank: nothing on a GPU, where the host does not know, nor where parts are stepped alone.

        Returns:
            `ms/{observe,agree,matrices,update}`: milliseconds of each part of the step; of `agree`, the wait for other ranks included.
            `bytes`: that observing and updating have read and written.
            `gb_per_s`: these bytes over the time of the two; not of Muon, whose first pass is timed with `matrices`.
        """
        return step_metrics.step_performance(list(self._sets), self._reports.times)

    def report_per_parameter_metrics(self, param: Tensor, name: str, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Report what the last step did to one parameter, as Composer's OptimizerMonitor asks for it. No communication.

        Returns:
            `optimizer_metrics`, to which this adds what `metrics.report` says of this rank's piece, under
            `l2_norm/{moment,param,update,grad}/NAME` and `cosine/{update_grad,moment_grad}/NAME`: float64 tensors of one element. NAME is
            `name`, or for a flat parameter that of each tensor in it.

        Raises:
            ValueError: the gradient is not laid out like the parameter.
        """
        group = self._group_with(param)
        if group is not None:
            entry = self.describe_param(param, name, group)
            optimizer_metrics |= self._reports.param_report(entry, name, self.state.get(param, {}), self._sets)
        return optimizer_metrics

    def pre_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Turn norms into squares and cosines into dot products, which add up over ranks, in place. See `metrics.py`."""
        optimizer_metrics |= self._reports.pre_reduced(optimizer_metrics)
        return optimizer_metrics

    def dist_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Reduce the metrics of pieces to those of whole tensors, in place: one all-reduce, in which every rank must take part.

        The first call may exchange the layout before. See `metrics.dist_reduce`.
        """
        process_group = self.own_group()
        layout = self._sets.layout_of_all_ranks(self, process_group)
        optimizer_metrics |= self._reports.reduced(optimizer_metrics, layout, process_group)
        return optimizer_metrics
