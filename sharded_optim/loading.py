"""Loading a state dict: what torch's base class does not check, drops or rounds. Used by the engine."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sharded_optim.param_groups import check_hyperparameters, check_state_dtype
from sharded_optim.state import STEP

__all__ = ["check_state", "restore_groups", "restore_state"]


def _pairs(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> list[tuple[Tensor, str, dict[str, Any]]]:
    """(parameter, its name, saved state) for every saved state that belongs to a parameter of `groups`."""
    params = chain.from_iterable(group["params"] for group in groups)
    names = chain.from_iterable(group.get("param_names") or [None] * len(group["params"]) for group in groups)
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    state = state_dict["state"]
    return [(param, name or f"parameter {key}", state[key]) for param, name, key in zip(params, names, keys, strict=True) if key in state]


def check_state(groups: list[dict[str, Any]], state_dict: dict[str, Any], names: tuple[str, ...], dtype: torch.dtype) -> None:
    """Raise ValueError, before anything is loaded, for saved state that does not fit."""
    saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    sizes = [len(group["params"]) for group in groups]
    if saved_sizes != sizes:
        raise ValueError(
            f"the state dict has param groups of {saved_sizes} parameters, the optimizer of {sizes}; build the same groups before loading"
        )
    for index, group in enumerate(state_dict["param_groups"]):
        check_hyperparameters(group, f"the state dict's param_groups[{index}]", scheduled=True)
        check_state_dtype(dtype, group)
    for param, name, state in _pairs(groups, state_dict):
        for key in (*names, STEP):
            if key not in state:
                raise ValueError(
                    f"the saved state of {name} lacks {key!r} (it has {', '.join(map(str, state))}); it is another optimizer's"
                )
        if torch.as_tensor(state[STEP]).numel() != 1:
            raise ValueError(f"saved {STEP!r} of {name} has shape {tuple(state[STEP].shape)}; it must be one number")
        for key in names:
            if getattr(state[key], "placements", None) != getattr(param, "placements", None):
                raise ValueError(
                    f"saved {key!r} of {name} is not sharded like the parameter; load it with set_optimizer_state_dict of "
                    f"torch.distributed.checkpoint.state_dict, which reshards"
                )
            if state[key].shape != param.shape:
                raise ValueError(f"saved {key!r} of {name} has shape {tuple(state[key].shape)}, the parameter {tuple(param.shape)}")


def restore_groups(groups: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """Give back the keys that the saved groups lacked; torch drops them."""
    for group, old in zip(groups, before, strict=True):
        for key, value in old.items():
            group.setdefault(key, value)
        group["betas"] = tuple(group["betas"])


def restore_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], names: tuple[str, ...], dtype: torch.dtype) -> None:
    """Put back what torch has rounded: its load casts all state to the parameter's dtype (pytorch#43706)."""
    for param, _, saved in _pairs(optimizer.param_groups, state_dict):
        state = optimizer.state[param]
        for key in names:
            state[key] = saved[key].to(device=param.device, dtype=dtype, copy=True)
        state[STEP] = torch.as_tensor(saved[STEP], dtype=torch.float32).to(param.device, copy=True).reshape(())
