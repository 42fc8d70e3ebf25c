"""What an optimizer can tell about its last step. Used by the engine, for Composer's monitors and for `metrics()`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sharded_optim.sharding import Layout, LocalParam
from sharded_optim.step import metrics
from sharded_optim.step.param_set import ParamSet

__all__ = ["Reports"]

Rows = list[tuple[metrics.Update, int]]


class Reports:
    """Reports of sets of parameters, by the names under which they were asked for.

    Attributes:
        rows: of the last step, by a parameter's id; made when asked for. To be None when a step begins.
    """

    def __init__(self) -> None:
        self._reported: dict[str, tuple[Tensor, int]] = {}  # (parameter, which of its pieces) by the name of its metrics
        self.rows: dict[int, Rows] | None = None

    def rms(self, sets: Iterable[ParamSet]) -> dict[str, float]:
        """The root mean of the statistic of each tensor, as ranks found it together. Waits for the device."""
        agreements = [each.agreement for each in sets if each.agreement is not None]
        report: dict[str, float] = {}
        for agreement in sorted(agreements, key=lambda agreement: agreement.number):
            report |= {f"rms/{name}": mean**0.5 for name, mean in agreement.named_means().items()}
        return report

    def of_param(self, entry: LocalParam, name: str, state: dict[str, Any], sets: Iterable[ParamSet]) -> dict[str, Tensor]:
        """What `metrics.report` says of each piece of a parameter."""
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
        """For each piece of a parameter, the update that the last step wrote it by, and its row there."""
        if self.rows is None:
            self.rows = {}
            for each in sorted((each for each in sets if each.updates[0] >= 0), key=lambda each: each.updates[0]):
                rows: dict[int, Rows] = {id(param): [] for param in each.layout.params}
                for update in each.updates[1]:
                    for row, (entry, _) in enumerate(update.pieces):
                        rows[id(entry.param)].append((update, row))
                self.rows |= rows
        return self.rows.get(id(param), [])
