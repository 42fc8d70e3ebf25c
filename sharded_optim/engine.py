"""The one torch.optim.Optimizer of the library. Its step reads observe, agree, update.

    grad, state -> observe -> per-tensor sums -> agree (one all-reduce) -> per-tensor learning-rate scale -> update -> param, state

The public classes in `optimizers.py` give it an algorithm and defaults.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim import metrics, noise, param_groups, statistics
from sharded_optim.algorithms import Algorithm, Choose, Coefficients
from sharded_optim.backends import AUTO, Backend, Operand, candidates, choose
from sharded_optim.coefficients import coefficient_table, known_on_host, next_steps
from sharded_optim.layouts import Layouts
from sharded_optim.options import NonFinite, Params
from sharded_optim.ranks import gather_messages, own_process_group
from sharded_optim.sharding import Layout, LocalParam, describe
from sharded_optim.state import STEP, called_to_allocate
from sharded_optim.stateful import StatefulOptimizer

__all__ = ["Engine"]

LEAVE_PARAMS = {"lr": 0.0, "weight_decay": 0.0}  # hyperparameters with which an update writes state alone
HEADROOM = 1.001  # a computed statistic exceeds its mathematical bound by a few fp32 roundings, never by this much

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """The local parameters with a gradient that one backend steps in one call."""

    backend: Backend
    algorithm: Algorithm
    device: torch.device
    indices: list[int] = field(default_factory=list)  # into the layout's local parameters
    entries: list[LocalParam] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    operands: list[Operand] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """What was observed of a batch; see `Backend.observe`."""

    bits: list[int]
    keys: list[int]  # of the hyperparameters; see `Engine._keys`
    sums: Tensor
    non_finite: Tensor


@dataclass(frozen=True, kw_only=True)
class _Observation:
    """What this rank brings to an agreement."""

    batches: list[_Batch] = field(default_factory=list)
    sums: list[_Sums] = field(default_factory=list)  # of each batch
    failure: Exception | None = None  # or why it brings nothing


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
        state_dtype: torch.dtype | None = None,
        backend: str = AUTO,
        nonfinite: NonFinite | None = None,
        process_group: dist.ProcessGroup | None = None,
        kahan_sum: bool | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        foreach: bool | None = None,
        triton: bool | None = None,
        gradient_release: bool = False,
    ) -> None:
        if nonfinite not in (None, "skip", "raise", "allow"):
            raise ValueError(f"nonfinite must be 'skip', 'raise', 'allow' or None, got {nonfinite!r}")
        if gradient_release and foreach:
            warnings.warn("gradient_release=True steps what a backward hook brings; foreach=True has no effect", UserWarning, stacklevel=3)
        self.gradient_release = gradient_release
        self.optimizer_accumulation = False
        self.process_group = process_group
        self._backend_names = candidates(backend, triton)
        self._foreach = foreach is not False
        self._skipped: int | Tensor = 0
        defaults = defaults | {"kahan_sum": kahan_sum, "stochastic_rounding": stochastic_rounding, "rounding_seed": int(rounding_seed)}
        super().__init__(params, defaults, algorithm=algorithm, state_dtype=state_dtype or torch.float32, max_lr=max_lr)
        self._statistic = algorithm(self.param_groups[0]).statistic
        # Where ranks agree on something anyway, skipping together costs nothing; elsewhere it would cost a collective.
        self.nonfinite: NonFinite = nonfinite or ("skip" if self._statistic else "allow")

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
            FloatingPointError: a gradient was not finite and `nonfinite="raise"`. On every rank, naming tensors and ranks.
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
        process_group = self._own_group() if self._agrees else None
        layout = self._layouts.current(self.param_groups, only, agree=self._agrees, process_group=process_group)
        observation = self._observe(layout)
        if only is None and observation.batches:  # without a gradient, after gradient release, the reports of its steps stay
            self._agreements.clear()
            self._updates.clear()
        proceed, lr_scales = self._agree(layout, observation)
        self._update(layout, observation.batches, proceed, lr_scales, accumulate=only is not None and self.optimizer_accumulation)
        return loss

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
        """Look at gradients and state, and sum what the ranks must agree on. Writes nothing."""
        try:
            batches = self._collect(layout)
            if self.gradient_release and not batches and hasattr(self, "found_inf"):
                raise ValueError(
                    "GradScaler stepped an optimizer whose gradients were released in backward, still scaled; use one of the two"
                )
            return _Observation(batches=batches, sums=[self._sum(batch) for batch in batches] if self._agrees else [])
        except Exception as failure:  # the other ranks must hear of it before this one raises
            return _Observation(failure=failure)

    def _collect(self, layout: Layout) -> list[_Batch]:
        """The local parameters that have a gradient.

        Raises:
            ValueError: one that cannot be used.
        """
        groups = self._layouts.groups_of(self.param_groups, layout)
        stepped = set(map(id, groups))
        for index, group in enumerate(self.param_groups):
            if id(group) in stepped:  # schedulers and users write to them
                self._check_group(group, f"param_groups[{index}]", scheduled=True)
        batches: dict[Any, _Batch] = {}
        for index, (entry, group) in enumerate(zip(layout.local_params, groups, strict=True)):
            if entry.param.grad is None:
                continue
            operand, algorithm = self._operand(entry, group), self._choose(group)
            backend = self._choose_backend(operand)
            device = operand.param.device
            key = (device, backend.name, algorithm.name, None if self._foreach else index)
            batch = batches.setdefault(key, _Batch(backend=backend, algorithm=algorithm, device=device))
            batch.indices.append(index)
            batch.entries.append(entry)
            batch.groups.append(group)
            batch.operands.append(operand)
        return list(batches.values())

    def _operand(self, entry: LocalParam, group: dict[str, Any]) -> Operand:
        algorithm, fmt = self._choose(group), self._format_of(entry.param, group)
        state = self._complete_state(entry.param, group, entry.segment.name)
        assert entry.param.grad is not None
        return Operand(
            segment=entry.segment,
            param=entry.local(entry.param, "parameter"),
            extra=tuple(entry.local(state[name], "state") for name in fmt.extra),
            format=fmt,
            grad=entry.local(entry.param.grad, "gradient"),
            state=tuple(entry.local(state[name], "state") for name in algorithm.state),
        )

    def _sum(self, batch: _Batch) -> _Sums:
        """Sum the statistic of each operand, or only see whether its gradient is finite."""
        statistic = self._statistic
        if statistic is None:
            bits, limits = [0] * len(batch.indices), [0.0] * len(batch.indices)
            table = torch.empty(len(batch.indices), 0, device=batch.device)
        else:
            bounds = [statistic.bound(group) for group in batch.groups]
            numels = [entry.segment.tensor_numel for entry in batch.entries]
            bits = [statistics.fraction_bits(bound, numel) for bound, numel in zip(bounds, numels, strict=True)]
            limits = [HEADROOM * bound for bound in bounds]
            table = self._table(batch, statistic.coefficients)
        grad_scale = self._inverse_grad_scale(batch.device)
        sums, non_finite = batch.backend.observe(statistic, batch.operands, table, limits, bits, grad_scale)
        return _Sums(bits=bits, keys=self._keys(batch), sums=sums, non_finite=non_finite)

    def _agree(self, layout: Layout, observation: _Observation) -> tuple[Tensor | None, Tensor | None]:
        """Add up what all ranks observed, if the algorithm needs to know. Every rank gets here in every step.

        Returns:
            proceed: bool, 0-dim, whether the step happens; None if nothing can stop it.
            lr_scales: float64 (local parameters,), multipliers of the learning rate; None for 1.

        Raises:
            ValueError: the ranks do not fit together or one has failed; on all of them, or on a device one step later on the others.
            FloatingPointError: see `step`.
        """
        failure, sums = observation.failure, observation.sums
        found_inf: Tensor | float | None = getattr(self, "found_inf", None)  # GradScaler's
        if found_inf is not None and not isinstance(found_inf, Tensor):  # of a rank without a gradient
            found_inf = torch.tensor(float(found_inf))
        if not self._agrees:
            if failure is not None:
                raise failure
            return (None if found_inf is None else (found_inf == 0).all()), None

        device = layout.local_params[0].param.device
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        agreement = statistics.agree(
            layout,
            [index for batch in observation.batches for index in batch.indices],
            torch.cat([nothing, *(each.sums.to(device) for each in sums)]),
            torch.cat([nothing, *(each.non_finite.to(device) for each in sums)]),
            [bits for each in sums for bits in each.bits],
            [key for each in sums for key in each.keys],
            invalid=failure is not None,
            found_inf=found_inf,
            process_group=self._own_group(),
        )
        self._raise_inconsistency(layout, agreement, failure)
        self._agreements.pop(layout, None)  # the newest is last
        self._agreements[layout] = agreement
        return self._verdict(agreement), None if self._statistic is None else self._statistic.lr_scale(agreement.means())

    def _raise_inconsistency(self, layout: Layout, agreement: statistics.Agreement, failure: Exception | None) -> None:
        if not known_on_host(agreement.vector):
            if failure is not None:
                raise failure
            self._deferred[layout] = statistics.Deferred(agreement)
        elif agreement.invalid:
            message = None if failure is None else str(failure) if isinstance(failure, ValueError) else repr(failure)
            raise ValueError(gather_messages(message, self._own_group())) from failure
        elif not agreement.consistent():
            raise ValueError(agreement.inconsistency())

    def _raise_deferred(self, only: tuple[Tensor, ...] | None) -> None:
        """Raise what the step before found: of these parameters, or of any."""
        layouts = list(self._deferred) if only is None else [layout for layout in self._deferred if layout.describes(only)]
        for deferred in [self._deferred.pop(layout) for layout in layouts]:
            deferred.raise_if_inconsistent()

    def _verdict(self, agreement: statistics.Agreement) -> Tensor:
        """Whether the step happens: bool, 0-dim, on the device of the agreement."""
        finite = agreement.all_finite()
        if self.nonfinite == "raise" and not finite:  # waits for the device: the price of raising in the step that went wrong
            names = agreement.names_where_not_finite_here()
            message = f"gradient not finite, or too large to square in fp32: {', '.join(map(repr, names))}" if names else None
            raise FloatingPointError(gather_messages(message, self._own_group()))
        verdict = agreement.found_inf == 0
        if not known_on_host(agreement.vector):
            verdict = verdict & agreement.consistent()
        return verdict & finite if self.nonfinite == "skip" else verdict

    def _update(self, layout: Layout, batches: list[_Batch], proceed: Tensor | None, lr_scales: Tensor | None, *, accumulate: bool) -> None:
        """Write parameters (but not to `accumulate`) and state, and count the step, where it happens."""
        for entry in layout.local_params:
            self._updates.pop(entry.param, None)
        if proceed is not None and known_on_host(proceed):  # branch here; a verdict that only the device knows selects there
            if not proceed:
                self._count_skipped(1)
                return
            proceed = None
        for group in self.param_groups:
            param_groups.learn_reference_lr(group)
        for batch in batches:
            scale = 1.0
            if lr_scales is not None:
                indices = torch.tensor(batch.indices).to(lr_scales.device, non_blocking=True)
                scale = lr_scales[indices].to(batch.device)
            table = self._table(batch, batch.algorithm.coefficients, scale, **(LEAVE_PARAMS if accumulate else {}))
            grad_scale = self._inverse_grad_scale(batch.device)
            batch.backend.update(batch.algorithm, batch.operands, table, proceed, grad_scale, self._noise_keys(batch))
            params = {id(entry.param): entry.param for entry in batch.entries}  # several pieces may belong to one
            steps = [self.state[param][STEP] for param in params.values()]
            taken = 1.0 if proceed is None else proceed.to(batch.device, torch.float32)
            torch._foreach_add_(steps, taken)  # pyright: ignore[reportPrivateImportUsage]
            update = metrics.Update(
                algorithm=batch.algorithm,
                entries=batch.entries,
                formats=[operand.format for operand in batch.operands],
                coefficients=table,
                proceed=proceed,
                grad_scale=grad_scale,
            )
            self._updates |= {entry.param: (update, row) for row, entry in enumerate(batch.entries)}
        if proceed is not None:
            self._count_skipped(~proceed)

    def _table(
        self, batch: _Batch, coefficients: Callable[..., Coefficients], lr_scale: float | Tensor | None = None, **overrides: float
    ) -> Tensor:
        """One row of coefficients for each operand of a batch: fp32 (operands, coefficients)."""
        groups = {id(group): group | overrides for group in batch.groups}
        return coefficient_table(coefficients, [groups[id(group)] for group in batch.groups], self._steps(batch), batch.device, lr_scale)

    def _steps(self, batch: _Batch) -> list[Tensor]:
        """Steps taken so far by each operand of a batch."""
        return [self.state[entry.param][STEP] for entry in batch.entries]

    def _noise_keys(self, batch: _Batch) -> Tensor | None:
        """What stochastic rounding draws with: int64 (operands,)."""
        if not any(operand.format.is_random for operand in batch.operands):
            return None
        seeds = [group["rounding_seed"] for group in batch.groups]
        names = [operand.segment.name for operand in batch.operands]
        return noise.keys(seeds, names, next_steps(self._steps(batch), batch.device))

    def _keys(self, batch: _Batch) -> list[int]:
        """A number for each operand that is the same on two ranks if they use the same hyperparameters at the same step."""
        keys: dict[tuple[int, float], int] = {}
        result = []
        for group, step in zip(batch.groups, self._steps(batch), strict=True):
            known = (id(group), float(step) if known_on_host(step) else -1.0)
            if known not in keys:
                keys[known] = param_groups.hyperparameter_key(group, known[1])
            result.append(keys[known])
        return result

    def _inverse_grad_scale(self, device: torch.device) -> Tensor | None:
        """What multiplies the gradients under GradScaler: fp32, 0-dim."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        return None if scale is None else scale.to(device).double().reciprocal().float().reshape(())

    def _is_allocation_step(self) -> bool:
        return not self.state and all(group["lr"] == 0 for group in self.param_groups) and called_to_allocate()

    def _choose_backend(self, operand: Operand) -> Backend:
        key = (operand.param.device, frozenset(tensor.dtype for tensor in (operand.param, operand.grad, *operand.state)))
        if key not in self._backends:
            self._backends[key] = choose(self._backend_names, *key)
            logger.info("%s steps %s on %s with the %s backend", type(self).__name__, set(key[1]), key[0], self._backends[key].name)
        return self._backends[key]

    # --------------------------------------------------------------------------------------------------------------- all ranks

    def _own_group(self) -> dist.ProcessGroup | None:
        if self._lost_process_group:
            raise ValueError("this optimizer was copied or unpickled, which cannot take its process_group along; set it again")
        return own_process_group(self.process_group)

    def _forget_layouts(self) -> None:
        self._layouts = Layouts()
        self._agreements: dict[Layout, statistics.Agreement] = {}  # the last of each layout, the newest last
        self._deferred: dict[Layout, statistics.Deferred] = {}
        self._updates: dict[Tensor, tuple[metrics.Update, int]] = {}  # of each parameter its last update, and its place in it
        self._reported: dict[str, Tensor] = {}  # parameters by the names that metrics were reported under
        self._backends: dict[tuple[torch.device, frozenset[torch.dtype]], Backend] = {}

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
    def skipped_steps(self) -> int:
        """How many steps did not happen because a gradient was not finite. Waits for the device."""
        return int(self._skipped)

    def _count_skipped(self, skipped: int | Tensor) -> None:
        if isinstance(skipped, Tensor) and not isinstance(self._skipped, Tensor):
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
            `l2_norm/{moment,param,update,grad}/NAME` and `cosine/{update_grad,moment_grad}/NAME`: float64 tensors of one element.

        Raises:
            ValueError: the gradient is not laid out like the parameter.
        """
        if self._group_with(param) is None:
            return optimizer_metrics
        values = metrics.report(describe(param, name), self.state.get(param, {}), self._updates.get(param))
        self._reported[name] = param
        optimizer_metrics |= {f"{kind}/{name}": value for kind, value in values.items()}
        return optimizer_metrics

    def pre_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Turn norms into squares and cosines into dot products, which add up over ranks, in place. See `metrics.py`."""
        optimizer_metrics |= metrics.pre_reduce(optimizer_metrics, self._reported)
        return optimizer_metrics

    def dist_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Make the metrics of this rank's pieces those of whole tensors, in place: one all-reduce, in which every rank must take part.

        The first call may exchange the layout before. See `metrics.dist_reduce`.
        """
        process_group = self._own_group()
        layout = self._layouts.of_group(self.param_groups, agree=self._agrees, process_group=process_group)
        places = {entry.param: index for index, entry in enumerate(layout.local_params)}
        index_of = {name: places[param] for name, param in self._reported.items() if param in places}
        optimizer_metrics |= metrics.dist_reduce(optimizer_metrics, layout, index_of.get, process_group)
        return optimizer_metrics

    # ------------------------------------------------------------------------------------------------------- copying, printing

    def __getstate__(self) -> dict[str, Any]:
        own = ("_statistic", "_backend_names", "_foreach", "_skipped", "nonfinite", "gradient_release", "optimizer_accumulation")
        lost = {"_lost_process_group": self._process_group is not None or self._lost_process_group}
        return super().__getstate__() | {name: getattr(self, name) for name in own} | lost

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_statistic" in state:  # unpickling or copying; torch also calls this with the loaded state and groups alone
            self._process_group = None
            self._forget_layouts()
        super().__setstate__(state)

    def __repr__(self) -> str:
        backends = (
            ", ".join(sorted({backend.name for backend in self._backends.values()}))
            or f"{' or '.join(self._backend_names)}, chosen in the first step"
        )
        return super().__repr__().removesuffix(")") + f"backend: {backends}\nnonfinite: {self.nonfinite}\n)"
