"""Check and convert the arguments of a ShardedOptimizer: options, a model, parameters in any form that torch's optimizers take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_optim.step.arguments import argument_names, check_iterable, hands_on, refuse_unknown
from sharded_optim.step.engine import Engine
from sharded_optim.step.options import Params
from sharded_optim.zero.bucket_layout import Group

__all__ = ["check_class", "check_defaults", "check_options", "groups_of", "tensors_of", "unwrapped"]

RESERVED_OPTIONS = ("gradient_release", "layout", "process_group")  # options that ShardedOptimizer sets for the optimizer inside


def check_class(optimizer_class: Any) -> None:
    """Raise TypeError unless `optimizer_class` is an optimizer class of this library."""
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Engine)):
        raise TypeError(
            f"optimizer_class must be a class of sharded_optim (so.AdamW, so.StableAdamW, ...), whose statistics stay right on shards, "
            f"got {optimizer_class!r}"
        )


def check_options(stage: int, bucket_mb: float | None, reduce_dtype: torch.dtype | None, transport: str) -> None:
    """Raise ValueError for an option out of range."""
    if stage not in (1, 2):
        raise ValueError(f"stage must be 1 or 2, got {stage!r}; fully_shard shards parameters too (stage 3)")
    if bucket_mb is not None and not bucket_mb > 0:
        raise ValueError(f"bucket_mb must be positive, got {bucket_mb!r}")
    if reduce_dtype is not None and not reduce_dtype.is_floating_point:
        raise ValueError(f"reduce_dtype must be a floating dtype, got {reduce_dtype}")
    if transport not in ("auto", "sends"):
        raise ValueError(f"transport must be 'auto' or 'sends', got {transport!r}")


def check_defaults(caller: type, optimizer_class: type[Engine], defaults: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for a keyword argument that `optimizer_class` does not take, or that ShardedOptimizer sets itself."""
    for name in RESERVED_OPTIONS:
        if name in defaults:
            raise ValueError(f"{name}={defaults[name]!r} cannot be given in the options: ShardedOptimizer sets it for the optimizer inside")
    if hands_on(optimizer_class):
        return  # a user's class that forwards its keyword arguments: the names that it takes are unknown
    taken = [name for name in argument_names(optimizer_class) if name not in RESERVED_OPTIONS]
    unknown = {name: value for name, value in defaults.items() if name not in taken}
    names = list(dict.fromkeys([*argument_names(caller), *taken]))
    refuse_unknown(caller.__name__, unknown, names, optimizer_class.hyperparameters)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel and torch.compile, which add prefixes to names."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def groups_of(params: Params) -> list[Group]:
    """Convert parameters to param groups, each with a list of tensors or of (name, tensor) pairs."""
    if isinstance(params, Tensor):
        raise ValueError(f"params must be a model, or an iterable of tensors or dicts, got one tensor of shape {tuple(params.shape)}")
    check_iterable(params, "params")
    given: list[Any] = list(params)
    groups = [dict(group) for group in given] if given and isinstance(given[0], dict) else [{"params": given}]
    for index, group in enumerate(groups):
        members = group["params"]
        check_iterable(members, f"the params of param_groups[{index}]")
        group["params"] = [members] if isinstance(members, Tensor) else list(members)
        if isinstance(members, set):
            raise ValueError(f"param_groups[{index}] is a set, whose order differs between ranks; give a list")
    tensors = [tensor for group in groups for tensor in tensors_of(group)]
    if len(set(map(id, tensors))) < len(tensors):
        raise ValueError("a parameter appears twice; give each parameter once")
    if tensors and not any(tensor.requires_grad for tensor in tensors):
        raise ValueError("no parameter is trainable; set requires_grad")
    return groups


def tensors_of(group: Group) -> list[Tensor]:
    """Return the tensors of a param group, whose entries are tensors or (name, tensor) pairs."""
    return [param[1] if isinstance(param, tuple) else param for param in group["params"]]
