"""The torch.optim.Optimizer behind all public classes: a step observes, agrees and updates.

    grad, state -> observe -> per-tensor sums -> agree (one all-reduce) -> per-tensor learning-rate scale -> update -> param, state

Algorithms that compute with whole matrices exchange the matrices before the update.

The public classes in `optimizers/` supply the algorithm and the defaults.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from sharded_optim.backends import AUTO, candidates
from sharded_optim.formulas import Choose
from sharded_optim.sharding import FlatLayout
from sharded_optim.sharding.ddp import JoinGuard
from sharded_optim.step.agreement import Agreement, Rules, Scaler
from sharded_optim.step.arguments import argument_names, refuse_options_on_wrapper, refuse_unknown, warn_of_swapped_eps
from sharded_optim.step.kernel_calls import BackendChoice
from sharded_optim.step.options import MOST_SKIPPED, CheckedOption, NonFinite, Params, check_max_skipped_steps, check_nonfinite
from sharded_optim.step.param_set import ParamSet, ParamSets, StepListener
from sharded_optim.step.reports import ReportingOptimizer, Reports
from sharded_optim.step.state import steps_to_allocate
from sharded_optim.storage.devices import known_on_host, refuse_to_capture

__all__ = ["Engine"]


class Engine(ReportingOptimizer):
    """Steps an `Algorithm` on whatever shard of the parameters this rank holds.

    Args:
        params: as for every torch optimizer: tensors, (name, tensor) tuples, or dicts of param groups.
        defaults: default hyperparameters of the param groups.
        algorithm: chooses the math of a param group.
        max_lr: reference learning rate of groups without a `max_lr` of their own; None takes each group's `lr`.
        options: see `EngineOptions` and `SwitchOptions`.
        unknown: refused, except for switches of other libraries that are off.

    Attributes:
        nonfinite, max_skipped_steps: see `EngineOptions`. May be set between two steps, on all ranks.
        optimizer_accumulation: while True, steps inside backward (gradient release) update the state and not the parameter: set it during
            all but the last micro-batch. As in optimi, each micro-batch counts as a step of the moments.
        grad_norm: norm of all gradients, stored by `so.clip_grad_norm_` for the metrics of the next step.
    """

    _step_supports_amp_scaling = True  # tells GradScaler to set grad_scale and found_inf instead of unscaling the gradients
    nonfinite: NonFinite = CheckedOption(check_nonfinite)  # pyright: ignore[reportAssignmentType]
    max_skipped_steps: int | None = CheckedOption(check_max_skipped_steps)  # pyright: ignore[reportAssignmentType]

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
        **unknown: Any,
    ) -> None:
        if unknown:
            refuse_unknown(type(self).__name__, unknown, argument_names(type(self), Engine), self.hyperparameters)
        if nonfinite is not None:
            self.nonfinite = nonfinite  # validated before anything is built
        self.max_skipped_steps = max_skipped_steps
        if gradient_release and foreach:
            warnings.warn("gradient_release=True steps parameters in backward hooks; foreach=True has no effect", UserWarning, stacklevel=3)
        self.gradient_release = gradient_release
        self.optimizer_accumulation = False
        self._backend_names = candidates(backend, triton)
        self._foreach = foreach is not False
        self._skipped: int | Tensor = 0
        self._has_stepped = False
        defaults = defaults | {"kahan_sum": kahan_sum, "stochastic_rounding": stochastic_rounding, "rounding_seed": int(rounding_seed)}
        super().__init__(
            params,
            defaults,
            algorithm=algorithm,
            state_dtype=state_dtype or torch.float32,
            max_lr=max_lr,
            layout=layout,
            process_group=process_group,
        )
        warn_of_swapped_eps(type(self), defaults)
        self._begin()
        # Every algorithm that any group may ever use: whether a step is a collective must not depend on the current groups.
        algorithms = (*self.algorithms.values(), *map(algorithm, self.param_groups))
        self._has_matrices = any(each.matrix is not None for each in algorithms)
        self._must_agree = self._has_matrices or any(each.statistic is not None for each in algorithms)
        # If the step has an all-reduce anyway, skipping on all ranks is free; otherwise it would cost a collective.
        self.nonfinite = nonfinite or ("skip" if self._must_agree else "allow")
        if gradient_release and self._has_matrices:
            raise ValueError(
                f"{type(self).__name__} does not support gradient release: ranks share the work on the matrices of the whole model, in one "
                f"step of all parameters; leave gradient_release out"
            )

    def _begin(self) -> None:
        """Create the attributes that are neither copied nor pickled."""
        self._backends = BackendChoice(self._backend_names)
        self._sets = ParamSets(self._index, self._backends, together=self._foreach)
        self._join_guard = JoinGuard()
        self._reports = Reports()
        self.grad_norm: Tensor | None = None
        self._listener: StepListener | None = None
        self._options: Any = None  # the options from which `_cached_rules` was built
        self._cached_rules: Rules

    # ------------------------------------------------------------------------------------------------------------------- step

    @_disable_dynamo  # as on torch's optimizers: torch.compile(optimizer.step) would trace NumPy, and fail
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, param: Tensor | Sequence[Tensor] | None = None) -> Any:
        """Take one step, on every rank or on none.

        Args:
            closure: re-evaluates the model and returns the loss.
            param: step only this parameter or these, as gradient release does inside backward. If the step has an all-reduce, every
                rank of the process group must step the same parameters in the same order.

        Returns:
            The return value of the closure, or None.

        Raises:
            ValueError: bad input. Raised on every rank if the step has an all-reduce, else on this rank.
            FloatingPointError: a gradient was not finite and `nonfinite="raise"`, or `max_skipped_steps` consecutive steps were skipped.
                Raised on every rank; names tensors and ranks.
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
        if not self._has_stepped:
            refuse_options_on_wrapper(self)
        if param is not None and self._has_matrices:
            raise ValueError(
                f"step(param=...) is not supported by {type(self).__name__}: ranks share the work on the matrices of the whole model; call "
                f"step() when all gradients are complete"
            )
        began = perf_counter()
        rules = self._rules()
        if rules.agrees and self.layout is None and dist.is_initialized():  # DistributedDataParallel holds no flat parameters
            self._join_guard.check((param for group in self.param_groups for param in group["params"]), self._sets.made)
        process_group = self.own_group() if rules.agrees else None
        only = None if param is None else (param,) if isinstance(param, Tensor) else tuple(param)
        params = self._sets.of(self, only, rules, process_group)  # a collective if the set is new; raises pending errors of the last step
        reports = self._reports
        reports.rows, reports.times, reports.grad_norm, self.grad_norm = None, None, self.grad_norm, None
        is_whole = params is self._sets.whole
        reports.values = {} if is_whole else reports.values
        self._given.clear()  # from now on parameters are replaced by users, not by wrappers
        scaler = Scaler.of(self)
        try:
            observation = params.observe(self, rules, scaler, whole=only is None)
            observed = perf_counter()
            if only is None and params.calls:  # a step() after gradient release finds no gradients, and must not drop the released reports
                self._sets.forget_reports(params)
            agreement = params.agree(observation, rules, scaler) if rules.agrees else params.proceed_alone(observation)
            agreed = perf_counter()
            if not self._has_stepped and only is None:
                self._has_stepped = True
                _warn_of_no_gradients(self, params, agreement)
            accumulates = only is not None and self.optimizer_accumulation
            exchanged = self._update(params, agreement, scaler, accumulate=accumulates)
            ended = perf_counter()
            if is_whole:  # otherwise this is one of several calls that make up a step
                reports.times = (began, observed, agreed, ended if exchanged is None else exchanged, ended)
            if exchanged is not None and not accumulates:
                reports.values = reports.values | params.values
        finally:
            self._sets.release(params)
            observation = None  # breaks the reference cycle between an error in it and this frame
        return loss

    def listen(self, listener: StepListener) -> None:
        """Set the listener that every step from now on calls."""
        self._listener = listener

    @torch.no_grad()
    def observe_unit(self, unit: int) -> None:
        """Observe the gradients of a unit before the step, as soon as they are complete. No communication.

        The next step of all parameters uses the result, unless gradients, state or hyperparameters have changed by then.
        """
        params, rules = self._sets.whole, self._rules()
        if params is None or not rules.agrees:  # before the first step, own_group would create a process group: a collective
            return
        if params.fits(self.all_params(), self.layout, self.own_group(), agrees=True):
            params.observe_unit(self, rules, unit)

    def _is_allocation_step(self) -> bool:
        """Return whether a wrapper calls step only to make the optimizer allocate its state; see `steps_to_allocate`."""
        for group in self.param_groups:
            if group["params"] and group["params"][0] in self.state:
                return False
        return steps_to_allocate(self.param_groups)

    def _rules(self) -> Rules:
        """Return the rules for the current options, rebuilt when an option has changed."""
        options = (self.nonfinite, self.max_skipped_steps, self.state_dtype)
        if options != self._options:
            self._cached_rules = Rules(
                agrees=self._must_agree or self.nonfinite != "allow",
                nonfinite=self.nonfinite,
                max_skipped_steps=self.max_skipped_steps,
                state_format=self.state_format.name,
            )
            self._options = options
        return self._cached_rules

    def _update(self, params: ParamSet, agreement: Agreement | None, scaler: Scaler, *, accumulate: bool) -> float | None:
        """Write parameters (not with `accumulate`) and state and count the step, if it happens.

        Returns:
            The `perf_counter` time in seconds after the matrix exchange; None if the host knows that the step does not happen.
        """
        if agreement is not None:
            proceed = agreement.verdict.proceed
        else:
            proceed = None if scaler.found_inf is None else (scaler.found_inf == 0).all()
        if proceed is not None and known_on_host(proceed):  # branch on the host; a verdict on the device is a mask in the kernels
            happens = bool(proceed.tolist())
            if not happens:
                self._count_skipped(1)
                params.skip()
            if agreement is not None:
                params.conclude(agreement)
            if not happens:
                return None
            proceed = None
        if self.learn_reference_lrs():
            params.take_values(self)
        if self._listener is not None:
            self._listener.updating()
        params.exchange_matrices(agreement, proceed, scaler)
        exchanged = perf_counter()
        params.update(agreement, proceed, scaler, self._listener, accumulate=accumulate)
        if proceed is not None:
            self._count_skipped(~proceed)
        return exchanged

    def _count_skipped(self, skipped: int | Tensor) -> None:
        if isinstance(skipped, Tensor) and not isinstance(self._skipped, Tensor):
            refuse_to_capture(skipped.device)
            self._skipped = torch.full((), self._skipped, dtype=torch.int64, device=skipped.device)
        self._skipped += skipped

    # ------------------------------------------------------------------------------------------------------- copying, printing

    def __getstate__(self) -> dict[str, Any]:
        own = ("_has_matrices", "_must_agree", "_backend_names", "_foreach", "_skipped", "_has_stepped", "nonfinite", "max_skipped_steps")
        own += ("gradient_release", "optimizer_accumulation")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_must_agree" in state:
            self._begin()
        else:  # a state dict is loaded, which replaces the groups
            self._reports.forget(self._sets)

    def __repr__(self) -> str:
        return super().__repr__().removesuffix(")") + f"backend: {self._backends}\nnonfinite: {self.nonfinite}\n)"


def _warn_of_no_gradients(optimizer: Engine, params: ParamSet, agreement: Agreement | None) -> None:
    """Warn if no parameter has a gradient in the first step. Waits for the device if this rank has none."""
    layout = optimizer.layout
    of_some = optimizer.gradient_release or (layout is not None and layout.steps_by_group)  # other calls step the other parameters
    if params.calls or of_some or not any(param.requires_grad for param in params.layout.params):
        return
    if agreement is not None:
        if agreement.has_gradients():
            return  # other ranks have gradients
    elif layout is not None:
        return  # this rank's shard may contain no element that has a gradient
    where = "on this rank, " if agreement is None and dist.is_initialized() else ""
    warnings.warn(
        f"the first step found no gradient on any parameter, {where}so it changes nothing. If the model was wrapped (fully_shard, "
        f"FullyShardedDataParallel) after the optimizer was built, the optimizer still has the old parameters: build it from "
        f"model.parameters() after wrapping. Otherwise call loss.backward() before step()",
        UserWarning,
        stacklevel=7,  # including two frames of torch's _disable_dynamo
    )
