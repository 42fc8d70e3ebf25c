"""The one torch.optim.Optimizer of the library. Its step reads observe, agree, update.

    grad, state -> observe -> per-tensor sums -> agree (one all-reduce) -> per-tensor learning-rate scale -> update -> param, state

The public classes in `optimizers.py` give it an algorithm and defaults.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim import consensus, metrics, param_groups, statistics
from sharded_optim.algorithms import Choose
from sharded_optim.backends import AUTO, candidates
from sharded_optim.batches import Batch, Batches
from sharded_optim.coefficients import LrScale, coefficient_table, host_value, known_on_host
from sharded_optim.consensus import INVALID, PRESENT, REPLACES, Verdict
from sharded_optim.devices import capturing, refuse_to_capture
from sharded_optim.layouts import Layouts
from sharded_optim.options import MOST_SKIPPED, NonFinite, Params
from sharded_optim.ranks import gather_messages, own_process_group
from sharded_optim.sharding import FlatLayout, Layout, gradients_of
from sharded_optim.sharding.ddp import JoinGuard
from sharded_optim.state import called_to_allocate
from sharded_optim.stateful import StatefulOptimizer

__all__ = ["Engine", "StepListener"]

LEAVE_PARAMS = {"lr": 0.0, "weight_decay": 0.0}  # hyperparameters with which an update writes state alone


@dataclass(frozen=True, kw_only=True)
class _Observation:
    """What this rank brings to an agreement."""

    batches: Sequence[Batch] = ()
    contributions: Sequence[statistics.Contribution] = ()  # of each batch
    failure: Exception | None = None  # or why it brings nothing


class StepListener(Protocol):
    """Hears how far a step is."""

    def updating(self) -> None:
        """The step happens, as far as the host knows. Not called where it does not."""

    def updated(self, unit: int) -> None:
        """The parameters of a unit that this rank steps have their new values; see `FlatLayout`. Units come in order."""


class Engine(StatefulOptimizer):
    """Steps an `Algorithm` on whatever shard of the parameters this rank holds.

    Args:
        params: as for every torch optimizer: tensors, (name, tensor) tuples, or dicts of param groups.
        defaults: hyperparameters of the param groups.
        algorithm: chooses the math of a param group.
        max_lr: reference learning rate of groups that do not bring their own `max_lr`; None takes each group's `lr`.
        options: see `EngineOptions` and `SwitchOptions`.

    Attributes:
        optimizer_accumulation: while True, what is stepped inside backward (gradient release) updates its state alone, not the parameter:
            set it during all but the last micro-batch. As in optimi, each of them counts as a step of the moments.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf and leaves the gradients alone

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        algorithm: Choose,
        max_lr: float | None = None,
        state_dtype: torch.dtype | str | None = None,
        backend: str = AUTO,
        nonfinite: NonFinite | None = None,
        max_skipped_steps: int | None = MOST_SKIPPED,
        process_group: dist.ProcessGroup | None = None,
        kahan_sum: bool | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        foreach: bool | None = None,
        triton: bool | None = None,
        gradient_release: bool = False,
        layout: FlatLayout | None = None,
    ) -> None:
        if nonfinite is not None:
            self.nonfinite = nonfinite  # checked before anything is made
        self.max_skipped_steps = max_skipped_steps
        if gradient_release and foreach:
            warnings.warn("gradient_release=True steps what a backward hook brings; foreach=True has no effect", UserWarning, stacklevel=3)
        self.gradient_release = gradient_release
        self.optimizer_accumulation = False
        self._backend_names = candidates(backend, triton)
        self._foreach = foreach is not False
        self._skipped: int | Tensor = 0
        self._has_stepped = False
        self._listener: StepListener | None = None
        defaults = defaults | {"kahan_sum": kahan_sum, "stochastic_rounding": stochastic_rounding, "rounding_seed": int(rounding_seed)}
        super().__init__(params, defaults, algorithm=algorithm, state_dtype=state_dtype or torch.float32, max_lr=max_lr, layout=layout)
        self.process_group = process_group
        self._statistic = algorithm(self.param_groups[0]).statistic
        # Where ranks agree on something anyway, skipping together costs nothing; elsewhere it would cost a collective.
        self.nonfinite = nonfinite or ("skip" if self._statistic else "allow")

    # ------------------------------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, param: Tensor | Sequence[Tensor] | None = None) -> Any:
        """Step once: on every rank, or on none.

        Args:
            closure: re-evaluates the model and returns the loss.
            param: step this parameter, or these, alone: what gradient release does inside backward. Where ranks agree on something,
                every rank of the process group must step the same parameters in the same order.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: bad input. On every rank where ranks agree in this step, else on this one.
            FloatingPointError: a gradient was not finite and `nonfinite="raise"`, or `max_skipped_steps` steps in a row were skipped. On
                every rank, naming tensors and ranks.
        """
        loss = None
        if closure is not None:
            if param is not None:
                raise ValueError("step takes a closure or a param, not both: a closure is for the whole model")
            with torch.enable_grad():
                loss = closure()
        if self._is_allocation_step():
            self.init_state()
            return loss
        only = None if param is None else (param,) if isinstance(param, Tensor) else tuple(param)
        self._raise_deferred(only)
        if self._agrees and self.layout is None:  # DistributedDataParallel holds no flat parameters
            self._join_guard.check((param for group in self.param_groups for param in group["params"]), id(self._layouts.last))
        process_group = self._own_group() if self._agrees else None
        layout = self._layouts.current(
            self.param_groups,
            only,
            self.describe_param,
            agree=self._agrees,
            process_group=process_group,
            confirm=self._confirm_replacement,
        )
        self._forget_dropped_layouts()
        self._given.clear()  # whoever replaces parameters from now on is a user
        observation = self._observe(layout)
        if only is None and observation.batches:  # without a gradient, after gradient release, the reports of its steps stay
            self._forget_reports(layout)
        try:
            proceed, agreement = self._agree(layout, observation)
            if not self._has_stepped and only is None:
                self._warn_of_no_gradients(layout, observation, agreement)
            self._update(layout, observation.batches, proceed, agreement, accumulate=only is not None and self.optimizer_accumulation)
        finally:
            self._observed_early.clear()
            for batch in observation.batches:
                batch.release()
        return loss

    def listen(self, listener: StepListener) -> None:
        """Tell it of every step from now on."""
        self._listener = listener

    @torch.no_grad()
    def observe_unit(self, unit: int) -> None:
        """Look at the gradients of a unit before the step, as soon as they are complete. No communication.

        The next step of all parameters uses what it found, unless gradients, state or hyperparameters have changed by then.
        """
        layout = self._layouts.last
        if layout is None or layout.is_global != self._agrees or not self._agrees:
            return
        if not layout.describes([param for group in self.param_groups for param in group["params"]]):
            return
        self._observed_early = {batch: found for batch, found in self._observed_early.items() if batch.unit != unit}
        try:
            batches = self._batches.of_unit(self, layout, unit)
        except ValueError:  # the step says so, on all ranks
            return
        for batch in batches:
            self._observed_early[batch] = batch.stamp(self._compared_options), self._sums(batch)
            batch.release()

    def zero_grad(self, set_to_none: bool = True, param: Tensor | None = None) -> None:
        """As in torch; or of one parameter alone."""
        if param is None:
            super().zero_grad(set_to_none)
        elif set_to_none:
            param.grad = None
        elif param.grad is not None:
            param.grad = torch.zeros_like(param.grad)

    @property
    def _agrees(self) -> bool:
        """Whether a step hears from the other ranks."""
        return self._statistic is not None or self.nonfinite != "allow"

    def _observe(self, layout: Layout) -> _Observation:
        """Look at gradients and state, and sum what the ranks must agree on. Writes no values."""
        try:
            grads = gradients_of(layout)
            groups = self._layouts.groups_of(self.param_groups, layout)
            stepped = set(map(id, groups))
            for index, group in enumerate(self.param_groups):
                if id(group) in stepped:  # schedulers and users write to them
                    self._check_group(group, f"param_groups[{index}]", scheduled=True)
            batches = self._batches.current(self, layout, groups, grads)
            if self.gradient_release and not batches and hasattr(self, "found_inf"):
                raise ValueError(
                    "GradScaler stepped an optimizer whose gradients were released in backward, still scaled; use one of the two"
                )
            return _Observation(batches=batches, contributions=[self._contribution(batch) for batch in batches] if self._agrees else [])
        except Exception as failure:  # the other ranks must hear of it before this one raises
            self._batches.forget(layout)
            return _Observation(failure=failure)

    def _contribution(self, batch: Batch) -> statistics.Contribution:
        """What this rank brings for the operands of a batch: as it was observed early, where that is still true, and in every replay."""
        stamp, early = self._observed_early.get(batch, (None, None))
        if (
            early is not None
            and not capturing(batch.device)
            and getattr(self, "grad_scale", None) is None
            and stamp == batch.stamp(self._compared_options)
        ):
            return early
        return self._sums(batch)

    def _sums(self, batch: Batch) -> statistics.Contribution:
        """Sum the statistic of each operand, or only see whether its gradient is finite."""
        statistic = self._statistic
        fixed_point = batch.fixed_point(statistic)
        if statistic is None:
            table = torch.empty(len(batch.pieces), 0, dtype=torch.float32, device=batch.device)
        else:
            table = coefficient_table(statistic.coefficients, batch.members, batch.steps, backend=batch.backend, operands=batch.operands)
        grad_scale = self._inverse_grad_scale(batch.device)
        observed = batch.backend.observe(statistic, batch.operands, table, fixed_point.limits, fixed_point.scales, grad_scale)
        keys = batch.keys(self._compared_options)
        return statistics.Contribution(places=batch.places, bits=fixed_point.bits, keys=keys, observed=observed)

    def _agree(self, layout: Layout, observation: _Observation) -> tuple[Tensor | None, statistics.Agreement | None]:
        """Add up what all ranks observed, if the algorithm needs to know. Every rank gets here in every step.

        Returns:
            proceed: bool, 0-dim, whether the step happens; None if nothing can stop it.
            agreement: what they found; None if they need not know.

        Raises:
            ValueError: the ranks do not fit together or one has failed; on all of them, or on a device one step later on the others.
            FloatingPointError: see `step`.
        """
        failure = observation.failure
        found_inf: Tensor | float | None = getattr(self, "found_inf", None)  # GradScaler's
        if found_inf is not None and not isinstance(found_inf, Tensor):  # of a rank without a gradient
            found_inf = torch.tensor(float(found_inf), device="cpu")
        if not self._agrees:
            if failure is not None:
                raise failure
            return (None if found_inf is None else (found_inf == 0).all()), None

        agreement = statistics.agree(
            layout,
            observation.contributions,
            device=layout.device,
            invalid=failure is not None,
            found_inf=found_inf,
            process_group=self._own_group(),
        )
        verdict = self._judge(layout, agreement, observation)
        if known_on_host(agreement.totals):
            self._raise_inconsistency(agreement, verdict, failure)
        elif failure is not None:
            raise failure
        if not capturing(agreement.totals.device):  # a replay raises nothing: it steps or it does not
            if not known_on_host(agreement.totals):
                self._deferred[layout] = statistics.Deferred(agreement, verdict, self._longest_streak)
            if self._longest_streak is not None:
                self._streaks[layout] = verdict
        self._agreements.pop(layout, None)  # the newest is last
        self._agreements[layout] = agreement
        if self.nonfinite == "raise":
            self._raise_non_finite(agreement, verdict)
        elif known_on_host(agreement.totals):
            self._raise_streak(agreement, verdict)
        return verdict.proceed, agreement

    @property
    def _compared_options(self) -> tuple[Any, ...]:
        """Options that must be the same on all ranks that agree."""
        return self.nonfinite, self.max_skipped_steps

    @property
    def _longest_streak(self) -> int | None:
        """How many steps in a row may be skipped; None: any number."""
        return self.max_skipped_steps if self.nonfinite == "skip" else None

    def _judge(self, layout: Layout, agreement: statistics.Agreement, observation: _Observation) -> Verdict:
        """What the ranks' agreement means for this step, after the step before."""
        device = agreement.totals.device
        judge = next((batch.backend.judge for batch in observation.batches if batch.device == device), consensus.judge)
        before = None if capturing(device) else self._streaks.get(layout)
        return judge(agreement.totals, before, skips=self.nonfinite == "skip")

    def _confirm_replacement(self, layout: Layout, change: str) -> None:
        """Ask all ranks, in the place of the step that the others may be in, whether they too are about to replace their layout.

        Waits for the device: parameters seldom change.

        Raises:
            ValueError: not all of them are; on all ranks, or on a device one step later on the others.
        """
        process_group = self._own_group()
        assert process_group is not None, "ranks agree"
        agreement = statistics.agree(layout, (), device=layout.device, replaces=True, process_group=process_group)
        if host_value(agreement.totals[REPLACES]) == dist.get_world_size(process_group):
            return
        message = (
            f"the parameters to step have changed since the last step, but not on all ranks: here they are {change}; add, remove or "
            f"replace parameters on every rank, before the same step"
        )
        raise ValueError(gather_messages(message, process_group) if known_on_host(agreement.totals) else message)

    def _warn_of_no_gradients(self, layout: Layout, observation: _Observation, agreement: statistics.Agreement | None) -> None:
        """In the first step. Waits for the device if this rank has no gradient."""
        self._has_stepped = True
        if observation.batches or self.gradient_release or self._steps_in_turns or not any(param.requires_grad for param in layout.params):
            return
        if agreement is not None:
            if agreement.vector[PRESENT].any():
                return  # other ranks have some
        elif self.layout is not None:
            return  # this rank may hold none of the elements that have one
        where = "on this rank, " if agreement is None and dist.is_available() and dist.is_initialized() else ""
        warnings.warn(
            f"the first step found no gradient on any parameter, {where}so it changes nothing. If the model was wrapped (fully_shard, "
            f"FullyShardedDataParallel) after the optimizer was built, the optimizer has the parameters of before: build it from "
            f"model.parameters() after wrapping. Else call loss.backward() before step()",
            UserWarning,
            stacklevel=5,
        )

    def _raise_inconsistency(self, agreement: statistics.Agreement, verdict: Verdict, failure: Exception | None) -> None:
        """Where the host knows what the ranks know."""
        if failure is not None or host_value(agreement.totals[INVALID]) or host_value(agreement.totals[REPLACES]):
            message = None if failure is None else str(failure) if isinstance(failure, ValueError) else repr(failure)
            raise ValueError(gather_messages(message, self._own_group())) from failure
        if not host_value(verdict.told[0]):
            raise ValueError(agreement.inconsistency())

    def _raise_non_finite(self, agreement: statistics.Agreement, verdict: Verdict) -> None:
        """Waits for the device: the price of raising in the step that went wrong."""
        if capturing(verdict.told.device):
            raise ValueError("nonfinite='raise' waits for each step, which a CUDA graph cannot record; use nonfinite='skip'")
        if not host_value(verdict.told[1]):
            names = agreement.names_where_not_finite_here()
            message = f"gradient not finite, or too large to square in fp32: {', '.join(map(repr, names))}" if names else None
            raise FloatingPointError(gather_messages(message, self._own_group()))

    def _raise_streak(self, agreement: statistics.Agreement, verdict: Verdict) -> None:
        """When too many steps in a row were skipped, where the host knows it."""
        _, finite, length = verdict.told.tolist()
        if not length:  # to go on from here would cost each step something
            self._streaks.pop(agreement.layout, None)
        elif self._longest_streak is not None and not finite and length >= self._longest_streak:
            self._count_skipped(1)
            raise FloatingPointError(statistics.told_of_streak(agreement, verdict, self._own_group()))

    def _raise_deferred(self, only: tuple[Tensor, ...] | None) -> None:
        """Raise what the step before found: of these parameters, or of any. Not where a CUDA graph is recorded, which cannot wait."""
        if any(capturing(layout.params[0].device) for layout in self._deferred):
            return
        if only is None and self._steps_in_turns:
            only = tuple(param for group in self.param_groups for param in group["params"])
        layouts = list(self._deferred) if only is None else [layout for layout in self._deferred if layout.describes(only)]
        for deferred in [self._deferred.pop(layout) for layout in layouts]:
            deferred.raise_if_due(self._own_group)

    def _update(
        self,
        layout: Layout,
        batches: Sequence[Batch],
        proceed: Tensor | None,
        agreement: statistics.Agreement | None,
        *,
        accumulate: bool,
    ) -> None:
        """Write parameters (but not to `accumulate`) and state, and count the step, where it happens."""
        updates: list[metrics.Update] = []
        if batches:
            self._updates.pop(layout, None)  # the newest is last
            self._updates[layout] = updates
            self._update_rows = None
        if proceed is not None and known_on_host(proceed):  # branch here; a verdict that only the device knows selects there
            if not host_value(proceed):
                self._count_skipped(1)
                return
            proceed = None
        for group in self.param_groups:
            param_groups.learn_reference_lr(group)
        if self._listener is not None:
            self._listener.updating()
        for number, batch in enumerate(batches, start=1):
            scale = 1.0
            if agreement is not None and self._statistic is not None:
                scale = LrScale(of_mean=self._statistic.lr_scale, sums=agreement.sums(batch.places, batch.fixed_point(self._statistic)))
            members = batch.members
            if accumulate:
                members = replace(members, groups=[{**group, **LEAVE_PARAMS} for group in members.groups])
            table = coefficient_table(
                batch.algorithm.coefficients, members, batch.steps, scale, backend=batch.backend, operands=batch.operands
            )
            grad_scale = self._inverse_grad_scale(batch.device)
            happens = None if proceed is None else proceed.to(batch.device)  # parameters may be on several devices
            batch.backend.update(batch.algorithm, batch.operands, table, happens, grad_scale, batch.noise_keys())
            batch.updated(happens)
            updates.append(
                metrics.Update(
                    algorithm=batch.algorithm,
                    pieces=batch.pieces,
                    format=batch.operands.format,
                    state_formats=batch.operands.state_formats,
                    coefficients=table,
                    proceed=happens,
                    grad_scale=grad_scale,
                )
            )
            if self._listener is not None and (number == len(batches) or batches[number].unit != batch.unit):
                self._listener.updated(batch.unit)
        if proceed is not None:
            self._count_skipped(~proceed)

    def _inverse_grad_scale(self, device: torch.device) -> Tensor | None:
        """What multiplies the gradients under GradScaler: fp32, 0-dim."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        return None if scale is None else scale.to(device).double().reciprocal().float().reshape(())

    def _is_allocation_step(self) -> bool:
        has_state = any(group["params"][0] in self.state for group in self.param_groups if group["params"])
        return not has_state and called_to_allocate()

    # --------------------------------------------------------------------------------------------------------------- all ranks

    def _own_group(self) -> dist.ProcessGroup | None:
        if self._lost_process_group:
            raise ValueError("this optimizer was copied or unpickled, which cannot take its process_group along; set it again")
        return own_process_group(self.process_group)

    @property
    def _steps_in_turns(self) -> bool:
        """Whether a wrapper steps one set of parameters after the other."""
        return self.layout is not None and self.layout.in_turns

    def _forget_layouts(self) -> None:
        self._layouts = Layouts(self._index, in_turns=self._steps_in_turns)
        self._join_guard = JoinGuard()
        self._agreements: dict[Layout, statistics.Agreement] = {}  # the last of each layout, the newest last
        self._deferred: dict[Layout, statistics.Deferred] = {}
        self._streaks: WeakKeyDictionary[Layout, Verdict] = WeakKeyDictionary()  # the last of each layout
        self._updates: dict[Layout, list[metrics.Update]] = {}  # of the last step of each layout, the newest last
        # Of `_updates`, by a parameter's id; made when asked for.
        self._update_rows: dict[int, list[tuple[metrics.Update, int]]] | None = None
        self._reported: dict[str, tuple[Tensor, int]] = {}  # (parameter, which of its pieces) by the name of its metrics
        self._batches = Batches(self._backend_names, together=self._foreach)
        self._observed_early: dict[Batch, tuple[Any, statistics.Contribution]] = {}  # with its stamp

    def _forget_dropped_layouts(self) -> None:
        """Let go of what is known of layouts that no step uses any more, and raise what their last step left to be raised."""
        while self._layouts.dropped:
            layout = self._layouts.dropped.pop()
            self._agreements.pop(layout, None)
            self._updates.pop(layout, None)
            self._update_rows = None
            deferred = self._deferred.pop(layout, None)
            if deferred is not None:
                deferred.raise_if_due(self._own_group)

    def _forget_reports(self, layout: Layout) -> None:
        """Of what is about to be stepped: all, but what another turn of the same step has left."""
        stepped = set(map(id, layout.params)) if self._steps_in_turns else None
        for reports in (self._agreements, self._updates):
            for other in [each for each in reports if stepped is None or not stepped.isdisjoint(map(id, each.params))]:
                del reports[other]
        self._update_rows = None

    # ----------------------------------------------------------------------------------------------------------------- reports

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that train this model together; None means all."""
        return self._process_group

    @process_group.setter
    def process_group(self, process_group: dist.ProcessGroup | None) -> None:
        self._process_group = process_group
        self._lost_process_group = False
        self._forget_layouts()

    @property
    def nonfinite(self) -> NonFinite:
        """What a step does where a gradient is not finite: see `EngineOptions`. May be set between two steps, on all ranks."""
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, nonfinite: NonFinite) -> None:
        if nonfinite not in ("skip", "raise", "allow"):
            raise ValueError(f"nonfinite must be 'skip', 'raise' or 'allow', or None at construction for the default, got {nonfinite!r}")
        self._nonfinite: NonFinite = nonfinite

    @property
    def max_skipped_steps(self) -> int | None:
        """How many steps in a row may be skipped: see `EngineOptions`. May be set between two steps, on all ranks."""
        return self._max_skipped_steps

    @max_skipped_steps.setter
    def max_skipped_steps(self, most: int | None) -> None:
        if most is not None and not (type(most) is int and most > 0):
            raise ValueError(f"max_skipped_steps must be a positive int, or None for no limit, got {most!r}")
        self._max_skipped_steps = most

    @property
    def skipped_steps(self) -> int:
        """How many steps did not happen because a gradient was not finite. Waits for the device.

        DeepSpeed's ZeRO steps each param group, or sub-group, by itself, and each counts; steps that DeepSpeed skips do not.
        """
        return int(self._skipped)

    def _count_skipped(self, skipped: int | Tensor) -> None:
        if isinstance(skipped, Tensor) and not isinstance(self._skipped, Tensor):
            refuse_to_capture(skipped.device)
            self._skipped = torch.full((), self._skipped, dtype=torch.int64, device=skipped.device)
        self._skipped += skipped

    def metrics(self) -> dict[str, float]:
        """What the last step found, already reduced over all ranks. Waits for the device.

        Returns:
            `skipped_steps`, and for algorithms with a per-tensor statistic `rms/NAME`: its root mean over the whole tensor, for every
            tensor of the model that has elements and had a gradient, also those held by other ranks only. NaN where it was not finite.
        """
        report = {"skipped_steps": float(self.skipped_steps)}
        if self._statistic is not None:
            for agreement in self._agreements.values():
                report |= {f"rms/{name}": mean**0.5 for name, mean in agreement.named_means().items()}
        return report

    def report_per_parameter_metrics(self, param: Tensor, name: str, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Tell what the last step did to one parameter, as Composer's OptimizerMonitor asks for it. No communication.

        Returns:
            `optimizer_metrics`, to which this adds what `metrics.report` says of this rank's piece, under
            `l2_norm/{moment,param,update,grad}/NAME` and `cosine/{update_grad,moment_grad}/NAME`: float64 tensors of one element. NAME is
            `name`, or for a flat parameter that of each tensor in it.

        Raises:
            ValueError: the gradient is not laid out like the parameter.
        """
        group = self._group_with(param)
        if group is None:
            return optimizer_metrics
        entry = self.describe_param(param, name, group)
        last = self._last_updates(param) or [None] * len(entry.pieces)
        for index, (piece, update) in enumerate(zip(entry.pieces, last, strict=True)):
            values = metrics.report(entry, piece, self.state.get(param, {}), update)
            called = name if piece.offset is None else piece.segment.name
            self._reported[called] = (param, index)
            optimizer_metrics |= {f"{kind}/{called}": value for kind, value in values.items()}
        return optimizer_metrics

    def _last_updates(self, param: Tensor) -> list[tuple[metrics.Update, int]]:
        """For each piece of a parameter, the update that the last step wrote it by, and its row there."""
        if self._update_rows is None:
            self._update_rows = {}
            for layout, updates in self._updates.items():  # the newest is last
                rows: dict[int, list[tuple[metrics.Update, int]]] = {id(each): [] for each in layout.params}
                for update in updates:
                    for row, (entry, _) in enumerate(update.pieces):
                        rows[id(entry.param)].append((update, row))
                self._update_rows |= rows
        return self._update_rows.get(id(param), [])

    def pre_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Turn norms into squares and cosines into dot products, which add up over ranks, in place. See `metrics.py`."""
        optimizer_metrics |= metrics.pre_reduce(optimizer_metrics, self._reported)
        return optimizer_metrics

    def dist_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Make the metrics of this rank's pieces those of whole tensors, in place: one all-reduce, in which every rank must take part.

        The first call may exchange the layout before. See `metrics.dist_reduce`.
        """
        process_group = self._own_group()
        layout = self._layouts.of_group(self.param_groups, self.describe_param, process_group=process_group)
        places = dict(zip(layout.params, layout.first_piece, strict=True))
        index_of = {name: places[param] + index for name, (param, index) in self._reported.items() if param in places}
        optimizer_metrics |= metrics.dist_reduce(optimizer_metrics, layout, index_of.get, process_group)
        return optimizer_metrics

    # ------------------------------------------------------------------------------------------------------- copying, printing

    def __getstate__(self) -> dict[str, Any]:
        own = ("_statistic", "_backend_names", "_foreach", "_skipped", "_has_stepped", "_nonfinite", "_max_skipped_steps")
        own += ("gradient_release", "optimizer_accumulation")
        lost = {"_lost_process_group": self._process_group is not None or self._lost_process_group}
        return super().__getstate__() | {name: getattr(self, name) for name in own} | lost

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_statistic" in state:
            self._process_group = None
            self._listener = None
            self._forget_layouts()

    def __repr__(self) -> str:
        backends = ", ".join(sorted(self._batches.backends)) or f"{' or '.join(self._backend_names)}, chosen in the first step"
        return super().__repr__().removesuffix(")") + f"backend: {backends}\nnonfinite: {self.nonfinite}\n)"
