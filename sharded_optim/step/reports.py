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
    """Computes reports of param sets, and records the names under which they were requested.

    Attributes:
        rows: the (update, row in it) of each piece of a parameter in the last step, keyed by id(param). Built on demand; the engine
            resets it to None when a step begins.
        times: the times of the last step; see `step_metrics.step_performance`.
        values: the GroupValues of the param groups in the last step, keyed by id(group).
        grad_norm: norm of the last step's gradients before clipping; None if it was not computed.
    """

    def __init__(self) -> None:
        self._reported: dict[str, tuple[Tensor, int]] = {}  # (parameter, index of its piece), keyed by the name of the metrics
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
        values = self.values if any(verdicts) or not verdicts else {}  # on a device, the host learns only here that a step was skipped
        return step_metrics.tensor_metrics(sets, algorithms) | step_metrics.group_metrics(values, param_groups) | norm

    def forget(self, sets: Iterable[ParamSet]) -> None:
        """Drop everything about the last step, for example when a state dict is loaded."""
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
        """Return the result of `metrics.pre_reduce` for the reported names."""
        return metrics.pre_reduce(optimizer_metrics, self._reported)

    def reduced(self, optimizer_metrics: dict[str, Any], layout: Layout, process_group: dist.ProcessGroup | None) -> dict[str, Any]:
        """Return the result of `metrics.dist_reduce` for the reported names. A collective."""
        places = dict(zip(layout.params, layout.first_piece, strict=True))
        index_of = {name: places[param] + index for name, (param, index) in self._reported.items() if param in places}
        return metrics.dist_reduce(optimizer_metrics, layout, index_of.get, process_group)

    def _updates_of(self, param: Tensor, sets: Iterable[ParamSet]) -> Rows:
        """Return, for each piece of a parameter, the update of the last step that wrote it, and the piece's row in that update."""
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
    """The public methods of an optimizer that report on its last step."""

    _sets: ParamSets
    _reports: Reports
    _skipped: int | Tensor

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were skipped because a gradient was not finite. Waits for the device.

        DeepSpeed's ZeRO steps each param group, or sub-group, separately, and each such step counts; steps that DeepSpeed itself skips do
        not.
        """
        return int(self._skipped)

    def metrics(self) -> dict[str, float]:
        """Return metrics of the last step, already reduced over all ranks. Waits for the device.

        NAME is the name of a tensor of the model, without wrapper prefixes, on whichever rank the tensor is. GROUP is a param group's
        `name`, or its index.

        Returns:
            `skipped_steps`: number of skipped steps since construction.
            `rms/NAME`: root of the statistic's mean over the whole tensor, for non-empty tensors with a gradient whose algorithm has a
                statistic. NaN if it was not finite.
            `clip_factor/NAME`: factor in (0, 1] by which update clipping has multiplied the tensor's learning rate.
            `clipped_share`: share of these tensors whose factor was below 1.
            `non_finite/NAME`: number of the tensor's pieces, over all ranks, whose gradient or statistic was not finite, if any;
                `non_finite_tensors`: number of such tensors. Neither is known if ranks do not agree (`nonfinite="allow"`).
                `non_finite_ranks` returns the ranks.
            `lr/GROUP`, `weight_decay/GROUP`: learning rate, and the share by which the step has shrunk each parameter with a gradient,
                before clipping; absent for L2 decay. A learning rate that is a tensor on a device is read now.
            `grad_norm`: norm of all gradients before clipping, if the optimizer was passed to `so.clip_grad_norm_` before the step.
        """
        return {"skipped_steps": float(self.skipped_steps)} | self._reports.metrics(
            list(self._sets), self.param_groups, self.algorithms.values()
        )

    def non_finite_ranks(self) -> dict[str, list[int]]:
        """Return the ranks of the process group that hold a non-finite piece of a tensor in the last step.

        A collective, in which every rank must take part, but only if `metrics()` has a `non_finite/NAME`, which it has on all ranks or on
        none. If a wrapper reduces gradients over ranks, the holder of a piece is listed, whichever rank's data was the cause.

        Returns:
            The ranks, ascending, keyed by NAME; empty if everything was finite, or if ranks do not agree.
        """
        return step_metrics.non_finite_ranks(self._sets)

    def performance(self) -> dict[str, float]:
        """Return time and memory traffic of the last step on this rank; empty on a GPU, where the host cannot time, and for partial steps.

        Returns:
            `ms/{observe,agree,matrices,update}`: milliseconds of each phase of the step; `agree` includes the wait for other ranks.
            `bytes`: bytes read and written by observe and update.
            `gb_per_s`: these bytes over the time of the two phases; absent for Muon, whose first pass is timed with `matrices`.
        """
        return step_metrics.step_performance(list(self._sets), self._reports.times)

    def report_per_parameter_metrics(self, param: Tensor, name: str, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Report what the last step did to one parameter, in the form that Composer's OptimizerMonitor requests. No communication.

        Returns:
            `optimizer_metrics`, updated in place with the results of `metrics.report` for this rank's piece:
            `l2_norm/{moment,param,update,grad}/NAME` and `cosine/{update_grad,moment_grad}/NAME`, float64 tensors of one element. NAME is
            `name`, or for a flat parameter the name of each tensor in it.

        Raises:
            ValueError: the gradient is not laid out like the parameter.
        """
        group = self._group_with(param)
        if group is not None:
            entry = self.describe_param(param, name, group)
            optimizer_metrics |= self._reports.param_report(entry, name, self.state.get(param, {}), self._sets)
        return optimizer_metrics

    def pre_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Turn norms into squares and cosines into dot products, which can be summed over ranks, in place. See `metrics.pre_reduce`."""
        optimizer_metrics |= self._reports.pre_reduced(optimizer_metrics)
        return optimizer_metrics

    def dist_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Reduce the metrics of pieces to those of whole tensors, in place: one all-reduce, in which every rank must take part.

        The first call may also exchange the layout. See `metrics.dist_reduce`.
        """
        process_group = self.own_group()
        layout = self._sets.layout_of_all_ranks(self, process_group)
        optimizer_metrics |= self._reports.reduced(optimizer_metrics, layout, process_group)
        return optimizer_metrics
