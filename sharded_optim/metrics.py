"""Norms and cosines of a step, per parameter, as Composer's OptimizerMonitor asks an optimizer for them.

    l2_norm/{moment,param,update,grad}/NAME, cosine/{update_grad,moment_grad}/NAME

The monitor calls, after a step, `report_per_parameter_metrics` for each parameter. Where the model is sharded it then calls
`pre_reduce_metrics` and `dist_reduce_metrics`, which make this rank's values those of whole tensors: squares and dot products of the
pieces that a rank owns are added up, so replicas do not count twice.

`update` is what the step subtracted from the parameter, weight decay included: old - new. The old parameter is not kept but computed back
from the new one, in float64, with the coefficients that the step used; a scheduler may have changed the groups since.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_optim.algorithms import Algorithm
from sharded_optim.formats import Format
from sharded_optim.sharding import Layout, LocalParam

__all__ = ["Update", "dist_reduce", "last_update", "pre_reduce", "report"]

NORMS = ("moment", "param", "update", "grad")
COSINES = (("update", "grad"), ("moment", "grad"))
KINDS = tuple(f"l2_norm/{vector}" for vector in NORMS) + tuple(f"cosine/{a}_{b}" for a, b in COSINES)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What is kept of one backend's last update."""

    algorithm: Algorithm
    entries: Sequence[LocalParam]
    formats: Sequence[Format]  # of the parameters
    coefficients: Tensor  # fp32 (entries, coefficients of algorithm.update)
    proceed: Tensor | None  # as the backend was given
    grad_scale: Tensor | None


def last_update(updates: Sequence[Update], param: Tensor) -> tuple[Update, int] | None:
    """The update that wrote a parameter, and the parameter's place in it."""
    for update in updates:
        for index, entry in enumerate(update.entries):
            if entry.param is param:
                return update, index
    return None


def report(entry: LocalParam, state: dict[str, Any], last: tuple[Update, int] | None) -> dict[str, Tensor]:
    """{kind: value} of this rank's piece, float64 (); without `last`, of a step that did not touch the parameter.

    `update` is left out where it cannot be known any more: the gradient is gone and the algorithm needs it.
    """
    param = entry.local(entry.param, "parameter").detach().double()
    vectors = {"param": param}
    grad = entry.param.grad
    if grad is not None:
        vectors["grad"] = entry.local(grad, "gradient").detach().double()
    if last is None:
        vectors["update"] = torch.zeros_like(param)
    else:
        update, index = last
        if grad is not None and update.grad_scale is not None:
            vectors["grad"] = vectors["grad"] * update.grad_scale
        arrays = [entry.local(state[name], "state") for name in update.formats[index].extra]
        vectors["param"] = update.formats[index].load(entry.local(entry.param, "parameter"), *arrays).detach().double()
        moments = [entry.local(state[name], "state").double() for name in update.algorithm.state]
        if moments:
            vectors["moment"] = moments[0]
        if "grad" in vectors:
            row = update.coefficients[index].double().unbind()
            before = update.algorithm.undo(vectors["param"], vectors["grad"], *moments, *row)
            moved = before - vectors["param"]
            vectors["update"] = moved if update.proceed is None else torch.where(update.proceed, moved, 0.0)
    values = {f"l2_norm/{name}": torch.linalg.vector_norm(vectors[name]) for name in NORMS if name in vectors}
    for a, b in COSINES:
        if a in vectors and b in vectors:
            scale = values[f"l2_norm/{a}"] * values[f"l2_norm/{b}"]
            values[f"cosine/{a}_{b}"] = torch.where(scale > 0, (vectors[a] * vectors[b]).sum() / scale, 0.0)
    return values


def _split(key: str) -> tuple[str, str] | None:
    """(kind, tensor name) of one of our keys."""
    kind = next((kind for kind in KINDS if key.startswith(f"{kind}/")), None)
    return None if kind is None else (kind, key.removeprefix(f"{kind}/"))


def pre_reduce(metrics: dict[str, Any]) -> dict[str, Any]:
    """Norms become squares and cosines dot products: what can be added up over ranks. Other keys stay."""
    result = dict(metrics)
    for key, value in metrics.items():
        kind, name = _split(key) or ("", "")
        if kind.startswith("l2_norm/"):
            result[key] = value**2
        elif kind:
            a, b = kind.removeprefix("cosine/").split("_")
            result[key] = value * metrics[f"l2_norm/{a}/{name}"] * metrics[f"l2_norm/{b}/{name}"]
    return result


def dist_reduce(
    metrics: dict[str, Any], layout: Layout, index_of: Callable[[str], int | None], process_group: dist.ProcessGroup | None
) -> dict[str, Any]:
    """Add up what `pre_reduce` made of all ranks' metrics, with one all-reduce. Every rank of the group must call it.

    Args:
        metrics: of this rank.
        layout: of all ranks.
        index_of: the index into `layout.local_params` of a name the user reported a parameter under; None for a name that is not ours.

    Returns:
        Norms and cosines of the whole tensors, float64 (), under the names this rank reported or, for tensors that only other ranks
        hold, the layout's. Other keys as they were.
    """
    device = layout.local_params[0].param.device if layout.local_params else torch.device("cpu")
    vector = torch.zeros(len(layout.names), 2 * len(KINDS), dtype=torch.float64, device=device)
    result, called = {}, dict(enumerate(layout.names))
    for key, value in metrics.items():
        kind, name = _split(key) or ("", "")
        index = index_of(name) if kind else None
        if index is None:
            result[key] = value
            continue
        slot = layout.slots[index]
        called[slot] = name
        if layout.owned[index]:
            column = KINDS.index(kind)
            vector[slot, column] += value.to(device)
            vector[slot, len(KINDS) + column] += 1.0
    if process_group is not None:
        dist.all_reduce(vector, group=process_group)
    sums, reported = vector.split(len(KINDS), dim=1)
    for slot, counts in enumerate(reported.tolist()):
        values = {kind: sums[slot, column] for column, kind in enumerate(KINDS) if counts[column]}
        for kind, value in values.items():
            if kind.startswith("l2_norm/"):
                result[f"{kind}/{called[slot]}"] = value.sqrt()
            else:
                a, b = kind.removeprefix("cosine/").split("_")
                scale = (values[f"l2_norm/{a}"] * values[f"l2_norm/{b}"]).sqrt()
                result[f"{kind}/{called[slot]}"] = torch.where(scale > 0, value / scale, 0.0)
    return result
