"""Sets of parameters that are stepped together, with everything that is cached for them between steps.

Users and wrappers replace parameters, their memory, groups and options at any time. The key of a set is compared here, once per step, and
nowhere else: if it differs, the set is rebuilt with everything derived from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from operator import attrgetter, is_
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.backends import AgreementFunctions
from sharded_optim.formulas import verdict
from sharded_optim.sharding import FlatLayout, Layout, reduced_gradients
from sharded_optim.step.agreement import Agreement, Rules, Scaler, Streak, agree
from sharded_optim.step.coefficients import GroupValues
from sharded_optim.step.kernel_call import KernelCall
from sharded_optim.step.kernel_calls import BackendChoice, kernel_calls
from sharded_optim.step.layouts import LayoutMaker
from sharded_optim.step.matrix_call import MatrixCall
from sharded_optim.step.matrix_exchange import Compute, MatrixExchange
from sharded_optim.step.metrics import Update
from sharded_optim.step.param_index import ParamIndex
from sharded_optim.step.stateful import StatefulOptimizer
from sharded_optim.step.statistics import Contribution
from sharded_optim.storage.devices import capturing, refuse_to_capture

__all__ = ["Observation", "ParamSet", "ParamSets", "StepListener"]

SETS_PER_PARAM = 8  # cached sets with the same first parameter, besides the set of all parameters

_numbers = count()
_grad = attrgetter("grad")


class StepListener(Protocol):
    """Receives the progress of a step."""

    def updating(self) -> None:
        """Called before the update, unless the host knows that the step does not happen."""

    def updated(self, unit: int) -> None:
        """Called when the parameters of a unit (see `FlatLayout`) have their new values. Units come in order."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The result of observing the gradients on this rank."""

    contributions: Sequence[Contribution] = ()  # one per kernel call; empty after a failure
    failure: Exception | None = None  # the error that kept this rank from observing


class ParamSet:
    """Parameters that are stepped together.

    Attributes:
        layout: the pieces that the ranks hold.
        calls: the kernel calls of the last step; each steps the parameters with a gradient that have the same formats and algorithm.
        values: the GroupValues of each param group in the last step, keyed by id(group).
        agreement: the agreement of the last step; None if its ranks did not agree.
        pending: an agreement whose pending errors are raised when the next step begins.
        updates: (sequence number, updates) of the last step; the number increases with every step, and is -1 without one.
        measures: whether steps measure updates of matrices for reports, because they cannot be recomputed later.
    """

    def __init__(self, layout: Layout, flat_layout: FlatLayout | None, backends: BackendChoice, *, together: bool) -> None:
        self.layout = layout
        self._flat_layout = flat_layout
        self._backends = backends
        self._together = together
        self.calls: list[KernelCall] = []
        self._exchanges = {plan.dtype: MatrixExchange(layout, plan) for plan in layout.matrices}
        self._groups: Sequence[Any] = ()  # param group of each parameter when the calls were built
        self.values: dict[int, GroupValues] = {}
        self._without_grad: list[int] | None = None  # indices of the parameters without a gradient at that time; None: no calls yet
        self.agreement: Agreement | None = None
        self.pending: Agreement | None = None
        self._agreement_functions: AgreementFunctions = verdict  # implementation for the layout's device
        self._streak = Streak()
        self.measures = False
        self.updates: tuple[int, Sequence[Update]] = (-1, ())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(entry.name for entry in self.layout.local_params)

    def fits(
        self, params: Sequence[Tensor], flat_layout: FlatLayout | None, process_group: dist.ProcessGroup | None, *, agrees: bool
    ) -> bool:
        """Return whether this set was built for these parameters as they are now, with the same wrapper and the same ranks.

        Args:
            process_group: the ranks of the step; None means this process alone.
            agrees: whether these ranks must have built the set's layout together.
        """
        is_over = self.layout.is_global_over(process_group) if agrees else not self.layout.is_global
        return is_over and flat_layout is self._flat_layout and self.layout.describes(params)

    def observe(self, optimizer: StatefulOptimizer, rules: Rules, scaler: Scaler, *, whole: bool) -> Observation:
        """Read gradients and state, and sum the values that the ranks must agree on. Writes neither parameters nor state values.

        Args:
            whole: whether this set has all parameters of the optimizer, in order.
        """
        try:
            layout = self.layout
            grads = reduced_gradients(layout.params, layout.partial) if layout.has_dtensors else list(map(_grad, layout.params))
            for exchange in self._exchanges.values():
                exchange.allocate()
            groups = optimizer.groups_of(None if whole else self.layout.params)
            self.values = optimizer.values_of(groups)
            if not self._renew(optimizer, groups, grads):
                for param in self.layout.params[:1]:  # building calls copies from the host, which a CUDA graph would replay
                    refuse_to_capture(param.device)
                values = [self.values[id(group)] for group in groups]
                self.calls = kernel_calls(optimizer, self.layout, values, grads, self._backends, self._exchanges, together=self._together)
                self._groups, self._without_grad = groups, _without_grad(grads)
                self._agreement_functions = next((call.backend for call in self.calls if call.device == self.layout.device), verdict)
            if optimizer.gradient_release and not self.calls and scaler.found_inf is not None:
                raise ValueError(
                    "GradScaler stepped an optimizer whose gradients were released in backward, still scaled; use one of the two"
                )
            contributions = []
            for call in self.calls if rules.agrees else ():
                contributions.append(call.observe(rules, scaler))
            return Observation(contributions=contributions)
        except Exception as failure:  # the other ranks must get the error before this one raises
            self.calls, self._without_grad = [], None
            return Observation(failure=failure)

    def observe_unit(self, optimizer: StatefulOptimizer, rules: Rules, unit: int) -> None:
        """Observe the gradients of a unit early, if they are laid out like those of the last step."""
        calls = [call for call in self.calls if call.unit == unit]
        for call in calls:
            call.release()
        try:
            grads = [list(map(_grad, call.params)) for call in calls]
            if any(grad is None for each in grads for grad in each):
                return
            values = optimizer.values_of(self._groups)
            if not all(id(group) in values for group in self._groups):  # groups were replaced, for example by load_state_dict
                return
            if not all(call.renew(each, values, optimizer) for call, each in zip(calls, grads, strict=True)):
                return
        except ValueError:  # the step will raise it, on all ranks
            return
        for call in calls:
            call.observe_early(rules)

    def agree(self, observation: Observation, rules: Rules, scaler: Scaler) -> Agreement:
        """Sum the observations of all ranks: the step's all-reduce, which every rank must call.

        Raises:
            ValueError: the ranks are inconsistent or one has failed. Raised on all ranks; on a device, the others raise one step later.
            FloatingPointError: a gradient was not finite and `nonfinite="raise"`. Raised on all ranks.
        """
        failure, self.agreement = observation.failure, None
        agreement = agree(
            self.layout,
            observation.contributions,
            rules,
            invalid=failure is not None,
            found_inf=scaler.found_inf,
            backend=self._agreement_functions,
        )
        agreement.raise_inconsistency(failure)
        self.agreement = agreement
        if not agreement.is_on_host and not capturing(agreement.totals.device):  # a replayed CUDA graph raises nothing: it steps or skips
            self.pending = agreement
        if rules.nonfinite == "raise":
            agreement.raise_non_finite()
        return agreement

    def proceed_alone(self, observation: Observation) -> None:
        """Continue without an all-reduce, if the ranks need not agree.

        Raises:
            Exception: the failure of this rank's observation.
        """
        self.agreement = None
        if observation.failure is not None:
            raise observation.failure

    def take_pending(self) -> Callable[[], None]:
        """Remove the agreement with pending errors, and return a function that raises them."""
        agreement, self.pending = self.pending, None
        return (lambda: None) if agreement is None else partial(agreement.raise_pending, self._streak)

    def conclude(self, agreement: Agreement) -> None:
        """Count a step whose verdict is known on the host.

        Raises:
            FloatingPointError: the number of consecutive skipped steps has reached the limit. Raised on all ranks.
        """
        if agreement.is_on_host and not capturing(agreement.totals.device):
            agreement.raise_pending(self._streak)

    def exchange_matrices(self, agreement: Agreement | None, proceed: Tensor | None, scaler: Scaler) -> None:
        """Write directions, and replace them by the results of whole matrices. A collective if ranks send each other matrices.

        Raises:
            ValueError, FloatingPointError: see `Agreement.raise_pending`; raised in this step, even on a device.
        """
        if not self._exchanges:
            return
        computes: dict[torch.dtype, dict[int, Compute]] = {dtype: {} for dtype in self._exchanges}
        for call in self.calls:
            if isinstance(call, MatrixCall):
                call.measures = self.measures
                computes[call.matrix.dtype] |= call.write_directions(proceed, scaler)
        if self.pending is not None and agreement is not None and any(each.travels for each in self._exchanges.values()):
            # Read the verdict now: a failed rank does not take part in the exchange. Meanwhile the device computes directions.
            self.pending = None
            agreement.raise_pending(self._streak)
        for dtype, exchange in self._exchanges.items():
            exchange.run(computes[dtype])

    def update(
        self,
        agreement: Agreement | None,
        proceed: Tensor | None,  # bool (); None: the step happens
        scaler: Scaler,
        listener: StepListener | None,
        *,
        accumulate: bool,  # write the state only, not the parameters
    ) -> None:
        """Write parameters and state and count the step, if it happens."""
        updates: list[Update] = []
        if self.calls:
            self.updates = next(_numbers), updates
        for number, call in enumerate(self.calls, start=1):
            updates.append(call.update(agreement, proceed, scaler, accumulate=accumulate))
            if listener is not None and (number == len(self.calls) or self.calls[number].unit != call.unit):
                listener.updated(call.unit)

    def take_values(self, optimizer: StatefulOptimizer) -> None:
        """Take hyperparameters that have changed since the observation, which are reference learning rates."""
        self.values = optimizer.values_of(self._groups)
        for call in self.calls:
            call.take_values(self.values, optimizer)

    def skip(self) -> None:
        """Record that this step has written nothing."""
        if self.calls:
            self.updates = next(_numbers), ()

    def forget_reports(self) -> None:
        """Drop the reports of the last step."""
        self.agreement, self.updates = None, (-1, ())

    def release(self) -> None:
        """Release the references to gradients and state until the next step."""
        for each in (*self.calls, *self._exchanges.values()):
            each.release()

    def _renew(self, optimizer: StatefulOptimizer, groups: Sequence[Any], grads: Sequence[Tensor | None]) -> bool:
        """Take the tensors of this step; return False if the kernel calls must be rebuilt."""
        if self._without_grad is None or _without_grad(grads) != self._without_grad:
            return False
        if len(groups) != len(self._groups) or not all(map(is_, groups, self._groups)):
            return False
        return all(call.renew(list(map(grads.__getitem__, call.rows)), self.values, optimizer) for call in self.calls)  # type: ignore[misc]


class ParamSets:
    """Cache of an optimizer's param sets: the set of all parameters, and sets of parameters that are stepped separately.

    Args:
        index: looks up the param groups of parameters.
        backends: chooses the backend of each parameter.
        together: whether a kernel call steps as many parameters as possible, or one.

    Attributes:
        whole: the current set of all parameters; None before the first, and if a wrapper steps them in several calls.
        made: the number of sets of all parameters built so far.
    """

    def __init__(self, index: ParamIndex, backends: BackendChoice, *, together: bool) -> None:
        self._index = index
        self._backends = backends
        self._together = together
        self.whole: ParamSet | None = None
        self.made = 0
        # The other sets: keyed by id(first parameter), in order of creation; and the newest of each, keyed by the names of its parameters.
        self._by_first: defaultdict[int, list[ParamSet]] = defaultdict(list)
        self._by_names: dict[tuple[str, ...], ParamSet] = {}
        self._present: list[int] = []  # ids of the parameters in the groups when the last set was built
        self._layouts = LayoutMaker(index)
        self._exchanged: ParamSet | None = None  # set with the layout of all ranks, built for reports if no step needs it

    def __iter__(self) -> Iterator[ParamSet]:
        if self.whole is not None:
            yield self.whole
        for sets in self._by_first.values():
            yield from sets

    def of(
        self,
        optimizer: StatefulOptimizer,
        only: Sequence[Tensor] | None,
        rules: Rules,
        process_group: dist.ProcessGroup | None,
    ) -> ParamSet:
        """Return the set of all current parameters, or of some. A collective when the set is built, if ranks agree.

        Args:
            only: some of the parameters; None means all.
            process_group: the ranks that agree; None if this process is alone or they do not agree.

        Raises:
            ValueError: pending errors of the last step; inconsistent parameters; or parameters that changed on some ranks only. Raised on
                all ranks.
            FloatingPointError: see `Agreement.raise_pending`.
        """
        params = optimizer.all_params() if only is None else only
        # All parameters are one set, whichever they are: other ranks may still be stepping it when this rank has replaced some.
        whole = only is None and not (optimizer.layout is not None and optimizer.layout.steps_by_group)
        before = self.whole if whole else self._cached(params)
        if self._by_first or (before is not None and before.pending is not None):
            self._raise_pending(params, before, all_sets=only is None)
        if before is not None and before.fits(params, optimizer.layout, process_group, agrees=rules.agrees):
            return before
        for param in params[:1]:
            refuse_to_capture(param.device)
        others = before
        if before is None and only is not None and process_group is not None:
            others = self._cached_by_names(optimizer, params)
        made = self._build(
            optimizer, self._layouts.make(optimizer, params, rules, process_group, None if others is None else others.layout)
        )
        dropped = self._store(optimizer, made, before, whole=whole)
        _raise_all([each.take_pending() for each in dropped])
        return made

    def forget_reports(self, stepped: ParamSet) -> None:
        """Drop the reports of all sets that share parameters with this one."""
        stepped.forget_reports()
        others = [each for each in self if each.agreement is not None or each.updates[0] >= 0] if self._by_first else ()
        if others:
            ids = set(map(id, stepped.layout.params))
            for each in others:
                if not ids.isdisjoint(map(id, each.layout.params)):
                    each.forget_reports()

    def release(self, stepped: ParamSet) -> None:
        """Release gradients and state after a step, and early observations that it may have made invalid."""
        stepped.release()
        if self.whole is not None and self.whole is not stepped:
            self.whole.release()

    def layout_of_all_ranks(self, optimizer: StatefulOptimizer, process_group: dist.ProcessGroup | None) -> Layout:
        """Return the layout of all parameters of all ranks, even if no step needs it. A collective when it is built."""
        params = optimizer.all_params()
        for each in (self._exchanged, self.whole):
            if each is not None and each.fits(params, optimizer.layout, process_group, agrees=True):
                return each.layout
        self._exchanged = self._build(optimizer, self._layouts.of_all_ranks(optimizer, params, process_group))
        return self._exchanged.layout

    def _cached(self, params: Sequence[Tensor]) -> ParamSet | None:
        """Return the cached set of these parameters, in this order; None if there is none."""
        return next((each for each in self._by_first.get(id(params[0]), ()) if each.layout.is_of(params)), None) if params else None

    def _cached_by_names(self, optimizer: StatefulOptimizer, params: Sequence[Tensor]) -> ParamSet | None:
        """Return the cached set with the same names: other ranks may still be stepping it when this rank has replaced parameters."""
        return self._by_names.get(tuple(place.name for place in self._index.places_of(optimizer.param_groups, params)))

    def _raise_pending(self, params: Sequence[Tensor], known: ParamSet | None, *, all_sets: bool) -> None:
        """Raise the pending errors of earlier steps of these parameters; not during the capture of a CUDA graph, which cannot wait."""
        sets = self if all_sets and self._by_first else (known,)
        due = [each for each in sets if each is not None and each.pending is not None]
        if not due or any(capturing(each.layout.device) for each in due):
            return
        ids = set(map(id, params)) if due != [known] else set()
        _raise_all([each.take_pending() for each in due if each is known or not ids.isdisjoint(map(id, each.layout.params))])

    def _build(self, optimizer: StatefulOptimizer, layout: Layout) -> ParamSet:
        return ParamSet(layout, optimizer.layout, self._backends, together=self._together)

    def _store(self, optimizer: StatefulOptimizer, made: ParamSet, replaced: ParamSet | None, *, whole: bool) -> list[ParamSet]:
        """Store a new set, and drop and return the sets that it replaces. All ranks do the same in the same step.

        DeepSpeed puts one subset of the parameters after another into the groups; sets of parameters in its layout are needed again.

        Args:
            replaced: the previous set of the same parameters, or of all; None if there was none.
            whole: whether the new set is the set of all parameters.
        """
        dropped = [] if replaced is None else [replaced]
        present = list(map(id, optimizer.all_params()))
        if whole or present != self._present:
            self._present = present
            self._exchanged = None
            self._index.look_up(optimizer.param_groups)
            flat = {} if optimizer.layout is None else optimizer.layout.flat
            self._layouts.keep(lambda param: param in self._index or param in flat)
            # A new set of all parameters also drops the subsets, which were built for other parameters. Not the very first one: it may
            # follow a backward pass that has released gradients, and their sets have the reports. Sets of removed parameters go too.
            dropped += [
                each
                for sets in self._by_first.values()
                for each in sets
                if (whole and replaced is not None) or not all(param in self._index or param in flat for param in each.layout.params)
            ]
        for each in dropped:
            self._forget(each)
        if whole:
            self.whole = made
            self.made += 1
            return dropped
        sets = self._by_first[id(made.layout.params[0])]
        sets.append(made)
        self._by_names[made.names] = made
        evicted = sets[:-SETS_PER_PARAM]
        for each in evicted:
            self._forget(each)
        return dropped + evicted

    def _forget(self, dropped: ParamSet) -> None:
        first = id(dropped.layout.params[0])
        if dropped in self._by_first.get(first, ()):
            self._by_first[first].remove(dropped)
            if not self._by_first[first]:
                del self._by_first[first]
        if self._by_names.get(dropped.names) is dropped:
            del self._by_names[dropped.names]


def _raise_all(pending: Sequence[Callable[[], None]]) -> None:
    """Raise the first pending error; the others would only repeat it in later steps."""
    for each in pending:
        each()


def _without_grad(grads: Sequence[Tensor | None]) -> list[int]:
    if type(None) not in set(map(type, grads)):
        return []
    return [index for index, grad in enumerate(grads) if grad is None]
