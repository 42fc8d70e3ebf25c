"""Groups the parameters that a step steps into kernel calls: stored alike, by one algorithm, on one backend. Used by `ParamSet`.

Calls are kept from step to step. What a step costs for each tensor besides its arithmetic is then what it takes to see that everything is
where it was: wrappers and users replace gradients, state and memory at any time.
"""

from __future__ import annotations

import logging
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from sharded_optim.backends import EAGER, Backend, Column, Operands, addresses_of, choose, noise
from sharded_optim.formulas import Statistic
from sharded_optim.sharding import GRADIENT, PARAMETER, Layout, LocalParam, Piece, check_memory
from sharded_optim.step.agreement import Agreement, Rules, Scaler
from sharded_optim.step.coefficients import LrScale, Members, coefficient_table, known_on_host, next_steps
from sharded_optim.step.metrics import Update
from sharded_optim.step.param_groups import hyperparameter_key
from sharded_optim.step.state import STEP, Choice, local_of
from sharded_optim.step.stateful import StatefulOptimizer
from sharded_optim.step.statistics import Contribution, FixedPoint
from sharded_optim.storage.devices import Sent, capturing, keep, send
from sharded_optim.storage.formats import Format, format_of

__all__ = ["BackendChoice", "KernelCall", "kernel_calls"]

Group = dict[str, Any]

SLOW = 1_000_000  # elements, from which on it matters that no backend compiles their step
LEAVE_PARAMS = {"lr": 0.0, "weight_decay": 0.0}  # hyperparameters with which an update writes state alone

logger = logging.getLogger(__name__)


class KernelCall:
    """The local parameters that one backend steps in one call: stored alike, by one algorithm. An operand is a piece of one of them.

    Attributes:
        backend, algorithm, operands: what is called, with what.
        pieces: what each operand is, and of which local parameter.
        places: where they stand in the layout.
        members: the param groups, and which operands are whose.
        params: of which the operands are.
        unit: of all of them; see `FlatLayout`.
    """

    def __init__(
        self,
        optimizer: StatefulOptimizer,
        layout: Layout,
        backend: Backend,
        choice: Choice,
        rows: Sequence[tuple[int, LocalParam, Group, Tensor]],  # of the layout; the last is the gradient
        unit: int,
    ) -> None:
        self.unit = unit
        self.backend = backend
        self._hyperparameters = optimizer.compared
        self.algorithm, fmt, state_formats = choice
        self.rows: Sequence[int] = [row for row, _, _, _ in rows]  # of the layout's local parameters
        entries = [entry for _, entry, _, _ in rows]
        self.params = [entry.param for entry in entries]
        owners = [owner for owner, entry in enumerate(entries) for _ in entry.pieces]
        self.pieces = [(entry, piece) for entry in entries for piece in entry.pieces]
        self._groups: Sequence[Group] = [rows[owner][2] for owner in owners]
        cut = _Cut(owners, [piece for _, piece in self.pieces]) if any(piece.offset is not None for _, piece in self.pieces) else None
        state = [optimizer.state[param] for param in self.params]
        extra = tuple(array.name for array in fmt.extra)
        self._names = (*extra, *(key for _, _, entries in choice.moments for key in entries))
        self._param = _Source(entries, PARAMETER, self.params, cut)
        self._grad = _Source(entries, GRADIENT, [grad for _, _, _, grad in rows], cut)
        self._state = [_Source(entries, f"state {name!r}", [values[name] for values in state], cut) for name in self._names]
        self.operands = Operands(
            segments=[piece.segment for _, piece in self.pieces],
            format=fmt,
            param=self._param.column,
            extra=tuple(source.column for source in self._state[: len(extra)]),
            grad=self._grad.column,
            state_formats=state_formats,
            state=tuple(source.column for source in self._state[len(extra) :]),
        )
        first_piece = layout.first_piece
        self.places = layout.places([first_piece[row] + k for row, entry, _, _ in rows for k in range(len(entry.pieces))], self.device)
        rows_of = _rows_of(self._groups)
        self._rows_on_host = [None if len(rows_of) == 1 else torch.tensor(each, device="cpu") for each in rows_of]
        self.members = Members(
            groups=[self._groups[each[0]] for each in rows_of],
            rows=[None if rows is None else send(rows, self.device) for rows in self._rows_on_host],
            group_of=None if len(rows_of) == 1 else send(_group_of(rows_of), self.device),
        )
        self._firsts = [(self._groups[each[0]], self.pieces[each[0]][0].param) for each in rows_of]  # a parameter of each group
        self._fixed_point: Sent[FixedPoint] = Sent()
        stored = zip((PARAMETER, *self.algorithm.state), self.operands.formats, strict=True)
        self._random = [name for name, stored_in in stored if stored_in.is_random]  # what is rounded at random
        self._sources: Sent[Tensor] = Sent()  # of random numbers
        backend.prepare(self.algorithm, self.operands)
        self._owners = None if cut is None else send(torch.tensor(owners, device="cpu"), self.device)
        self._counters = _StepCounters(optimizer, self.params, self.device)
        self._log = optimizer.compensation_log
        self._drop_stale_compensation([[values[name] for values in state] for name in extra])
        self._early: tuple[Any, Contribution] | None = None

    @property
    def device(self) -> torch.device:
        return self.operands.device

    @property
    def steps(self) -> Tensor:
        """How many each operand has taken: fp32 (operands,)."""
        return self._counters.steps if self._owners is None else self._counters.steps[self._owners]

    def renew(self, grads: Sequence[Tensor], optimizer: StatefulOptimizer) -> bool:
        """Take what this step brings.

        Args:
            grads: of `params`.

        Returns:
            False if it is not like the step before, so that the call must be built anew.

        Raises:
            ValueError: a gradient, or state, that cannot be used.
        """
        for group, param in self._firsts:
            algorithm, fmt, _ = optimizer.choice_of(param, group)
            if algorithm.name != self.algorithm.name or fmt is not self.operands.format:
                return False
        state: list[Any] = list(map(optimizer.state.get, self.params))
        try:
            counters, *columns = [list(map(itemgetter(name), state)) for name in (STEP, *self._names)]
        except (KeyError, TypeError):  # state is missing
            return False
        sources = zip((self._param, self._grad, *self._state), (self.params, grads, *columns), strict=True)
        if not all(source.renew(tensors) for source, tensors in sources):
            return False
        if not self._counters.are(counters):
            if capturing(self.device):
                return False
            self._counters = _StepCounters(optimizer, self.params, self.device)
        self._drop_stale_compensation(columns[: len(self.operands.extra)])
        keep(self.device, self._counters.steps, self._owners, self.places, self.members.rows, self.members.group_of)
        return True

    def observe(self, rules: Rules, scaler: Scaler) -> Contribution:
        """What this rank brings to an agreement: as it was observed early, if that is still true, and in every replay of a CUDA graph."""
        early, self._early = self._early, None
        if early is not None and scaler.scale is None and not capturing(self.device) and early[0] == self._stamp(rules):
            return early[1]
        return self._sums(rules, scaler)

    def observe_early(self, rules: Rules) -> None:
        """Observe gradients before the step, which uses the result unless gradients, state or hyperparameters have changed by then."""
        self._early = self._stamp(rules), self._sums(rules, Scaler())
        self.release_memory()

    def update(
        self,
        statistic: Statistic | None,
        agreement: Agreement | None,
        proceed: Tensor | None,  # bool (); None: the step happens
        scaler: Scaler,
        *,
        accumulate: bool,  # leave the parameters alone, and write the state
    ) -> Update:
        """Write parameters and state, and count the step, where it happens."""
        scale = 1.0
        if agreement is not None and statistic is not None:
            scale = LrScale(of_mean=statistic.lr_scale, sums=agreement.sums(self.places, self._fixed_point_of(statistic)))
        members = self.members
        if accumulate:
            members = replace(members, groups=[{**group, **LEAVE_PARAMS} for group in members.groups])
        table = coefficient_table(self.algorithm.coefficients, members, self.steps, scale, backend=self.backend, operands=self.operands)
        grad_scale = scaler.inverse(self.device)
        happens = None if proceed is None else proceed.to(self.device)  # parameters may be on several devices
        self.backend.update(self.algorithm, self.operands, table, happens, grad_scale, self._noise_keys())
        self._counters.steps += 1.0 if happens is None else happens
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
        """Let go of gradients, state and what was observed early, until the next step, which asks for them anew."""
        self._early = None
        self.release_memory()

    def release_memory(self) -> None:
        """Let go of gradients and state."""
        self._compensations = ()
        for source in (self._grad, *self._state):
            source.column.release()

    def _sums(self, rules: Rules, scaler: Scaler) -> Contribution:
        """Sum the statistic of each operand, or only see whether its gradient is finite."""
        statistic = rules.statistic
        fixed_point = self._fixed_point_of(statistic)
        if statistic is None:
            table = torch.empty(len(self.pieces), 0, dtype=torch.float32, device=self.device)
        else:
            table = coefficient_table(statistic.coefficients, self.members, self.steps, backend=self.backend, operands=self.operands)
        grad_scale = scaler.inverse(self.device)
        observed = self.backend.observe(statistic, self.operands, table, fixed_point.limits, fixed_point.scales, grad_scale)
        return Contribution(places=self.places, bits=fixed_point.bits, keys=self._keys(rules.options), observed=observed)

    def _stamp(self, rules: Rules) -> tuple[Any, ...]:
        """Equal to another one if gradients, state, hyperparameters and options are the same, as far as torch counts changes of values."""
        sources = (self._grad, *self._state)
        found = tuple((tensor.data_ptr(), tensor._version) for source in sources for tensor in source.column.wholes)
        return found, tuple(self._keys(rules.options).tolist())

    def _fixed_point_of(self, statistic: Statistic | None) -> FixedPoint:
        """How the statistic of each operand is summed; None stands for a statistic that is 0."""
        bounds = [0.0 if statistic is None else statistic.bound(group) for group in self.members.groups]

        def make() -> FixedPoint:
            bound = torch.empty(len(self.pieces), dtype=torch.float64, device="cpu")
            for value, rows in zip(bounds, self._rows_on_host, strict=True):
                bound[slice(None) if rows is None else rows] = value
            numels = [segment.tensor_numel for segment in self.operands.segments]
            return FixedPoint.of(bound.tolist(), numels, self.device)

        return self._fixed_point.of(bounds, self.device, make)

    def _keys(self, options: tuple[Any, ...]) -> Tensor:
        """A number for each operand, the same on two ranks if they use the same hyperparameters at the same step: int64 (operands,).

        Args:
            options: of the optimizer, which must be the same too.
        """
        result = torch.empty(len(self.pieces), dtype=torch.int64, device="cpu")
        all_steps = self.steps
        for group, rows in zip(self.members.groups, self._rows_on_host, strict=True):
            steps = (all_steps if rows is None else all_steps[rows]).tolist() if known_on_host(all_steps) else [-1.0]
            hyperparameters = {name: group[name] for name in self._hyperparameters & group.keys()} | {"options": options}
            keys = {step: hyperparameter_key(hyperparameters, step) for step in set(steps)}
            own = torch.tensor([keys[step] for step in steps] if len(keys) > 1 else list(keys.values()), device="cpu")
            result[slice(None) if rows is None else rows] = own
        return result

    def _noise_keys(self) -> Tensor | None:
        """What stochastic rounding draws with in this step: int64 (operands, parameters or moments that are rounded so)."""
        if not self._random:
            return None
        seeds = [group["rounding_seed"] for group in self._groups]

        def make() -> Tensor:
            names = [segment.name for segment in self.operands.segments]
            of_each = [noise.sources(seeds, [_source_name(name, what) for name in names]) for what in self._random]
            return send(torch.stack(of_each, dim=1), self.device)

        return noise.keys(self._sources.of(seeds, self.device, make), next_steps(self.steps).view(-1, 1))

    def _drop_stale_compensation(self, compensations: Sequence[Sequence[Tensor]]) -> None:
        """Of each further array of the format, as it is in the state of `params`."""
        self._compensations = compensations
        for each in compensations:
            self._log.drop_stale(self.params, each)


def _source_name(tensor: str, what: str) -> str:
    """What tells the random numbers of a parameter, which has them under the tensor's name, from those of its moments."""
    return tensor if what == PARAMETER else f"{tensor}\n{what}"


class _StepCounters:
    """The step counters of parameters: views, in the optimizer's state, of one tensor, which is read and written at once.

    Attributes:
        steps: fp32 (parameters,).
    """

    def __init__(self, optimizer: StatefulOptimizer, params: Sequence[Tensor], device: torch.device) -> None:
        state = [optimizer.state[param] for param in params]
        counters = [
            values[STEP] if isinstance(values[STEP], Tensor) else torch.tensor(values[STEP], dtype=torch.float32, device="cpu")
            for values in state
        ]
        users: Counter[int] = Counter()
        if optimizer.layout is not None and optimizer.layout.in_turns:
            # DeepSpeed loads a Universal checkpoint of ZeRO-3 by giving one counter to all parameters, each of which would then count.
            users.update(id(values.get(STEP)) for values in optimizer.state.values())
        for counter, param in zip(counters, params, strict=True):
            if counter.is_meta and not param.is_meta:
                raise ValueError(f"the step counter of a parameter on {param.device} is on {counter.device}, where it has no value")
        self.steps = torch.stack([counter.to(device, torch.float32).reshape(()) for counter in counters])
        for values, counter, view in zip(state, counters, self.steps.unbind(), strict=True):
            alike = counter.device == view.device and counter.dtype == view.dtype and counter.ndim == 0
            if counter is values[STEP] and alike and users[id(counter)] <= 1:
                counter.data = view  # who holds the counter sees it move on
            else:
                users[id(counter)] -= 1
                values[STEP] = view.detach()
        self._views = [values[STEP] for values in state]

    def are(self, counters: Sequence[Any]) -> bool:
        """Whether these are the views, and still lie in the one tensor: users and wrappers replace both."""
        if not all(map(is_, counters, self._views)):
            return False
        first, size = self.steps.data_ptr(), self.steps.element_size()
        return addresses_of(self._views).tolist() == list(range(first, first + size * len(self._views), size))


class _Cut:
    """How the local tensors of parameters are cut into operands."""

    def __init__(self, owners: Sequence[int], pieces: Sequence[Piece]) -> None:
        self._owners = torch.tensor(owners, dtype=torch.int64, device="cpu")
        self._offsets = torch.tensor([piece.offset or 0 for piece in pieces], dtype=torch.int64, device="cpu")
        self._pieces = list(zip(owners, pieces, strict=True))

    def tensors(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        return [piece.of(wholes[owner]) for owner, piece in self._pieces]

    def addresses(self, wholes: array[int], itemsize: int) -> array[int]:
        return array("q", (torch.tensor(wholes, device="cpu")[self._owners] + self._offsets * itemsize).tolist())


class _CutColumn(Column):
    """A column whose tensors are views, made only for those who ask: kernels take addresses."""

    def __init__(self, wholes: Sequence[Tensor], cut: _Cut) -> None:
        self._cut = cut
        self._at: array[int] | None = None
        super().__init__(wholes)

    @property
    def tensors(self) -> Sequence[Tensor]:
        if self._tensors is None:
            self._tensors = self._cut.tensors(self.wholes)
        return self._tensors

    def renew(self, wholes: Sequence[Tensor], addresses: array[int]) -> None:
        self.wholes = wholes
        if addresses is not self._at:
            self._at, self.addresses = addresses, self._cut.addresses(addresses, wholes[0].element_size())
        self._tensors = None

    def release(self) -> None:
        super().release()
        self._tensors = None


class _Source:
    """Where a column of operands comes from: a tensor of each parameter, as the wrapper gives it.

    The tensors of the step before are not kept to compare with, as their memory may be wanted. What lies at the same address in the same
    way is taken for the same; anything else is looked at by the wrapper's rules.
    """

    def __init__(self, entries: Sequence[LocalParam], role: str, tensors: Sequence[Any], cut: _Cut | None) -> None:
        self._entries = entries
        self._role = role
        self._wrapped = not set(map(type, tensors)) <= {Tensor, torch.nn.Parameter}
        local = [self._local(row, tensor) for row, tensor in enumerate(tensors)]
        self.column = Column(local) if cut is None else _CutColumn(local, cut)
        self._addresses = addresses_of(local)
        self._described = list(map(_description, local))
        self._contiguous = all(map(Tensor.is_contiguous, local))
        self._bytes = list(map(_bytes, local))
        self._dtypes = set(map(_dtype, local))

    def renew(self, tensors: Sequence[Any]) -> bool:
        """Take the tensors of this step; False if they are not like those of the step before.

        Raises:
            ValueError: one of them is not laid out like its parameter.
        """
        local = list(map(local_of, tensors)) if self._wrapped else tensors
        addresses = self._where_alike(local)
        if addresses is None or (addresses != self._addresses and not self._differ_in_address_alone(local, addresses)):
            local = list(local)
            for row, tensor in enumerate(tensors):
                if addresses is None or addresses[row] != self._addresses[row]:
                    local[row] = self._local(row, tensor)
                    if _description(local[row]) != self._described[row]:
                        return False
            addresses = addresses_of(local)
        self._addresses = addresses
        self.column.renew(local, self._addresses)
        return True

    def _differ_in_address_alone(self, local: Sequence[Tensor], addresses: array[int]) -> bool:
        """Whether these are the tensors of before but for where they lie, as gradients that were allocated anew. Others are looked at."""
        return (
            not self._wrapped
            and set(map(type, local)) <= {Tensor, torch.nn.Parameter}
            and 0 not in addresses
            and [(shape, dtype, device) for shape, _, dtype, device in self._described]
            == list(zip(map(_shape, local), map(_dtype, local), map(_device, local), strict=True))
            and not any(map(Tensor.is_neg, local))
        )

    def _local(self, row: int, tensor: Any) -> Tensor:
        entry = self._entries[row]
        return check_memory(entry.local(tensor, self._role), f"{self._role} of {entry.name!r}", entry.param.device)

    def _where_alike(self, local: Sequence[Tensor]) -> array[int] | None:
        """The addresses of tensors that have the sizes, dtypes and strides of those before, as far as is quickly seen."""
        if not self._contiguous or (self._role == GRADIENT and (self._wrapped or set(map(type, local)) != {Tensor})):
            return None  # the wrapper says how a gradient is sharded
        try:
            if not all(map(Tensor.is_contiguous, local)):
                return None
        except RuntimeError:  # a sparse one has no strides
            return None
        if self._role == GRADIENT and any(map(Tensor.is_neg, local)):
            return None
        if self._role == PARAMETER and not self._wrapped:
            return addresses_of(local)  # the layout has compared them
        if set(map(_dtype, local)) != self._dtypes or list(map(_bytes, local)) != self._bytes:
            return None
        return addresses_of(local)


def _description(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _rows_of(groups: Sequence[Group]) -> list[list[int]]:
    """The rows of each distinct group."""
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(id(group), []).append(row)
    return list(rows.values())


def _group_of(rows_of: Sequence[Sequence[int]]) -> Tensor:
    """Of each row, which of these it is in: int64."""
    found = torch.empty(sum(map(len, rows_of)), dtype=torch.int64, device="cpu")
    for index, rows in enumerate(rows_of):
        found[list(rows)] = index
    return found


class BackendChoice:
    """Chooses a backend for each combination of device and dtypes that an optimizer steps.

    Args:
        names: of the backends that may run, the preferred first.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._chosen: dict[tuple[torch.device, frozenset[torch.dtype]], Backend] = {}

    def __str__(self) -> str:
        running = {backend.name for backend in self._chosen.values()}
        return ", ".join(sorted(running)) or f"{' or '.join(self.names)}, chosen in the first step"

    def of(self, param: Tensor, dtypes: Sequence[torch.dtype], optimizer: str) -> Backend:
        """The backend that steps a parameter.

        Args:
            dtypes: of its gradient and state.
            optimizer: its name, for the log.

        Raises:
            ValueError: all decline.
        """
        key = (param.device, frozenset((param.dtype, *dtypes)))
        if key not in self._chosen:
            self._chosen[key], declined = choose(self.names, *key)
            what = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in key[1]))
            why = f" ({'; '.join(declined)})" if declined else ""
            logger.info("%s steps %s on %s with the %s backend%s", optimizer, what, key[0], self._chosen[key].name, why)
        return self._chosen[key]


def _as_found(choice: Choice, state: Mapping[str, Any], entry: LocalParam) -> Choice:
    """The choice for a parameter, with moments as they are stored: where one array was put there in another dtype, in its plain format.

    Raises:
        ValueError: an array is of another dtype than its format's.
    """
    for name, dtype in choice.format.extra:
        if state[name].dtype != dtype:
            raise ValueError(
                f"{name!r} of {entry.name!r} has dtype {state[name].dtype}, the parameter {choice.format.dtype}, with which the format "
                f"{choice.format.name!r} stores it in {dtype}; convert it"
            )
    found: list[Format] = []
    for _, fmt, entries in choice.moments:
        others = {key: state[key].dtype for key, dtype in entries.items() if state[key].dtype != dtype}
        for key, dtype in others.items():
            if len(entries) > 1 or not dtype.is_floating_point:
                raise ValueError(
                    f"{key!r} of {entry.name!r} has dtype {dtype}, the format {fmt.name!r} stores it in {entries[key]}; convert it"
                )
        found.append(format_of(*others.values()) if others else fmt)
    return choice._replace(state_formats=tuple(found))


def kernel_calls(
    optimizer: StatefulOptimizer,
    layout: Layout,
    groups: Sequence[Group],  # of each of the layout's local parameters
    grads: Sequence[Tensor | None],  # their gradients
    backends: BackendChoice,
    *,
    together: bool,  # whether a call takes all parameters that it can, or each its own
) -> list[KernelCall]:
    """The kernel calls that step the parameters that have a gradient, in the order of their units.

    Raises:
        ValueError: a gradient, or state, that cannot be used.
    """
    units = {} if optimizer.layout is None else optimizer.layout.units
    rows: dict[tuple[Any, ...], list[tuple[int, LocalParam, Group, Tensor]]] = {}
    choices: dict[tuple[Any, ...], tuple[Backend, Choice]] = {}
    for index, (entry, group, grad) in enumerate(zip(layout.local_params, groups, grads, strict=True)):
        if grad is None or not entry.pieces:
            continue
        state = optimizer.complete_state(entry.param, group, entry.name)
        choice = _as_found(optimizer.choice_of(entry.param, group), state, entry)
        dtypes = (grad.dtype, *(state[name].dtype for name in choice.algorithm.state))
        backend = backends.of(entry.param, dtypes, type(optimizer).__name__)
        alone = None if together else id(entry.param)
        key = (units.get(entry.param, 0), entry.param.device, backend.name, choice.algorithm.name, choice[1:], grad.dtype, alone)
        choices[key] = backend, choice
        rows.setdefault(key, []).append((index, entry, group, grad))
    if "cpu" in backends.names:
        _warn_if_slow([(entry, *choices[key]) for key, members in rows.items() for _, entry, _, _ in members])
    return [KernelCall(optimizer, layout, *choices[key], rows[key], key[0]) for key in sorted(rows, key=itemgetter(0))]


def _warn_if_slow(stepped: Sequence[tuple[LocalParam, Backend, Choice]]) -> None:
    """Where many elements are on the CPU and the package is missing that compiles their step."""
    slow = sum(
        piece.segment.numel
        for entry, backend, _ in stepped
        if entry.param.device.type == "cpu" and backend.name == EAGER
        for piece in entry.pieces
    )
    if slow > SLOW:
        warnings.warn(
            "more than a million elements are stepped by one torch operation after the other, which takes many times as long as the "
            "compiled step: pip install numba. backend='eager' asks for it without a warning",
            UserWarning,
            stacklevel=2,
        )


_dtype: Callable[[Tensor], torch.dtype] = attrgetter("dtype")
_bytes: Callable[[Tensor], int] = attrgetter("nbytes")
_shape: Callable[[Tensor], torch.Size] = attrgetter("shape")
_device: Callable[[Tensor], torch.device] = attrgetter("device")
