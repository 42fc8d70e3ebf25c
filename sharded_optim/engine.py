"""The one torch.optim.Optimizer of the library. Its step reads observe, agree, update.

    grad, state -> observe -> per-tensor sums -> agree (one all-reduce) -> per-tensor learning-rate scale -> update -> param, state

The public classes in `optimizers.py` give it an algorithm and defaults.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim import loading, param_groups, statistics
from sharded_optim.algorithms import Algorithm, Coefficients
from sharded_optim.backends import AUTO, Backend, Operand, available, choose
from sharded_optim.coefficients import coefficient_table, known_on_host
from sharded_optim.ranks import gather_messages, own_process_group
from sharded_optim.sharding import Layout, LocalParam, describe
from sharded_optim.state import STEP, State, called_to_allocate

__all__ = ["Engine", "EngineOptions", "NonFinite", "Params"]

NonFinite = Literal["skip", "raise", "allow"]
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

HEADROOM = 1.001  # a computed statistic exceeds its mathematical bound by a few fp32 roundings, never by this much

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """The local parameters with a gradient that one backend steps in one call."""

    backend: Backend
    device: torch.device
    indices: list[int] = field(default_factory=list)  # into the layout's local parameters
    params: list[Tensor] = field(default_factory=list)  # the keys of their state
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


class EngineOptions(TypedDict, total=False):
    """Keyword-only options of every optimizer.

    state_dtype: storage dtype of the moments: float32 (the default, also for low-precision parameters), or bfloat16, whose rounding
        wants beta2 <= 0.996.
    backend: "auto", the default, picks the fastest that supports the device and dtypes; or the name of one.
    nonfinite: what a step does when a gradient on any rank is not finite, or too large to be squared in fp32.
        "skip": no rank steps; parameters, state and step counters stay as they are, bit for bit.
        "raise": FloatingPointError on every rank, naming tensors and ranks. The host waits for the device in every step.
        "allow": it goes through, as in torch; StableAdamW makes the whole tensor NaN, as an unsharded one would.
        The default is "skip" for algorithms whose ranks agree on something anyway and "allow" for those that need no collective.
    process_group: the ranks that train this model together; None, the default, means all. Unused by a step without a collective.
    """

    state_dtype: torch.dtype | None
    backend: str
    nonfinite: NonFinite | None
    process_group: dist.ProcessGroup | None


class Engine(torch.optim.Optimizer):
    """Steps any `Algorithm` on whatever shard of the parameters this rank holds.

    Args:
        params: as for every torch optimizer: tensors, (name, tensor) tuples, or dicts of param groups.
        defaults: hyperparameters of the param groups.
        algorithm: the math.
        max_lr: reference learning rate of groups that do not bring their own `max_lr`; None takes each group's `lr`.
        state_dtype, backend, nonfinite, process_group: see `EngineOptions`.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf and leaves the gradients alone

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        algorithm: Algorithm,
        max_lr: float | None = None,
        state_dtype: torch.dtype | None = None,
        backend: str = AUTO,
        nonfinite: NonFinite | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if backend not in available():
            raise ValueError(f"backend must be one of {', '.join(available())}, got {backend!r}")
        if nonfinite not in (None, "skip", "raise", "allow"):
            raise ValueError(f"nonfinite must be 'skip', 'raise', 'allow' or None, got {nonfinite!r}")
        self.algorithm = algorithm
        self.backend = backend
        # Where ranks agree on something anyway, skipping together costs nothing; elsewhere it would cost a collective.
        self.nonfinite: NonFinite = nonfinite or ("skip" if algorithm.statistic else "allow")
        self.state_dtype = state_dtype or torch.float32
        self.process_group = process_group
        self._max_lr = None if max_lr is None else param_groups.check_number("max_lr", max_lr)
        self._skipped: int | Tensor = 0
        self._forget_layout()
        param_groups.check_hyperparameters(defaults, "the optimizer's arguments")
        param_groups.check_state_dtype(self.state_dtype, defaults)
        super().__init__(params, defaults)
        self.state = State(algorithm.state, self.state_dtype, self.state)

    # ------------------------------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step once: on every rank, or on none.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: bad input. On every rank where ranks agree in this step, else on this one.
            FloatingPointError: a gradient was not finite and `nonfinite="raise"`. On every rank, naming tensors and ranks.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_allocation_step():
            self.init_state()
            return loss
        self._raise_deferred()
        layout = self._current_layout()
        observation = self._observe(layout)
        proceed, lr_scales = self._agree(layout, observation)
        self._update(observation.batches, proceed, lr_scales)
        return loss

    @property
    def _agrees(self) -> bool:
        """Whether a step hears from the other ranks."""
        return self.algorithm.statistic is not None or self.nonfinite != "allow"

    def _observe(self, layout: Layout) -> _Observation:
        """Look at gradients and state, and sum what the ranks must agree on. Writes nothing."""
        try:
            batches = self._collect(layout)
            return _Observation(batches=batches, sums=[self._sum(layout, batch) for batch in batches] if self._agrees else [])
        except Exception as failure:  # the other ranks must hear of it before this one raises
            return _Observation(failure=failure)

    def _collect(self, layout: Layout) -> list[_Batch]:
        """The local parameters that have a gradient.

        Raises:
            ValueError: one that cannot be used.
        """
        for index, group in enumerate(self.param_groups):  # schedulers and users write to them
            param_groups.check_hyperparameters(group, f"param_groups[{index}]", scheduled=True)
            param_groups.check_state_dtype(self.state_dtype, group)
        batches: dict[tuple[torch.device, str], _Batch] = {}
        for index, entry in enumerate(layout.local_params):
            if entry.param.grad is None:
                continue
            operand = Operand(
                param=entry.local(entry.param, "parameter"),
                grad=entry.local(entry.param.grad, "gradient"),
                state=tuple(entry.local(tensor, "state") for tensor in self._moments(entry.param)),
            )
            backend = self._choose_backend(operand)
            device = operand.param.device
            batch = batches.setdefault((device, backend.name), _Batch(backend=backend, device=device))
            batch.indices.append(index)
            batch.params.append(entry.param)
            batch.operands.append(operand)
        return list(batches.values())

    def _sum(self, layout: Layout, batch: _Batch) -> _Sums:
        """Sum the statistic of each operand, or only see whether its gradient is finite."""
        statistic = self.algorithm.statistic
        if statistic is None:
            bits, limits = [0] * len(batch.indices), [0.0] * len(batch.indices)
            table = torch.empty(len(batch.indices), 0, device=batch.device)
        else:
            bounds = [statistic.bound(self._groups[index]) for index in batch.indices]
            numels = [layout.local_params[index].segment.tensor_numel for index in batch.indices]
            bits = [statistics.fraction_bits(bound, numel) for bound, numel in zip(bounds, numels, strict=True)]
            limits = [HEADROOM * bound for bound in bounds]
            table = self._table(batch, statistic.coefficients)
        grad_scale = self._inverse_grad_scale(batch.device)
        sums, non_finite = batch.backend.observe(self.algorithm, batch.operands, table, limits, bits, grad_scale)
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
        found_inf: Tensor | None = getattr(self, "found_inf", None)  # GradScaler's
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
        self._raise_inconsistency(agreement, failure)
        self._last_agreement = agreement
        statistic = self.algorithm.statistic
        return self._verdict(agreement), None if statistic is None else statistic.lr_scale(agreement.means())

    def _raise_inconsistency(self, agreement: statistics.Agreement, failure: Exception | None) -> None:
        if not known_on_host(agreement.vector):
            if failure is not None:
                raise failure
            self._deferred = statistics.Deferred(agreement)
        elif agreement.invalid:
            message = None if failure is None else str(failure) if isinstance(failure, ValueError) else repr(failure)
            raise ValueError(gather_messages(message, self._own_group())) from failure
        elif not agreement.consistent():
            raise ValueError(agreement.inconsistency())

    def _raise_deferred(self) -> None:
        deferred, self._deferred = self._deferred, None
        if deferred is not None:
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

    def _update(self, batches: list[_Batch], proceed: Tensor | None, lr_scales: Tensor | None) -> None:
        """Write parameters and state, and count the step, where it happens."""
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
            table = self._table(batch, self.algorithm.coefficients, scale)
            batch.backend.update(self.algorithm, batch.operands, table, proceed, self._inverse_grad_scale(batch.device))
            params = {id(param): param for param in batch.params}  # several pieces may belong to one
            steps = [self.state[param][STEP] for param in params.values()]
            taken = 1.0 if proceed is None else proceed.to(batch.device, torch.float32)
            torch._foreach_add_(steps, taken)  # pyright: ignore[reportPrivateImportUsage]
        if proceed is not None:
            self._count_skipped(~proceed)

    def _table(self, batch: _Batch, coefficients: Callable[..., Coefficients], lr_scale: float | Tensor | None = None) -> Tensor:
        """One row of coefficients for each operand of a batch: fp32 (operands, coefficients)."""
        groups = [self._groups[index] for index in batch.indices]
        steps = [self.state[param][STEP] for param in batch.params]
        return coefficient_table(coefficients, groups, steps, batch.device, lr_scale)

    def _keys(self, batch: _Batch) -> list[int]:
        """A number for each operand that is the same on two ranks if they use the same hyperparameters at the same step."""
        keys: dict[tuple[int, float], int] = {}
        result = []
        for index, param in zip(batch.indices, batch.params, strict=True):
            step = self.state[param][STEP]
            known = (id(self._groups[index]), float(step) if known_on_host(step) else -1.0)
            if known not in keys:
                keys[known] = param_groups.hyperparameter_key(self._groups[index], known[1])
            result.append(keys[known])
        return result

    def _inverse_grad_scale(self, device: torch.device) -> Tensor | None:
        """What multiplies the gradients under GradScaler: fp32, 0-dim."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        return None if scale is None else scale.to(device).double().reciprocal().float().reshape(())

    # ----------------------------------------------------------------------------------------------------- parameters and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, after checking what torch would let pass.

        Raises:
            ValueError: an empty group, a parameter given twice, a hyperparameter out of range, or a parameter that cannot be optimized.
        """
        index = len(self.param_groups)
        if isinstance(param_group, dict) and isinstance(param_group.get("params"), Iterable) and not isinstance(param_group["params"], set):
            params = param_group["params"]
            param_group = {**param_group, "params": [params] if isinstance(params, Tensor) else list(params)}
            named = param_groups.named_params(param_group, index)
            if not named:
                raise ValueError(f"param_groups[{index}] has no parameters; leave the group out")
            param_groups.check_hyperparameters(param_group, f"param_groups[{index}]")
            param_groups.check_state_dtype(self.state_dtype, param_group)
            known = {id(p): n for g_index, g in enumerate(self.param_groups) for p, n in param_groups.named_params(g, g_index)}
            names = set(known.values())
            for param, name in named:
                if id(param) in known:
                    raise ValueError(f"parameter {name!r} appears twice, also as {known[id(param)]!r}; give each parameter once")
                if name in names:
                    raise ValueError(f"two parameters are named {name!r}; give each a name of its own, for example with a prefix per model")
                known[id(param)] = name
                names.add(name)
                if isinstance(param, Tensor):
                    describe(param, name)
        super().add_param_group(param_group)
        param_groups.set_reference_lr(self.param_groups[index], self._max_lr)

    def init_state(self) -> None:
        """Allocate the state of every trainable parameter that has none yet: what the first step does for those with a gradient."""
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            if param.requires_grad:
                self.state[param]  # allocates

    def _moments(self, param: Tensor) -> tuple[Tensor, ...]:
        state = self.state[param]
        return tuple(state[name] for name in self.algorithm.state)

    def _is_allocation_step(self) -> bool:
        return not self.state and all(group["lr"] == 0 for group in self.param_groups) and called_to_allocate()

    def _choose_backend(self, operand: Operand) -> Backend:
        key = (operand.param.device, frozenset(tensor.dtype for tensor in (operand.param, operand.grad, *operand.state)))
        if key not in self._backends:
            self._backends[key] = choose(self.backend, *key)
            logger.info("%s steps %s on %s with the %s backend", type(self).__name__, set(key[1]), key[0], self._backends[key].name)
        return self._backends[key]

    # --------------------------------------------------------------------------------------------------------------- all ranks

    def _current_layout(self) -> Layout:
        """The layout of the parameters as they are now; wrappers replace them after construction."""
        params = [param for group in self.param_groups for param in group["params"]]
        if self._layout is None or not self._layout.describes(params):

            def describe_all() -> list[LocalParam]:
                pairs = chain.from_iterable(param_groups.named_params(group, index) for index, group in enumerate(self.param_groups))
                return [describe(param, name) for param, name in pairs]

            if self._agrees:
                # Later, replicas may have drifted in their last bits, where kernels are not deterministic.
                self._layout = Layout.of_group(describe_all, self._own_group(), compare_values=self._layout is None)
            else:
                self._layout = Layout.of_rank(describe_all())
        self._groups = [group for group in self.param_groups for _ in group["params"]]
        return self._layout

    def _own_group(self) -> dist.ProcessGroup | None:
        if self._lost_process_group:
            raise ValueError("this optimizer was copied or unpickled, which cannot take its process_group along; set it again")
        return own_process_group(self.process_group)

    def _forget_layout(self) -> None:
        self._layout: Layout | None = None
        self._groups: list[dict[str, Any]] = []  # of each local parameter
        self._backends: dict[tuple[torch.device, frozenset[torch.dtype]], Backend] = {}
        self._last_agreement: statistics.Agreement | None = None
        self._deferred: statistics.Deferred | None = None

    # ----------------------------------------------------------------------------------------------------------------- reports

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that train this model together; None means all."""
        return self._process_group

    @process_group.setter
    def process_group(self, process_group: dist.ProcessGroup | None) -> None:
        self._process_group = process_group
        self._lost_process_group = False
        self._forget_layout()

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
        if self._last_agreement is not None and self.algorithm.statistic is not None:
            report |= {f"rms/{name}": mean**0.5 for name, mean in self._last_agreement.named_means().items()}
        return report

    # ------------------------------------------------------------------------------------------------------------- state dicts

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but all or nothing, with moments kept in `state_dtype`, and with group keys the saved state lacks kept as they are.

        Raises:
            ValueError: the saved state does not fit; nothing was changed.
        """
        before = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        incoming: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
            loading.check_state(self.param_groups, saved, self.algorithm.state, self.state_dtype)
            incoming.update(saved)

        def restore(_: torch.optim.Optimizer) -> None:
            loading.restore_groups(self.param_groups, before)
            loading.restore_state(self, incoming, self.algorithm.state, self.state_dtype)

        # After the users' pre-hooks, which may convert the state dict, and before their post-hooks, which may look at the result.
        hooks = [self.register_load_state_dict_pre_hook(check), self.register_load_state_dict_post_hook(restore, prepend=True)]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = ("algorithm", "backend", "nonfinite", "state_dtype", "_max_lr", "_skipped")
        lost = {"_lost_process_group": self._process_group is not None or self._lost_process_group}
        return super().__getstate__() | {name: getattr(self, name) for name in own} | lost

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "algorithm" in state:  # unpickling or copying; torch also calls this with the loaded state and groups alone
            self._process_group = None
            self._forget_layout()
        super().__setstate__(state)
        self.state = State(self.algorithm.state, self.state_dtype, self.state)  # torch makes it a plain dict when it loads

    def __repr__(self) -> str:
        backends = ", ".join(sorted({backend.name for backend in self._backends.values()})) or f"{self.backend} until the first step"
        return super().__repr__().removesuffix(")") + f"backend: {backends}\nnonfinite: {self.nonfinite}\n)"
