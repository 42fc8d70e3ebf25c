"""One call of a backend, cached by `ParamSet` from step to step: it takes the tensors of each step, observes, and updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from sharded_optim.backends import Backend
from sharded_optim.backends.operands import Column, Operands
from sharded_optim.formulas import Statistic
from sharded_optim.sharding import GRADIENT, PARAMETER, Layout, LocalParam
from sharded_optim.step.agreement import NO_SCALER, Agreement, Rules, Scaler
from sharded_optim.step.coefficients import GroupValues, LrScale, OperandGroups, coefficient_table
from sharded_optim.step.compared import ComparedPieces, PieceWeights
from sharded_optim.step.metrics import Update
from sharded_optim.step.rounding_keys import RoundingKeys
from sharded_optim.step.sources import Cut, Source, StepCounters
from sharded_optim.step.state import STEP, Choice
from sharded_optim.step.stateful import StatefulOptimizer
from sharded_optim.step.statistics import Contribution, FixedPoint
from sharded_optim.storage.devices import DeviceCache, capturing, keep, known_on_host, send

__all__ = ["KernelCall"]

LEAVE_PARAMS = {"lr": 0.0, "weight_decay": 0.0}  # hyperparameters with which an update leaves parameters unchanged


class KernelCall:
    """The local parameters that a backend steps in one call: the same format, the same algorithm. Each operand is a piece of a parameter.

    Attributes:
        backend, algorithm, operands: the backend, and the arguments of its calls.
        params: the local parameters.
        pieces: the (local parameter, piece) of each operand.
        places: the slots of the operands in the layout.
        values: the GroupValues of the param groups.
        group_of: index into `values` for each operand.
        members: hyperparameters of these groups and the group of each operand, for the coefficients.
        unit: the unit of all the parameters; see `FlatLayout`.
        buffers: columns that one pass of an update writes and the next one reads.
    """

    buffers: Sequence[Column] = ()

    def __init__(
        self,
        optimizer: StatefulOptimizer,
        layout: Layout,
        backend: Backend,
        choice: Choice,
        rows: Sequence[tuple[int, LocalParam, GroupValues, Tensor]],  # (index in the layout, parameter, group, gradient)
        unit: int,
    ) -> None:
        self.unit = unit
        self.backend = backend
        self.algorithm, fmt, state_formats = choice
        self.rows: Sequence[int] = [row for row, _, _, _ in rows]  # indices into layout.local_params
        entries = [entry for _, entry, _, _ in rows]
        self.params = [entry.param for entry in entries]
        owners = [owner for owner, entry in enumerate(entries) for _ in entry.pieces]
        self.pieces = [(entry, piece) for entry in entries for piece in entry.pieces]
        cut = Cut(owners, [piece for _, piece in self.pieces]) if any(piece.offset is not None for _, piece in self.pieces) else None
        state = [optimizer.state[param] for param in self.params]
        extra = tuple(array.name for array in fmt.extra)
        self._names = (*extra, *(key for _, _, entries in choice.moments for key in entries))
        self._param = Source(entries, PARAMETER, self.params, cut)
        self._grad = Source(entries, GRADIENT, [grad for _, _, _, grad in rows], cut)
        self._state = [Source(entries, f"state {name!r}", [values[name] for values in state], cut) for name in self._names]
        self.operands = Operands(
            segments=[piece.segment for _, piece in self.pieces],
            format=fmt,
            param=self._param.column,
            extra=tuple(source.column for source in self._state[: len(extra)]),
            grad=self._grad.column,
            state_formats=state_formats,
            state=tuple(source.column for source in self._state[len(extra) :]),
        )
        self.device = self.operands.device
        first_piece = layout.first_piece
        self.places = layout.places([first_piece[row] + k for row, entry, _, _ in rows for k in range(len(entry.pieces))], self.device)
        rows_of: dict[GroupValues, list[int]] = {}  # operand indices of each group
        for operand, owner in enumerate(owners):
            rows_of.setdefault(rows[owner][2], []).append(operand)
        numbers = {values: number for number, values in enumerate(rows_of)}
        self.values = list(rows_of)
        self._group_ids = [id(each.group) for each in self.values]
        self.group_of = [numbers[rows[owner][2]] for owner in owners]
        self._firsts = [self.pieces[each[0]][0].param for each in rows_of.values()]  # the first parameter of each group
        self._weights = PieceWeights(self.places.weights, self.group_of, len(rows_of))
        self.members = OperandGroups(
            groups=[values.numbers for values in self.values],
            group_of=None if len(rows_of) == 1 else send(torch.tensor(self.group_of, device="cpu"), self.device),
        )
        self._bounds: list[float] | None = None  # upper bound of each group's statistic
        self._sent_fixed_point: DeviceCache[FixedPoint] = DeviceCache()
        self._fixed_point: FixedPoint | None = None  # format of the last observation
        stored = zip((PARAMETER, *self.algorithm.state), self.operands.formats, strict=True)
        random = [name for name, stored_in in stored if stored_in.is_random]
        self._rounding = RoundingKeys([segment.name for segment in self.operands.segments], self.group_of, random) if random else None
        self._prepare()
        self._owners = None if cut is None else send(torch.tensor(owners, device="cpu"), self.device)
        self._counters = StepCounters(optimizer, self.params, self.device)
        self._log = optimizer.compensation_log
        self._compensations: Sequence[Sequence[Tensor]] = ()  # for each extra array of the format, that array of every parameter
        self._drop_stale_compensation([[values[name] for values in state] for name in extra])
        self._early: tuple[Any, Contribution] | None = None  # (stamp, early observation)

    def _prepare(self) -> None:
        """Do everything that may fail, before the ranks agree: a failure after that would leave this rank behind the others."""
        statistic, members = self.algorithm.statistic, self.members
        observed = [] if statistic is None else [members.formulas(statistic.coefficients, None)]
        updated = members.formulas(self.algorithm.coefficients, 1.0 if statistic is None else statistic.lr_scale)
        self.backend.prepare(self.algorithm, self.operands, [*observed, updated])

    @property
    def steps(self) -> Tensor:
        """Number of steps taken so far by each operand: fp32 (operands,)."""
        return self._counters.steps if self._owners is None else self._counters.steps[self._owners]

    def renew(self, grads: Sequence[Tensor], values: Mapping[int, GroupValues], optimizer: StatefulOptimizer) -> bool:
        """Take the gradients, state and hyperparameters of this step.

        Args:
            grads: the gradients of `params`.
            values: the values of all stepped groups, keyed by id(group).

        Returns:
            Whether the step fits this call; if False, the call must be rebuilt.

        Raises:
            ValueError: a gradient or state cannot be used.
        """
        if not self.take_values(values, optimizer):
            return False
        state: list[Any] = list(map(optimizer.state.get, self.params))
        try:
            counters = list(map(itemgetter(STEP), state))
            columns = []
            for name in self._names:
                columns.append(list(map(itemgetter(name), state)))
        except (KeyError, TypeError):  # an entry, or a parameter's whole state, is missing
            return False
        sources = zip((self._param, self._grad, *self._state), (self.params, grads, *columns), strict=True)
        for source, tensors in sources:
            if not source.renew(tensors):
                return False
        if not self._counters.are(counters):
            if capturing(self.device):
                return False
            self._counters = StepCounters(optimizer, self.params, self.device)
        if self.operands.extra:
            self._drop_stale_compensation(columns[: len(self.operands.extra)])
        keep(self.device, self._counters.steps, self._owners, self.places, self.members.group_of)  # a CUDA graph may read them at replay
        return True

    def take_values(self, values: Mapping[int, GroupValues], optimizer: StatefulOptimizer) -> bool:
        """Take the hyperparameters, keyed by id(group); return False if they choose another algorithm or format."""
        own = list(map(values.__getitem__, self._group_ids))
        if own != self.values:
            for each, param in zip(own, self._firsts, strict=True):
                algorithm, fmt, _ = optimizer.choice_of(param, each.group)
                if algorithm.name != self.algorithm.name or fmt is not self.operands.format:
                    return False
            self.values = own
            self._bounds = None
            self.members = self.members.having([each.numbers for each in own])
        return True

    def observe(self, rules: Rules, scaler: Scaler) -> Contribution:
        """Return this rank's contribution: the early observation if it is still valid, else a new one. In a CUDA graph always a new one."""
        early, self._early = self._early, None
        if early is not None and scaler.scale is None and not capturing(self.device) and early[0] == self._stamp(rules):
            return early[1]
        return self._sums(rules, scaler)

    def observe_early(self, rules: Rules) -> None:
        """Observe gradients before the step, which uses the result unless gradients, state or hyperparameters have changed by then."""
        observed = self._stamp(rules), replace(self._sums(rules, NO_SCALER), is_early=True)
        self.release()
        self._early = observed

    def update(
        self,
        agreement: Agreement | None,
        proceed: Tensor | None,  # bool (); None: the step happens
        scaler: Scaler,
        *,
        accumulate: bool,  # write the state only, not the parameters
    ) -> Update:
        """Write parameters and state, and count the step, if it happens."""
        scale, statistic = 1.0, self.algorithm.statistic
        if agreement is not None and statistic is not None:
            assert self._fixed_point is not None, "observe sets it before an agreement"
            scale = LrScale(of_mean=statistic.lr_scale, sums=agreement.sums(self.places, self._fixed_point))
        members = self.members
        if accumulate:
            members = members.having([{**group, **LEAVE_PARAMS} for group in members.groups])
        table = coefficient_table(self.algorithm.coefficients, members, self.steps, scale, backend=self.backend, operands=self.operands)
        grad_scale = scaler.inverse(self.device)
        happens = None if proceed is None else proceed.to(self.device)  # parameters may be on several devices
        keys = self._rounding_keys(PARAMETER, *self.algorithm.state)
        self.backend.update(self.algorithm, self.operands, table, happens, grad_scale, keys)
        return self._finish(table, happens, grad_scale)

    def _rounding_keys(self, *values: str) -> Tensor | None:
        """Return the random keys of the values that are rounded stochastically; None if there is no such value."""
        return None if self._rounding is None else self._rounding.of(values, self.members.groups, self.steps)

    def _finish(self, table: Tensor, happens: Tensor | None, grad_scale: Tensor | None) -> Update:
        """Advance the step counters after the parameters were written, and return the record of the update."""
        self.backend.advance(self._counters.steps, happens)
        for compensations in self._compensations:
            self._log.record(self.params, compensations)
        return Update(
            algorithm=self.algorithm,
            pieces=self.pieces,
            format=self.operands.format,
            state_formats=self.operands.state_formats,
            coefficients=table,
            proceed=happens,
            grad_scale=grad_scale,
        )

    def release(self) -> None:
        """Release the references to gradients, state and the early observation; the next step looks them up again."""
        self._early = None
        self._compensations = ()
        for source in (self._grad, *self._state):
            source.column.release()

    def _sums(self, rules: Rules, scaler: Scaler) -> Contribution:
        """Sum the statistic of each operand, or, without a statistic, only check whether its gradient is finite."""
        statistic = self.algorithm.statistic
        self._fixed_point = fixed_point = self._fixed_point_of(statistic)
        if statistic is None:
            table = torch.empty(len(self.pieces), 0, dtype=torch.float32, device=self.device)
        else:
            table = coefficient_table(statistic.coefficients, self.members, self.steps, backend=self.backend, operands=self.operands)
        grad_scale = scaler.inverse(self.device)
        observed = self.backend.observe(statistic, self.operands, table, fixed_point.limits, fixed_point.scales, grad_scale)
        compared = self._compared(rules)
        difference = 0 if self._weights.are_zero else compared.difference(self._weights)
        return Contribution(places=self.places, fixed_point=fixed_point, compared=compared, difference=difference, observed=observed)

    def _stamp(self, rules: Rules) -> tuple[Any, ...]:
        """Return a value that changes with gradients, state, hyperparameters and options, to the extent that torch counts writes."""
        sources = (self._grad, *self._state)
        versions = tuple((tensor.data_ptr(), tensor._version) for source in sources for tensor in source.column.wholes)
        compared = self._compared(rules)
        return versions, compared.steps, [each.key(compared.options, None) for each in compared.values]

    def _fixed_point_of(self, statistic: Statistic | None) -> FixedPoint:
        """Return the fixed-point formats of the operands' statistics; with k = 0 if there is no statistic."""
        if self._bounds is None:
            self._bounds = [0.0] * len(self.values) if statistic is None else list(map(statistic.bound, self.members.groups))
        bounds = self._bounds

        def make() -> FixedPoint:
            numels = [segment.tensor_numel for segment in self.operands.segments]
            return FixedPoint.of([bounds[group] for group in self.group_of], numels, self.device)

        return self._sent_fixed_point.of(bounds, self.device, make)

    def _compared(self, rules: Rules) -> ComparedPieces:
        """Return the values of the pieces that ranks compare."""
        steps = self.steps.tolist() if known_on_host(self._counters.steps) else None
        return ComparedPieces(values=self.values, group_of=self.group_of, options=rules.options, steps=steps)

    def _drop_stale_compensation(self, compensations: Sequence[Sequence[Tensor]]) -> None:
        """Store the extra arrays of the format, and zero those whose parameter was written to since the last step."""
        self._compensations = compensations
        for each in compensations:
            self._log.drop_stale(self.params, each)
