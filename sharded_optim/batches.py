"""What a step steps: the local parameters that have a gradient, in batches that one call of a backend takes. Used by the engine.

Batches are kept from step to step. What a step costs for each tensor besides its arithmetic is then what it takes to see that everything is
where it was: wrappers and users replace gradients, state and memory at any time.
"""

from __future__ import annotations

import logging
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sharded_optim import noise
from sharded_optim.algorithms import Statistic
from sharded_optim.backends import EAGER, Backend, Column, Operands, addresses_of, choose
from sharded_optim.coefficients import Members, known_on_host, next_steps
from sharded_optim.devices import Sent, capturing, keep, refuse_to_capture, send
from sharded_optim.formats import Format, format_of
from sharded_optim.param_groups import hyperparameter_key
from sharded_optim.sharding import GRADIENT, PARAMETER, Layout, LocalParam, Piece, check_memory
from sharded_optim.state import STEP, Choice, local_of
from sharded_optim.stateful import StatefulOptimizer
from sharded_optim.statistics import FixedPoint

__all__ = ["Batch", "Batches"]

Group = dict[str, Any]

SLOW = 1_000_000  # elements, from which on it matters that no backend compiles their step

logger = logging.getLogger(__name__)


class Batch:
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
        self._hyperparameters = optimizer.hyperparameters
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
        self._steps = torch.empty(0, device="cpu")  # fp32 (parameters,), of which the optimizer's state has views
        self._counters: list[Tensor] = []
        self._take_counters_home(optimizer, state)
        self._log = optimizer.compensation_log
        self._drop_stale_compensation([[values[name] for values in state] for name in extra])

    @property
    def device(self) -> torch.device:
        return self.operands.device

    @property
    def steps(self) -> Tensor:
        """How many each operand has taken: fp32 (operands,)."""
        return self._steps if self._owners is None else self._steps[self._owners]

    def renew(self, grads: Sequence[Tensor], optimizer: StatefulOptimizer) -> bool:
        """Take what this step brings.

        Args:
            grads: of `params`.

        Returns:
            False if it is not like the step before, so that the batch must be built anew.

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
        if not all(map(is_, counters, self._counters)) or not self._counters_are_home():
            if capturing(self.device):
                return False
            self._take_counters_home(optimizer, state)
        self._drop_stale_compensation(columns[: len(self.operands.extra)])
        keep(self.device, self._steps, self._owners, self.places, self.members.rows, self.members.group_of)
        return True

    def release(self) -> None:
        """Let go of gradients and state until the next step, which asks for them anew."""
        self._compensations = ()
        for source in (self._grad, *self._state):
            source.column.release()

    def stamp(self, options: tuple[Any, ...]) -> tuple[Any, ...]:
        """Equal to another one if gradients, state, hyperparameters and options are the same, as far as torch counts changes of values."""
        sources = (self._grad, *self._state)
        found = tuple((tensor.data_ptr(), tensor._version) for source in sources for tensor in source.column.wholes)
        return found, tuple(self.keys(options).tolist())

    def fixed_point(self, statistic: Statistic | None) -> FixedPoint:
        """How the statistic of each operand is summed; None stands for a statistic that is 0."""
        bounds = [0.0 if statistic is None else statistic.bound(group) for group in self.members.groups]

        def make() -> FixedPoint:
            bound = torch.empty(len(self.pieces), dtype=torch.float64, device="cpu")
            for value, rows in zip(bounds, self._rows_on_host, strict=True):
                bound[slice(None) if rows is None else rows] = value
            numels = [segment.tensor_numel for segment in self.operands.segments]
            return FixedPoint.of(bound.tolist(), numels, self.device)

        return self._fixed_point.of(bounds, self.device, make)

    def keys(self, options: tuple[Any, ...]) -> Tensor:
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

    def noise_keys(self) -> Tensor | None:
        """What stochastic rounding draws with in this step: int64 (operands, parameters or moments that are rounded so)."""
        if not self._random:
            return None
        seeds = [group["rounding_seed"] for group in self._groups]

        def make() -> Tensor:
            names = [segment.name for segment in self.operands.segments]
            of_each = [noise.sources(seeds, [_source_name(name, what) for name in names]) for what in self._random]
            return send(torch.stack(of_each, dim=1), self.device)

        return noise.keys(self._sources.of(seeds, self.device, make), next_steps(self.steps).view(-1, 1))

    def updated(self, proceed: Tensor | None) -> None:
        """After an update: advance the step counters; not where `proceed`, bool (), is False."""
        self._steps += 1.0 if proceed is None else proceed
        for compensations in self._compensations:
            self._log.record(self.params, compensations)

    def _drop_stale_compensation(self, compensations: Sequence[Sequence[Tensor]]) -> None:
        """Of each further array of the format, as it is in the state of `params`."""
        self._compensations = compensations
        for each in compensations:
            self._log.drop_stale(self.params, each)

    def _take_counters_home(self, optimizer: StatefulOptimizer, state: Sequence[dict[str, Any]]) -> None:
        """Make the step counters of all parameters views of one tensor, which is read and written at once."""
        counters = [
            values[STEP] if isinstance(values[STEP], Tensor) else torch.tensor(values[STEP], dtype=torch.float32, device="cpu")
            for values in state
        ]
        users: Counter[int] = Counter()
        if optimizer.layout is not None and optimizer.layout.in_turns:
            # DeepSpeed loads a Universal checkpoint of ZeRO-3 by giving one counter to all parameters, each of which would then count.
            users.update(id(values.get(STEP)) for values in optimizer.state.values())
        for counter, param in zip(counters, self.params, strict=True):
            if counter.is_meta and not param.is_meta:
                raise ValueError(f"the step counter of a parameter on {param.device} is on {counter.device}, where it has no value")
        self._steps = torch.stack([counter.to(self.device, torch.float32).reshape(()) for counter in counters])
        for values, counter, home in zip(state, counters, self._steps.unbind(), strict=True):
            alike = counter.device == home.device and counter.dtype == home.dtype and counter.ndim == 0
            if counter is values[STEP] and alike and users[id(counter)] <= 1:
                counter.data = home  # who holds the counter sees it move on
            else:
                users[id(counter)] -= 1
                values[STEP] = home.detach()
        self._counters = [values[STEP] for values in state]

    def _counters_are_home(self) -> bool:
        first, size = self._steps.data_ptr(), self._steps.element_size()
        return addresses_of(self._counters).tolist() == list(range(first, first + size * len(self._counters), size))


def _source_name(tensor: str, what: str) -> str:
    """What tells the random numbers of a parameter, which has them under the tensor's name, from those of its moments."""
    return tensor if what == PARAMETER else f"{tensor}\n{what}"


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
        if addresses != self._addresses:
            local = list(local)
            for row, tensor in enumerate(tensors):
                if addresses is None or addresses[row] != self._addresses[row]:
                    local[row] = self._local(row, tensor)
                    if _description(local[row]) != self._described[row]:
                        return False
            self._addresses = addresses_of(local)
        self.column.renew(local, self._addresses)
        return True

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


class Batches:
    """The batches of each layout that is stepped.

    Args:
        backend_names: of the backends that may run, the preferred first.
        together: whether a batch has all parameters that one call can take, or each its own.
    """

    def __init__(self, backend_names: Sequence[str], *, together: bool) -> None:
        self._backend_names = backend_names
        self._together = together
        self._backends: dict[tuple[torch.device, frozenset[torch.dtype]], Backend] = {}
        self._kept: WeakKeyDictionary[Layout, _Kept] = WeakKeyDictionary()

    @property
    def backends(self) -> set[str]:
        """Names of those that run."""
        return {backend.name for backend in self._backends.values()}

    def current(self, optimizer: StatefulOptimizer, layout: Layout, groups: Sequence[Group], grads: Sequence[Tensor | None]) -> list[Batch]:
        """The batches of this step.

        Args:
            optimizer: whose parameters these are.
            layout: of the parameters to step.
            groups: the param group of each of the layout's local parameters.
            grads: their gradients.

        Raises:
            ValueError: a gradient, or state, that cannot be used; a CUDA graph records a step that is not like one before.
        """
        kept = self._kept.pop(layout, None)  # put back when nothing has failed
        if kept is None or not kept.renew(optimizer, groups, grads):
            for param in layout.params[:1]:
                refuse_to_capture(param.device)
            kept = _Kept(groups, grads, self._build(optimizer, layout, groups, grads))
        self._kept[layout] = kept
        return kept.batches

    def of_unit(self, optimizer: StatefulOptimizer, layout: Layout, unit: int) -> list[Batch]:
        """The batches of a unit in which a step would find its gradients as they are now; none where that would be others than before.

        Raises:
            ValueError: a gradient, or state, that cannot be used.
        """
        kept = self._kept.get(layout)
        batches = [] if kept is None else [batch for batch in kept.batches if batch.unit == unit]
        found = []
        for batch in batches:
            grads = list(map(_grad, batch.params))
            if any(grad is None for grad in grads) or not batch.renew(grads, optimizer):  # type: ignore[arg-type]
                return []
            found.append(batch)
        return found

    def forget(self, layout: Layout) -> None:
        """Let go of everything that is kept for a layout, as after a step that failed."""
        self._kept.pop(layout, None)

    def _build(self, optimizer: StatefulOptimizer, layout: Layout, groups: Sequence[Group], grads: Sequence[Tensor | None]) -> list[Batch]:
        units = {} if optimizer.layout is None else optimizer.layout.units
        rows: dict[tuple[Any, ...], list[tuple[int, LocalParam, Group, Tensor]]] = {}
        choices: dict[tuple[Any, ...], tuple[Backend, Choice]] = {}
        for index, (entry, group, grad) in enumerate(zip(layout.local_params, groups, grads, strict=True)):
            if grad is None or not entry.pieces:
                continue
            state = optimizer.complete_state(entry.param, group, entry.name)
            choice = _as_found(optimizer.choice_of(entry.param, group), state, entry)
            dtypes = (grad.dtype, *(state[name].dtype for name in choice.algorithm.state))
            backend = self._backend_of(optimizer, entry.param, dtypes)
            alone = None if self._together else id(entry.param)
            key = (units.get(entry.param, 0), entry.param.device, backend.name, choice.algorithm.name, choice[1:], grad.dtype, alone)
            choices[key] = backend, choice
            rows.setdefault(key, []).append((index, entry, group, grad))
        self._warn_if_slow([(entry, *choices[key]) for key, members in rows.items() for _, entry, _, _ in members])
        return [Batch(optimizer, layout, *choices[key], rows[key], key[0]) for key in sorted(rows, key=itemgetter(0))]

    def _warn_if_slow(self, stepped: Sequence[tuple[LocalParam, Backend, Choice]]) -> None:
        """Where many elements are on the CPU and the package is missing that compiles their step."""
        slow = sum(
            piece.segment.numel
            for entry, backend, _ in stepped
            if entry.param.device.type == "cpu" and backend.name == EAGER
            for piece in entry.pieces
        )
        if slow > SLOW and "cpu" in self._backend_names:
            warnings.warn(
                "more than a million elements are stepped by one torch operation after the other, which takes many times as long as the "
                "compiled step: pip install numba. backend='eager' asks for it without a warning",
                UserWarning,
                stacklevel=2,
            )

    def _backend_of(self, optimizer: StatefulOptimizer, param: Tensor, dtypes: Sequence[torch.dtype]) -> Backend:
        key = (param.device, frozenset((param.dtype, *dtypes)))
        if key not in self._backends:
            self._backends[key], declined = choose(self._backend_names, *key)
            what = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in key[1]))
            why = f" ({'; '.join(declined)})" if declined else ""
            logger.info("%s steps %s on %s with the %s backend%s", type(optimizer).__name__, what, key[0], self._backends[key].name, why)
        return self._backends[key]


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


class _Kept:
    """The batches of a layout, and what they were made for."""

    def __init__(self, groups: Sequence[Group], grads: Sequence[Tensor | None], batches: list[Batch]) -> None:
        self.batches = batches
        self._groups = groups
        self._absent = _absent(grads)

    def renew(self, optimizer: StatefulOptimizer, groups: Sequence[Group], grads: Sequence[Tensor | None]) -> bool:
        """Take what this step brings; False if the batches must be made anew."""
        return (
            all(map(is_, groups, self._groups))
            and _absent(grads) == self._absent
            and all(batch.renew([grads[row] for row in batch.rows], optimizer) for batch in self.batches)  # type: ignore[misc]
        )


_grad: Callable[[Tensor], Tensor | None] = attrgetter("grad")
_dtype: Callable[[Tensor], torch.dtype] = attrgetter("dtype")
_bytes: Callable[[Tensor], int] = attrgetter("nbytes")


def _absent(grads: Sequence[Tensor | None]) -> list[int]:
    if type(None) not in set(map(type, grads)):
        return []
    return [index for index, grad in enumerate(grads) if grad is None]
