"""Clip the norm of all gradients of a model, however each of them is sharded: `so.clip_grad_norm_`.

    squares of the pieces that this rank owns -> all-gather of one row per rank -> norm -> factor -> every local gradient times factor

torch's function adds only DTensors of one mesh, one scalar at a time. Here the pieces of every tensor are known (`sharding/`), so that
replicas count once and one collective of 32 bytes per rank is enough. Ranks exchange which pieces they hold in the first call, and again
when the parameters of any rank have changed.

A row also has flags: the rank has failed; its parameters have changed. On a CPU all ranks read them in the same call. On an accelerator
the host does not wait: a failed rank raises in the call, the others in their next call.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sharded_optim.sharding import GRADIENT, FlatLayout, Layout, LocalParam, describe, find_layout, reduced_gradients
from sharded_optim.sharding.exchange import exchange_layouts
from sharded_optim.sharding.layout import properties_of
from sharded_optim.sharding.ranks import gather_messages, listed, named_ranks, naming_missing_ranks, own_process_group
from sharded_optim.step.arguments import check_iterable
from sharded_optim.step.engine import Engine
from sharded_optim.step.param_groups import named_params
from sharded_optim.step.state import local_of
from sharded_optim.storage.devices import known_on_host
from sharded_optim.training.containers import contained_optimizers
from sharded_optim.zero import ShardedOptimizer

__all__ = ["clip_grad_norm_"]

DEEPSPEED = (
    "so.clip_grad_norm_ cannot clip under DeepSpeed, which averages and clips gradients inside of its own step; set 'gradient_clipping' in "
    "the DeepSpeed config instead"
)
DEEPSPEED_MARKS = ("ds_id", "param_idx_in_group")  # attributes that stage 3, and stages 1 and 2, set on parameters
# Number of squares that are added in float32; these sums are added in float64. So few that the error is at most 1e-7 even if all elements
# are equal, whose rounding errors do not cancel. A sum in float64 alone takes torch on a CPU five to twenty times as long.
ROW = 32
SMALLEST, LARGEST = 2.0**-50, 2.0**60  # root mean squares between which float32 squares neither vanish nor overflow
CHUNK = 2**15  # elements converted to float64 at a time; smaller tensors are concatenated
MOST_CHUNKS = 256  # of concatenated tensors in one sum
CHANGED = "so.clip_grad_norm_: parameters have changed on some ranks only; change them on all ranks before the same call"
MOST_LEVELS = 8  # nested wrappers
EPSILON = 1e-6  # added to the norm, as by torch
POWER, FAILED, STALE, EXCHANGE = range(4)  # columns of a rank's row
PLAIN = {Tensor, torch.nn.Parameter}
NO_PARAM = torch.empty(0, device="cpu")  # stands for the first parameter of a rank that has none


@torch.no_grad()
def clip_grad_norm_(
    optimizer_or_params: Any,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    layout: FlatLayout | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Scale all gradients so that the norm of all of them together is at most `max_norm`. One collective; every rank must call it.

    As torch.nn.utils.clip_grad_norm_, for ordinary tensors, DTensors on any meshes, FullyShardedDataParallel and ShardedOptimizer, mixed in
    any way. The norm is that of the whole tensors in float64, rounded to float32, to within 1.2e-7. It is not bitwise the same under every
    sharding: the last bit may differ.

    Args:
        optimizer_or_params: an optimizer of this library, or a framework's container of one or several; or parameters, named parameters or
            param groups.
        max_norm: the largest norm that is left as it is.
        norm_type: 2, any other positive number, or inf for the largest element.
        error_if_nonfinite: whether a norm that is not finite is an error; else all gradients become NaN or 0, as in torch.
        foreach: ignored; gradients are always processed together.
        layout: as an optimizer's `layout`; only with parameters.
        process_group: the ranks that hold the model together; None: all. Only with parameters.

    Returns:
        The norm before scaling: float32 (), the same on every rank.

    Raises:
        ValueError: on all ranks: an argument out of range, a gradient that is sparse or placed otherwise than its parameter; DeepSpeed.
        RuntimeError: the norm is not finite and `error_if_nonfinite`; on all ranks, naming the tensors.
    """
    max_norm, norm_type = float(max_norm), float(norm_type)
    if not max_norm >= 0.0 or not norm_type > 0.0:
        raise ValueError(f"max_norm must not be negative and norm_type must be positive, got max_norm={max_norm}, norm_type={norm_type}")
    given = _given(optimizer_or_params, layout, process_group)
    group = own_process_group(given.process_group)
    gathered = _agree(given, group, norm_type)
    norm = gathered.norm(norm_type).float()
    for engine in given.engines:
        engine.grad_norm = norm
    if error_if_nonfinite and not bool(norm.isfinite()):
        _raise_nonfinite(given, gathered.local, norm, group)
    factor = (max_norm / (norm + EPSILON)).clamp(max=1.0)
    if not (gathered.is_read and float(factor) == 1.0):
        given.scale(gathered.local, factor)
    return norm


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What one call clips: parameters, and the optimizers that step them."""

    params: list[Tensor]  # of ShardedOptimizers, the parameters of the optimizer inside
    describe: Callable[[], list[LocalParam]]  # describes all of `params`; raises ValueError
    process_group: dist.ProcessGroup | None  # as given by the user
    engines: Sequence[Engine] = ()  # the optimizers of `params`
    sharded: Sequence[ShardedOptimizer] = ()  # those with gradients in buckets
    failure: Exception | None = None  # error of collecting gradients of `sharded`

    def scale(self, local: Sequence[_Local], factor: Tensor) -> None:
        """Multiply all gradients of this rank by `factor`."""
        in_buckets = {id(param) for each in self.sharded for param in each.inside.all_params()}
        plain = [each.memory for each in local if id(self.params[each.row]) not in in_buckets]
        for grads in _by_kind(plain).values():
            torch._foreach_mul_(grads, factor.to(grads[0].device))  # pyright: ignore[reportPrivateImportUsage]
        for each in self.sharded:
            each.scale_gradients(factor)


def _given(source: Any, layout: FlatLayout | None, process_group: dist.ProcessGroup | None) -> _Given:
    if _is_of_deepspeed(source):
        raise ValueError(DEEPSPEED)
    optimizers = [] if isinstance(source, Tensor | list | tuple) else contained_optimizers(source)
    if not optimizers:
        return _given_params(source, layout, process_group)
    if layout is not None or process_group is not None:
        raise ValueError("layout= and process_group= are for parameters; an optimizer has its own")
    return _given_optimizers(optimizers)


def _is_of_deepspeed(source: Any) -> bool:
    """Return whether an object is DeepSpeed's, or contains an optimizer of DeepSpeed."""
    for _ in range(MOST_LEVELS):
        if source is None or isinstance(source, Engine):
            break
        if type(source).__module__.partition(".")[0] == "deepspeed":
            return True
        source = getattr(source, "optimizer", None)
    return isinstance(source, Engine) and source.layout is not None and source.layout.steps_by_group


def _given_params(source: Any, layout: FlatLayout | None, process_group: dist.ProcessGroup | None) -> _Given:
    if isinstance(source, torch.optim.Optimizer):
        groups: list[Any] = source.param_groups
    else:
        members = [source] if isinstance(source, Tensor) else source
        check_iterable(members, "optimizer_or_params")
        members = list(members)
        groups = members if members and isinstance(members[0], dict) else [{"params": members}]
    names: dict[Tensor, str] = {}
    for index, group in enumerate(groups):
        for param, name in named_params({**group, "params": list(group["params"])}, index):
            if param.requires_grad or param.grad is not None:
                names.setdefault(param, name)
    if any(hasattr(param, mark) for param in names for mark in DEEPSPEED_MARKS):
        raise ValueError(DEEPSPEED)

    def described() -> list[LocalParam]:
        known = layout
        rows = []
        for param, name in names.items():
            known = known or find_layout(param, names)
            rows.append(describe(param, name, known))
        return rows

    return _Given(params=list(names), describe=described, process_group=process_group)


def _given_optimizers(optimizers: Sequence[Engine | ShardedOptimizer]) -> _Given:
    sharded = [each for each in optimizers if isinstance(each, ShardedOptimizer)]
    failure: Exception | None = None
    for each in sharded:
        try:
            each.collect_gradients()
        except ValueError as error:  # may be on this rank only; the others learn of it in the all-gather
            failure = error
    engines = [each.inside if isinstance(each, ShardedOptimizer) else each for each in optimizers]
    if any(each.process_group is not engines[0].process_group for each in engines):
        raise ValueError("the optimizers have different process groups, over which there is no one norm; clip each by itself")
    return _Given(
        params=[param for each in engines for param in each.all_params()],
        describe=lambda: [entry for number, each in enumerate(engines) for entry in _described(each, number, len(engines))],
        process_group=engines[0].process_group,
        engines=engines,
        sharded=sharded,
        failure=failure,
    )


def _described(engine: Engine, number: int, count: int) -> Iterator[LocalParam]:
    """Describe an optimizer's parameters on this rank. With several optimizers, unnamed parameters are numbered by optimizer."""
    for index, group in enumerate(engine.param_groups):
        for param, name in named_params(group, index):
            is_named = "param_names" in group or count == 1
            yield engine.describe_param(param, name if is_named else f"optimizers[{number}].{name}", group)


# ---------------------------------------------------------------------------------------------------------------------- ownership


class _Ownership:
    """The pieces of an optimizer's parameters whose norm this rank adds, so that replicas are added once. Keeps no parameter alive.

    Attributes:
        number: counts the exchanges of the process group; the same on all ranks.
        pending: rows of the last call, which the host has not read.
    """

    def __init__(self, layout: Layout, number: int) -> None:
        self._params = [ref(param) for param in layout.params]
        self._described = properties_of(layout.params)
        self.owned = [
            [piece for piece, owned in zip(entry.pieces, layout.owned[first:], strict=False) if owned and piece.segment.numel]
            for entry, first in zip(layout.local_params, layout.first_piece, strict=True)
        ]
        self.partial = layout.partial
        self.has_dtensors = layout.has_dtensors
        self.number = number
        self.pending: Tensor | None = None

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Return whether these are the parameters, with the same properties."""
        if len(params) != len(self._params) or any(known() is not param for known, param in zip(self._params, params, strict=True)):
            return False
        return properties_of(params) == self._described


class _Exchanges:
    """Caches the ownership that the ranks of a process group have exchanged.

    Attributes:
        count: the number of exchanges so far.
        by_param: the last ownership, by the first parameter of a call (`NO_PARAM` if there is none).
    """

    def __init__(self) -> None:
        self.count = 0
        self.by_param = WeakIdKeyDictionary()

    def known(self, params: Sequence[Tensor]) -> _Ownership | None:
        found = self.by_param.get(next(iter(params), NO_PARAM))
        return found if found is not None and found.fits(params) else None

    def make(self, given: _Given, group: dist.ProcessGroup | None) -> _Ownership:
        """Exchange which pieces ranks hold, and cache this rank's ownership. A collective."""
        made = _Ownership(exchange_layouts(given.describe, group, compares_values=lambda _: False), self.count + 1)
        self.count += 1
        self.by_param[next(iter(given.params), NO_PARAM)] = made
        return made


_alone = _Exchanges()
_exchanges: WeakKeyDictionary[dist.ProcessGroup, _Exchanges] = WeakKeyDictionary()


# --------------------------------------------------------------------------------------------------------------------------- the norm


@dataclass(frozen=True, kw_only=True)
class _Local:
    """A gradient of this rank."""

    row: int  # index of the parameter
    memory: Tensor  # the tensor to scale
    values: Tensor  # the reduced gradient, for the norm; the same tensor as `memory` unless tensor parallelism has left it Partial


@dataclass(frozen=True, kw_only=True)
class _Gathered:
    """The result of the all-gather."""

    table: Tensor  # float64 (ranks, 4)
    local: list[_Local]
    is_read: bool = False  # whether the host has read the table

    def norm(self, norm_type: float) -> Tensor:
        powers = self.table[:, POWER]
        return powers.max() if math.isinf(norm_type) else powers.sum().pow(1.0 / norm_type)


def _agree(given: _Given, group: dist.ProcessGroup | None, norm_type: float) -> _Gathered:
    """Sum the powers of all ranks: one all-gather if all ranks have the parameters of the last call.

    Raises:
        ValueError: on all ranks; on an accelerator, ranks that have not failed themselves raise it in their next call.
    """
    exchanges = _alone if group is None else _exchanges.setdefault(group, _Exchanges())
    ownership = exchanges.known(given.params)
    if ownership is not None and ownership.pending is not None:
        pending, ownership.pending = ownership.pending, None
        _raise_pending(pending.tolist())
    for is_last in (False, True):
        local: list[_Local] = []
        failure: Exception | None = None
        row = torch.zeros(4, dtype=torch.float64, device=given.params[0].device if given.params else "cpu")
        if ownership is None:
            row[STALE] = 1.0
        else:
            row[EXCHANGE] = float(ownership.number)
            try:
                if given.failure is not None:
                    raise given.failure
                local = _local_gradients(given, ownership)
                row[POWER] = _power(local, ownership, norm_type, row.device)
            except Exception as error:  # the other ranks must get the error before this one raises
                failure, row[FAILED] = error, 1.0
        table = _gathered(row, group)
        is_on_host = known_on_host(table)
        if not is_on_host and failure is not None:
            raise failure  # the other ranks raise in their next call
        if not is_on_host and ownership is not None:
            ownership.pending = table
            return _Gathered(table=table.masked_fill(_spoiled(table), math.nan), local=local)
        rows = table.tolist()
        if any(each[FAILED] for each in rows):
            raise ValueError(gather_messages(failure, group)) from failure
        if _are_of_one_exchange(rows):
            return _Gathered(table=table, local=local, is_read=is_on_host)
        if is_last or not (is_on_host or all(each[STALE] for each in rows)):
            raise ValueError(CHANGED)
        ownership = exchanges.make(given, group)
    raise AssertionError("the last attempt has returned or raised")


def _are_of_one_exchange(rows: Sequence[Sequence[float]]) -> bool:
    """Return whether all ranks have used the ownership of the same exchange."""
    return not any(row[STALE] for row in rows) and len({row[EXCHANGE] for row in rows}) == 1


def _raise_pending(rows: Sequence[Sequence[float]]) -> None:
    """Raise an error of the last call, which only the device knew then, on ranks that have not raised one. No communication."""
    failed = [rank for rank, row in enumerate(rows) if row[FAILED]]
    if failed:
        raise ValueError(f"so.clip_grad_norm_: {named_ranks(failed)} failed in the last call; their own errors say why")
    if not _are_of_one_exchange(rows):
        raise ValueError(CHANGED)


def _spoiled(table: Tensor) -> Tensor:
    """Return a device flag whether the norm is invalid: bool (1, 1). If so, gradients become NaN."""
    exchange = table[:, EXCHANGE]
    return ((table[:, FAILED] + table[:, STALE]).sum() + (exchange.max() - exchange.min()) > 0).reshape(1, 1)


def _gathered(row: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return row[None]
    table = row.new_empty(dist.get_world_size(group), len(row))
    with naming_missing_ranks(group, "the norm of the gradients in so.clip_grad_norm_"):
        dist.all_gather(list(table.unbind()), row, group=group)
    return table


def _local_gradients(given: _Given, ownership: _Ownership) -> list[_Local]:
    """Return this rank's gradients. A collective if tensor parallelism has left some Partial."""
    entries: list[LocalParam] = []
    found = []
    grads = [param.grad for param in given.params]
    reduced = reduced_gradients(given.params, ownership.partial) if ownership.has_dtensors else grads
    for row, (param, grad, whole) in enumerate(zip(given.params, grads, reduced, strict=True)):
        if grad is None or whole is None:
            continue
        values = _local_of(param, whole)
        if values is None:
            entries = entries or given.describe()
            values = entries[row].local(whole, GRADIENT)
        found.append(_Local(row=row, memory=values if whole is grad else local_of(grad), values=values))
    return found


def _local_of(param: Tensor, grad: Tensor) -> Tensor | None:
    """Return this rank's part of a gradient by a quick check that it is laid out like its parameter; None if the check does not suffice."""
    spec = getattr(grad, "_spec", None)
    if type(grad) in PLAIN and type(param) in PLAIN:
        local = grad if grad.shape == param.shape else None
    else:
        local = local_of(grad) if spec is not None and spec is getattr(param, "_spec", None) else None
    return local if local is not None and type(local) in PLAIN and local.layout == torch.strided else None


def _power(local: Iterable[_Local], ownership: _Ownership, norm_type: float, device: torch.device) -> Tensor:
    """Sum the powers of the elements of the pieces that this rank owns, or return the largest: float64 ()."""
    pieces = [piece.of(gradient.values) for gradient in local for piece in ownership.owned[gradient.row]]
    powers = [part.to(device) for tensors in _by_kind(pieces).values() for part in _powers(tensors, norm_type)]
    if not powers:
        return torch.zeros((), dtype=torch.float64, device=device)
    stacked = torch.stack(powers)
    return stacked.max() if math.isinf(norm_type) else stacked.sum()


def _powers(tensors: Sequence[Tensor], norm_type: float) -> Iterator[Tensor]:
    """Yield float64 scalars: partial sums of |element| ** norm_type over all tensors, or for inf the largest |element| of each tensor."""
    foreach_norm = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
    if math.isinf(norm_type):
        yield from (norm.double() for norm in foreach_norm(list(tensors), norm_type))
    elif not known_on_host(tensors[0]):
        yield from (norm.pow(norm_type) for norm in foreach_norm(list(tensors), norm_type, dtype=torch.float64))
    else:
        for flat in _joined(tensors):
            yield _square_sum(flat) if norm_type == 2.0 else _power_sum(flat, norm_type)


def _joined(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield flat tensors with the same elements; small tensors are concatenated, as each one costs several calls of torch."""
    small = [tensor.reshape(-1) for tensor in tensors if tensor.numel() < CHUNK]
    yield from (tensor.reshape(-1) for tensor in tensors if tensor.numel() >= CHUNK)
    if small:
        yield from torch.cat(small).split(MOST_CHUNKS * CHUNK)


def _square_sum(flat: Tensor) -> Tensor:
    numel = flat.numel() // ROW * ROW
    norms = torch.linalg.vector_norm(flat[:numel].view(-1, ROW), dim=1, dtype=torch.float32).double()
    rest = flat[numel:].double()
    total = torch.dot(norms, norms) + torch.dot(rest, rest)
    if SMALLEST < math.sqrt(float(total) / flat.numel()) < LARGEST:
        return total
    return _power_sum(flat, 2.0)


def _power_sum(flat: Tensor, norm_type: float) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(chunk.double(), norm_type).pow(norm_type) for chunk in flat.split(CHUNK)]).sum()


def _by_kind(tensors: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """Group non-empty tensors by device and dtype, for foreach."""
    found: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.numel():
            found[tensor.device, tensor.dtype].append(tensor)
    return found


def _raise_nonfinite(given: _Given, local: Sequence[_Local], norm: Tensor, group: dist.ProcessGroup | None) -> NoReturn:
    """Raise an error for a non-finite norm on all ranks. A collective."""
    entries = given.describe()
    names = [repr(entries[each.row].name) for each in local if not bool(each.values.isfinite().all())]
    where = gather_messages(f"not finite: {listed(names)}" if names else None, group)
    raise RuntimeError(
        f"the norm of the gradients is {float(norm)}, so that they cannot be clipped; leave out error_if_nonfinite to scale them all the "
        f"same. {where}"
    )
