"""Norms and cosines of a step, per parameter, in the form that Composer's OptimizerMonitor requests.

    l2_norm/{moment,param,update,grad}/NAME, cosine/{update_grad,moment_grad}/NAME

After a step the monitor calls `report_per_parameter_metrics` for each parameter. If the model is sharded it then calls
`pre_reduce_metrics` and `dist_reduce_metrics`, which turn this rank's values into those of whole tensors: each rank adds the squares and
dot products of the pieces that it owns, so replicas are not counted twice.

`update` is what the step subtracted from the parameter, weight decay included: old - new. The old parameter is not stored but recomputed
from the new one, in float64, with the coefficients of the step, because a scheduler may have changed the groups since.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.formulas import Algorithm
from sharded_optim.sharding import Layout, LocalParam, Piece, partial_of
from sharded_optim.sharding.names import names_without_wrappers
from sharded_optim.storage.format import Format
from sharded_optim.storage.formats import format_of

__all__ = ["Update", "dist_reduce", "pre_reduce", "report"]

NORMS = ("moment", "param", "update", "grad")
COSINES = {"cosine/update_grad": ("update", "grad"), "cosine/moment_grad": ("moment", "grad")}
UPDATE, UPDATE_GRAD = "l2_norm/update", "cosine/update_grad"
KINDS = (*(f"l2_norm/{vector}" for vector in NORMS), *COSINES)


class Measured(NamedTuple):
    """Products of the values that a step subtracted from a piece: float64 ()."""

    square: Tensor  # their squared norm
    product: Tensor  # their dot product with the gradient

    @classmethod
    def of(cls, moved: Tensor, grad: Tensor) -> Measured:
        moved = moved.double().flatten()
        return cls(moved.dot(moved), moved.dot(grad.double().flatten()))


@dataclass(frozen=True, kw_only=True)
class Update:
    """The record of the last update of one kernel call."""

    algorithm: Algorithm
    pieces: Sequence[tuple[LocalParam, Piece]]  # (local parameter, piece) of each row of the coefficients
    format: Format  # storage format of the parameters
    state_formats: Sequence[Format]  # storage format of each moment in algorithm.state
    coefficients: Tensor  # fp32 (pieces, coefficients of algorithm.update)
    proceed: Tensor | None  # the argument of Backend.update: bool (); None means that the step happened
    grad_scale: Tensor | None  # the argument of Backend.update: fp32 ()
    measured: Sequence[Measured] | None = None  # one per piece, if the update cannot be recomputed and was measured during the step


def report(entry: LocalParam, piece: Piece, state: dict[str, Any], last: tuple[Update, int] | None) -> dict[str, Tensor]:
    """Compute norms and cosines of this rank's piece of one tensor: {kind: float64 ()}.

    param: the parameter after the step, with its Kahan compensation.
    update: the values that the step subtracted, weight decay included; 0 without `last`, not finite if the decay multiplied by 0.
    moment: the first moment, not bias-corrected, or the momentum buffer.
    grad: the gradient without GradScaler's scale.

    Omitted are `moment` of an optimizer without one; `update` of Muon's matrices until the first step after the first report, as only
    then it is measured; and values that need a gradient that was released (`update` of SGD, not of Adam) or is a Partial DTensor.

    Args:
        entry, piece: the parameter and one of its pieces.
        state: the parameter's optimizer state, as plain or sharded tensors; empty before its first step.
        last: the update that wrote the piece, and its row in that update's coefficients; None if the last step did not write it.

    Raises:
        ValueError: the gradient is not laid out like the parameter.
    """

    def values_of(tensor: Tensor, role: str) -> Tensor:
        return piece.of(entry.local(tensor, role)).detach()

    def arrays_of(names: Iterable[str]) -> list[Tensor]:
        return [values_of(state[name], "state") for name in names]

    update, row = last if last is not None else (None, 0)
    local = values_of(entry.param, "parameter")
    fmt = format_of(local.dtype) if update is None else update.format
    vectors = {"param": fmt.load(local, *arrays_of(array.name for array in fmt.extra)).double()}
    stored = zip(update.algorithm.state, update.state_formats, strict=True) if update is not None else ()
    moments = [each.load(*arrays_of(each.entries(name))).double() for name, each in stored]
    if moments:
        vectors["moment"] = moments[0]
    if entry.param.grad is not None and partial_of(entry.param.grad) is None:  # reducing it would be a collective
        vectors["grad"] = values_of(entry.param.grad, "gradient").double()
        if update is not None and update.grad_scale is not None:
            vectors["grad"] = vectors["grad"] * update.grad_scale
    if update is None:
        vectors["update"] = torch.zeros_like(vectors["param"])
    elif update.algorithm.undo is not None:
        coefficients = update.coefficients[row].double().unbind()
        grad = vectors.get("grad", torch.full((), math.nan, dtype=torch.float64, device=local.device))  # NaN marks what needs it
        moved = update.algorithm.undo(vectors["param"], grad, *moments, *coefficients) - vectors["param"]
        if "grad" in vectors or not moved.isnan().all():
            vectors["update"] = _or_zero(update.proceed, moved)
    values = {f"l2_norm/{name}": torch.linalg.vector_norm(vectors[name]) for name in NORMS if name in vectors}
    for kind, (a, b) in COSINES.items():
        if a in vectors and b in vectors:
            values[kind] = _cosine((vectors[a] * vectors[b]).sum(), values[f"l2_norm/{a}"] * values[f"l2_norm/{b}"])
    if update is not None and update.measured is not None:
        square, product = (_or_zero(update.proceed, value) for value in update.measured[row])
        values["l2_norm/update"] = square.sqrt()
        if "grad" in vectors:
            scale = 1.0 if update.grad_scale is None else update.grad_scale
            values["cosine/update_grad"] = _cosine(product * scale, values["l2_norm/update"] * values["l2_norm/grad"])
    return values


def _or_zero(proceed: Tensor | None, value: Tensor) -> Tensor:
    """Return the value, or 0 if the step did not happen."""
    return value if proceed is None else torch.where(proceed.to(value.device), value, 0.0)


def _cosine(product: Tensor, norms: Tensor) -> Tensor:
    return torch.where(norms > 0, product / norms, 0.0)


def _split(key: str) -> tuple[str, str] | None:
    """Split a metric's key into (kind, tensor name); None if it is not one of ours."""
    kind = next((kind for kind in KINDS if key.startswith(f"{kind}/")), None)
    return None if kind is None else (kind, key.removeprefix(f"{kind}/"))


def pre_reduce(metrics: dict[str, Any], names: Container[str]) -> dict[str, Any]:
    """Return the metrics with the norms and cosines of these names as squares and dot products, which can be summed over ranks."""
    result = dict(metrics)
    for key, value in metrics.items():
        kind, name = _split(key) or ("", "")
        if name not in names:
            continue
        if kind.startswith("l2_norm/"):
            result[key] = value**2
        elif kind:
            a, b = COSINES[kind]
            result[key] = value * metrics[f"l2_norm/{a}/{name}"] * metrics[f"l2_norm/{b}/{name}"]
    return result


def dist_reduce(
    metrics: dict[str, Any], layout: Layout, index_of: Callable[[str], int | None], process_group: dist.ProcessGroup | None
) -> dict[str, Any]:
    """Sum the results of `pre_reduce` over all ranks with one all-reduce. Every rank of the group must call it.

    Args:
        metrics: this rank's metrics.
        layout: the layout of all ranks.
        index_of: maps a reported name to the index of its piece in the layout, or to None if the name is not ours.

    Returns:
        Norms and cosines of the whole tensors, float64 (), under the names that this rank reported or, for tensors that only other ranks
        hold, the layout's names without wrapper prefixes. Other keys are unchanged.
    """
    device = layout.local_params[0].param.device if layout.local_params else torch.device("cpu")
    vector = torch.zeros(len(layout.names), 2 * len(KINDS), dtype=torch.float64, device=device)
    result = {}
    called: dict[int, list[str]] = {}  # reported names of each tensor, keyed by slot: tied weights have several
    for key, value in metrics.items():
        kind, name = _split(key) or ("", "")
        index = index_of(name) if kind else None
        if index is None:
            result[key] = value
            continue
        slot = layout.slots[index]
        names = called.setdefault(slot, [])
        if name not in names:
            names.append(name)
        if layout.owned[index] and name == names[0]:
            column = KINDS.index(kind)
            vector[slot, column] += value.to(device)
            vector[slot, len(KINDS) + column] += 1.0
    if process_group is not None:
        dist.all_reduce(vector, group=process_group)
    sums, reported = vector.split(len(KINDS), dim=1)
    plain = names_without_wrappers(layout.names)
    for slot, counts in enumerate(reported.tolist()):
        values = {kind: sums[slot, column] for column, kind in enumerate(KINDS) if counts[column]}
        if counts[KINDS.index(UPDATE)] != counts[KINDS.index("l2_norm/param")]:  # some ranks have not measured their updates
            values = {kind: value for kind, value in values.items() if kind not in (UPDATE, UPDATE_GRAD)}
        for kind, value in values.items():
            if kind.startswith("l2_norm/"):
                whole = value.sqrt()
            else:
                a, b = COSINES[kind]
                whole = _cosine(value, (values[f"l2_norm/{a}"] * values[f"l2_norm/{b}"]).sqrt())
            result |= {f"{kind}/{name}": whole for name in called.get(slot, [plain[layout.names[slot]]])}
    return result
