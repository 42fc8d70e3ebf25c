"""Everything that is known of parameters that are stepped together, kept from one step to the next. Used by the engine.

Users and wrappers replace parameters, groups, options and what is behind a parameter at any time. What a set is known by is compared here,
once per step, and nowhere else: a set whose parameters are others now is made anew, with all that was derived from it.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from operator import attrgetter, is_
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch.distributed as dist
from torch import Tensor

from sharded_optim import consensus
from sharded_optim.agreement import Agreement, Rules, Scaler, Streak, agree, confirm_replacement
from sharded_optim.devices import capturing, refuse_to_capture
from sharded_optim.kernel_calls import BackendChoice, KernelCall, kernel_calls
from sharded_optim.metrics import Update
from sharded_optim.param_index import ParamIndex
from sharded_optim.sharding import FlatLayout, Layout, LocalParam, gradients_of
from sharded_optim.sharding.exchange import exchange_layouts
from sharded_optim.stateful import StatefulOptimizer
from sharded_optim.statistics import Contribution

__all__ = ["Observation", "ParamSet", "ParamSets", "StepListener"]

SETS_PER_PARAM = 8  # sets of parameters stepped alone that are kept with the same first parameter
SHOWN = 3  # names in a message

_numbers = count()
_grad = attrgetter("grad")


class StepListener(Protocol):
    """Is told how far a step is."""

    def updating(self) -> None:
        """The step happens, as far as the host knows. Not called where it does not."""

    def updated(self, unit: int) -> None:
        """The parameters of a unit that this rank steps have their new values; see `FlatLayout`. Units come in order."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What this rank brings to an agreement."""

    contributions: Sequence[Contribution] = ()  # of each kernel call
    failure: Exception | None = None  # or why it brings nothing


class ParamSet:
    """Parameters that are stepped together.

    Attributes:
        layout: what ranks hold of them.
        calls: the kernel calls of the last step, one for all parameters that are stored alike and have a gradient.
        agreement: of the last step; None if ranks did not agree.
        updates: what the last step wrote, and their number: larger than that of any update before.
    """

    def __init__(self, layout: Layout, flat_layout: FlatLayout | None, backends: BackendChoice, *, together: bool) -> None:
        self.layout = layout
        self._flat_layout = flat_layout
        self._backends = backends
        self._together = together
        self.calls: list[KernelCall] = []
        self._groups: Sequence[Any] = ()  # of each parameter, when the calls were made
        self._without_grad: list[int] | None = None  # the parameters that had none then; None: there are no calls
        self.agreement: Agreement | None = None
        self._left_over: Agreement | None = None  # whose errors are raised when the next step begins
        self._streak = Streak()
        self.updates: tuple[int, Sequence[Update]] = (-1, ())

    def fits(self, params: Sequence[Tensor], flat_layout: FlatLayout | None, rules: Rules) -> bool:
        """Whether these are the parameters of this set, as they were when it was made, in the same wrapper and for the same ranks."""
        return (
            self.layout.is_global == rules.agrees
            and flat_layout is self._flat_layout
            and (not rules.agrees or self.layout.is_global_over(rules.process_group))
            and self.layout.describes(params)
        )

    def observe(self, optimizer: StatefulOptimizer, rules: Rules, scaler: Scaler, *, whole: bool) -> Observation:
        """Look at gradients and state, and sum what the ranks must agree on. Writes no values.

        Args:
            whole: whether these are all parameters of the optimizer, in their order.
        """
        try:
            grads = gradients_of(self.layout) if self.layout.has_dtensors else list(map(_grad, self.layout.params))
            groups = optimizer.groups_of(None if whole else self.layout.params)
            optimizer.check_groups(groups)
            if not self._renew(optimizer, groups, grads):
                for param in self.layout.params[:1]:
                    refuse_to_capture(param.device)
                self.calls = kernel_calls(optimizer, self.layout, groups, grads, self._backends, together=self._together)
                self._groups, self._without_grad = groups, _without_grad(grads)
            if optimizer.gradient_release and not self.calls and scaler.found_inf is not None:
                raise ValueError(
                    "GradScaler stepped an optimizer whose gradients were released in backward, still scaled; use one of the two"
                )
            return Observation(contributions=[call.observe(rules, scaler) for call in self.calls] if rules.agrees else ())
        except Exception as failure:  # the other ranks must hear of it before this one raises
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
            if not all(call.renew(each, optimizer) for call, each in zip(calls, grads, strict=True)):
                return
        except ValueError:  # the step says so, on all ranks
            return
        for call in calls:
            call.observe_early(rules)

    def agree(self, observation: Observation, rules: Rules, scaler: Scaler) -> Agreement | None:
        """Add up what all ranks observed, if they must know. Every rank gets here in every step.

        Raises:
            ValueError: the ranks do not fit together or one has failed; on all of them, or on a device one step later on the others.
            FloatingPointError: a gradient was not finite and `nonfinite="raise"`; on all ranks.
        """
        if not rules.agrees:
            if observation.failure is not None:
                raise observation.failure
            self.agreement = None
            return None
        judge = next((call.backend.judge for call in self.calls if call.device == self.layout.device), consensus.judge)
        invalid = observation.failure is not None
        found = agree(self.layout, observation.contributions, rules, invalid=invalid, found_inf=scaler.found_inf, judge=judge)
        self.agreement = None
        found.raise_inconsistency(observation.failure)
        self.agreement = found
        if not found.is_on_host and not capturing(found.totals.device):  # a replay raises nothing: it steps or it does not
            self._left_over = found
        found.raise_non_finite()
        return found

    def raise_left_over(self) -> None:
        """Raise what the last step has left: see `Agreement.raise_left_over`."""
        agreement, self._left_over = self._left_over, None
        if agreement is not None:
            agreement.raise_left_over(self._streak)

    @property
    def has_left_over(self) -> bool:
        """Whether the last step has left something to be raised, perhaps."""
        return self._left_over is not None

    @property
    def has_reports(self) -> bool:
        """Whether anything is kept of the last step for reports."""
        return self.agreement is not None or self.updates[0] >= 0

    def count_on_host(self, agreement: Agreement) -> None:
        """Count a step whose verdict the host knows.

        Raises:
            FloatingPointError: so many steps in a row were skipped as the options allow; on all ranks.
        """
        if agreement.is_on_host and not capturing(agreement.totals.device):
            agreement.raise_left_over(self._streak)

    def update(
        self,
        agreement: Agreement | None,
        rules: Rules,
        proceed: Tensor | None,  # bool (); None: the step happens
        scaler: Scaler,
        listener: StepListener | None,
        *,
        accumulate: bool,  # leave the parameters alone, and write the state
    ) -> None:
        """Write parameters and state, and count the step, where it happens."""
        updates: list[Update] = []
        if self.calls:
            self.updates = next(_numbers), updates
        for number, call in enumerate(self.calls, start=1):
            updates.append(call.update(rules.statistic, agreement, proceed, scaler, accumulate=accumulate))
            if listener is not None and (number == len(self.calls) or self.calls[number].unit != call.unit):
                listener.updated(call.unit)

    def skip(self) -> None:
        """Nothing was written in this step."""
        if self.calls:
            self.updates = next(_numbers), ()

    def forget_reports(self) -> None:
        """Of the last step."""
        self.agreement, self.updates = None, (-1, ())

    def release(self) -> None:
        """Let go of gradients and state until the next step."""
        for call in self.calls:
            call.release()

    def _renew(self, optimizer: StatefulOptimizer, groups: Sequence[Any], grads: Sequence[Tensor | None]) -> bool:
        """Take what this step brings; False if the calls must be made anew."""
        return (
            self._without_grad is not None
            and len(groups) == len(self._groups)
            and all(map(is_, groups, self._groups))
            and _without_grad(grads) == self._without_grad
            and all(call.renew([grads[row] for row in call.rows], optimizer) for call in self.calls)  # type: ignore[misc]
        )


class ParamSets:
    """A set of all parameters, and one for each choice of them that is stepped alone.

    Args:
        index: finds the groups of parameters.
        backends: chooses a backend for each of them.
        together: whether one kernel call steps all parameters that it can, or each its own.

    Attributes:
        last: the last set that was of all parameters; None before the first.
        made: how many sets were made.
    """

    def __init__(self, index: ParamIndex, backends: BackendChoice, *, together: bool) -> None:
        self._index = index
        self._backends = backends
        self._together = together
        self.last: ParamSet | None = None
        self.made = 0
        self._by_first: defaultdict[int, list[ParamSet]] = defaultdict(list)  # by the id of their first parameter; the last made is last
        self._by_names: WeakValueDictionary[tuple[str, ...], ParamSet] = WeakValueDictionary()
        self._present: list[int] = []  # ids of the parameters in the groups, when a set was made last
        self._compared: dict[int, Tensor] = {}  # by id: parameters of which the ranks have compared the values
        self._compared_over: weakref.ref[dist.ProcessGroup] | None = None  # the ranks that have
        self._whole: Layout | None = None  # of all parameters of all ranks, where no step needs it

    def __iter__(self) -> Iterator[ParamSet]:
        return (each for sets in self._by_first.values() for each in sets)

    def of(self, optimizer: StatefulOptimizer, only: Sequence[Tensor] | None, rules: Rules) -> ParamSet:
        """The set of all parameters as they are now, or of some. A collective when it is made, if ranks agree.

        Args:
            only: some of the parameters; None means all.

        Raises:
            ValueError: on all ranks: what the step before has left to be raised; parameters that do not fit together; or parameters that
                have changed on some ranks alone.
            FloatingPointError: see `Agreement.raise_left_over`.
        """
        params = optimizer.all_params() if only is None else only
        known = next((each for each in self._by_first.get(id(params[0]), ()) if each.layout.is_of(params)), None) if params else None
        self._raise_left_over(params, known, whole=only is None)
        if known is None or not known.fits(params, optimizer.layout, rules):
            known = self._make(optimizer, only, params, rules, known)
        if only is None:
            self.last = known
        return known

    def forget_reports(self, stepped: ParamSet) -> None:
        """Let go of what steps have left for reports of parameters that this set steps too."""
        stepped.forget_reports()
        others = [each for each in self if each.has_reports]
        if others:
            ids = set(map(id, stepped.layout.params))
            for each in others:
                if not ids.isdisjoint(map(id, each.layout.params)):
                    each.forget_reports()

    def whole_layout(self, optimizer: StatefulOptimizer, process_group: dist.ProcessGroup | None) -> Layout:
        """The layout of all parameters of all ranks, also where no step needs one. A collective when it is made."""
        params = optimizer.all_params()
        for layout in (self._whole, self.last and self.last.layout):
            if layout is not None and layout.is_global_over(process_group) and layout.describes(params):
                return layout
        self._whole = self._layout(optimizer, params, process_group)
        return self._whole

    def _raise_left_over(self, params: Sequence[Tensor], known: ParamSet | None, *, whole: bool) -> None:
        """Raise what steps of any of these parameters have left. Not where a CUDA graph is recorded, which cannot wait."""
        due = [each for each in (self if whole else (known,)) if each is not None and each.has_left_over]
        if not due or any(capturing(each.layout.device) for each in due):
            return
        ids = set(map(id, params)) if due != [known] else set()
        for each in due:
            if each is known or not ids.isdisjoint(map(id, each.layout.params)):
                each.raise_left_over()

    def _make(
        self, optimizer: StatefulOptimizer, only: Sequence[Tensor] | None, params: Sequence[Tensor], rules: Rules, known: ParamSet | None
    ) -> ParamSet:
        """Make a set, and let go of those that it replaces."""
        for param in params[:1]:
            refuse_to_capture(param.device)
        process_group = rules.process_group
        before = known
        if before is None and process_group is not None:  # other ranks may be stepping the set that this one was
            names = None if only is None else tuple(place.name for place in self._index.places_of(optimizer.param_groups, params))
            before = self.last if names is None else self._by_names.get(names)
        if before is not None and process_group is not None and before.layout.is_global_over(process_group):
            device = params[0].device if params else before.layout.device
            confirm_replacement(before.layout, self._change(optimizer, params, before.layout), rules, device)
        layout = self._layout(optimizer, params, process_group) if rules.agrees else Layout.of_rank(self._described(optimizer, params))
        self._drop(optimizer, known, whole=only is None)
        made = ParamSet(layout, optimizer.layout, self._backends, together=self._together)
        self.made += 1
        sets = self._by_first[id(layout.params[0])]
        alone = [each for each in sets if each is not self.last]
        if len(alone) >= SETS_PER_PARAM:  # the same on all ranks, as they step the same sets in the same order
            sets.remove(alone[0])
        sets.append(made)
        self._by_names[tuple(entry.name for entry in layout.local_params)] = made
        return made

    def _drop(self, optimizer: StatefulOptimizer, replaced: ParamSet | None, *, whole: bool) -> None:
        """Let go of sets that a new one replaces, and of what is known of parameters that have left the groups.

        DeepSpeed puts one set of parameters after the other into the groups: those that its layout knows come back.

        Args:
            replaced: had the parameters of the new one.
            whole: whether the new one is of all parameters.
        """
        present = list(map(id, optimizer.all_params()))
        if whole or present != self._present:
            self._present = present
            self._index.look_up(optimizer.param_groups)
            flat = {} if optimizer.layout is None else optimizer.layout.flat

            def comes_back(param: Tensor) -> bool:
                return param not in self._index and param in flat

            def stays(each: ParamSet) -> bool:
                if whole:  # those of some of its parameters go too: they were made when there were others
                    return all(map(comes_back, each.layout.params))
                return all(param in self._index or param in flat for param in each.layout.params)

            self._compared = {key: param for key, param in self._compared.items() if param in self._index or param in flat}
            kept = {first: [each for each in sets if stays(each)] for first, sets in self._by_first.items()}
            self._by_first = defaultdict(list, {first: sets for first, sets in kept.items() if sets})
        if replaced is not None and replaced in (sets := self._by_first[id(replaced.layout.params[0])]):
            sets.remove(replaced)

    def _layout(self, optimizer: StatefulOptimizer, params: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> Layout:
        """Make a layout of all ranks: a collective. Values of replicas are compared once: later, they may have drifted in their last bits,
        where kernels are not deterministic.
        """
        over = None if process_group is None else weakref.ref(process_group)
        if over != self._compared_over:
            self._compared.clear()
            self._compared_over = over
        layout = exchange_layouts(
            partial(self._described, optimizer, params),
            process_group,
            compares_values=lambda param: id(param) not in self._compared,
        )
        self._compared |= {id(param): param for param in params}
        return layout

    def _described(self, optimizer: StatefulOptimizer, params: Sequence[Tensor]) -> list[LocalParam]:
        if not params:
            raise ValueError(
                "the optimizer's param groups are empty, as DeepSpeed's ZeRO stage 3 leaves them between steps; step through the wrapper"
            )
        found = zip(params, self._index.places_of(optimizer.param_groups, params), strict=True)
        return [optimizer.describe_param(param, place.name, place.group) for param, place in found]

    def _change(self, optimizer: StatefulOptimizer, params: Sequence[Tensor], layout: Layout) -> str:
        """How parameters differ from those of a layout, for an error message."""
        before, now = set(map(id, layout.params)), set(map(id, params))
        if added := [param for param in params if id(param) not in before]:
            names = [place.name for place in self._index.places_of(optimizer.param_groups, added)]
            return f"{len(added)} new ones, {', '.join(map(repr, names[:SHOWN]))}{', ...' if len(names) > SHOWN else ''}"
        if gone := [entry.name for entry in layout.local_params if id(entry.param) not in now]:
            return f"without {len(gone)}, {', '.join(map(repr, gone[:SHOWN]))}{', ...' if len(gone) > SHOWN else ''}"
        return "the same in another order, or of other shapes, dtypes, devices or placements"


def _without_grad(grads: Sequence[Tensor | None]) -> list[int]:
    if type(None) not in set(map(type, grads)):
        return []
    return [index for index, grad in enumerate(grads) if grad is None]
