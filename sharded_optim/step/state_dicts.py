"""Load a state dict: check it, and keep the values that torch's base class would drop or round. Used by `StatefulOptimizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from sharded_optim.formulas.hyperparameters import Hyperparameter, Switch
from sharded_optim.formulas.scalars import STEP_BITS
from sharded_optim.step.param_groups import named_params
from sharded_optim.step.state import STEP, Choice, zeros
from sharded_optim.storage.formats import extra_arrays

__all__ = ["ChoiceOf", "check_family", "check_sizes", "check_state", "loaded_state", "merged_groups"]

MOST_STEPS = 2 ** (STEP_BITS - 1)  # largest step count that float32 counts exactly
WAY_OUT = "load it into the class that saved it, or one of its family, which has the same hyperparameters and state"

ChoiceOf = Callable[[Tensor, Mapping[str, Any]], Choice]  # (parameter, its param group)


def _saved_states(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> list[tuple[Tensor, str, dict[str, Any], dict[str, Any]]]:
    """Return (parameter, name, group, saved state) for every saved state of a parameter in `groups`."""
    rows = []
    for index, (group, saved) in enumerate(zip(groups, state_dict["param_groups"], strict=True)):
        for (param, name), key in zip(named_params(group, index), saved["params"], strict=True):
            if key in state_dict["state"]:
                rows.append((param, name, group, state_dict["state"][key]))
    return rows


def check_sizes(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Raise ValueError unless the saved groups have as many parameters as these."""
    saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    sizes = [len(group["params"]) for group in groups]
    if saved_sizes != sizes:
        raise ValueError(
            f"the state dict has param groups of {saved_sizes} parameters, the optimizer of {sizes}; build the same groups before loading"
        )


def check_family(state_dict: dict[str, Any], foreign: Mapping[str, Hyperparameter]) -> None:
    """Raise ValueError if the saved groups are from another family of optimizers, even if no parameter has state yet.

    Args:
        foreign: hyperparameters that only other optimizers have, keyed by name.
    """
    for index, saved in enumerate(state_dict["param_groups"]):
        for key, value in saved.items():
            if key in foreign and not (isinstance(foreign[key], Switch) and not value):
                raise ValueError(f"the state dict's param_groups[{index}] has {key!r}, which this optimizer does not have; {WAY_OUT}")


def check_state(groups: list[dict[str, Any]], state_dict: dict[str, Any], choice_of: ChoiceOf, moments: Set[str]) -> None:
    """Raise ValueError, before anything is loaded, if the saved state does not fit `groups`, which are already merged.

    Args:
        moments: names of the moments of all algorithms.
    """
    for param, name, group, state in _saved_states(groups, state_dict):
        choice = choice_of(param, group)
        algorithm, expected = choice.algorithm, choice.entries
        unexpected = moments & state.keys() - set(algorithm.state) - algorithm.ignored_state
        may_begin = choice.may_begin(state.keys())
        for moment, fmt, entries in choice.moments:
            dtypes = {key: state[key].dtype for key in state if key == moment or str(key).startswith(f"{moment}.")}
            if _is_value(dtypes, moment):
                may_begin |= entries.keys()
            elif dtypes and dtypes != entries:
                raise ValueError(
                    f"the saved state of {name!r} has {_listed(dtypes)}, but the format {fmt.name!r} has {_listed(entries)}; load it "
                    f"into an optimizer with the state_dtype that it was saved with"
                )
        for key in (*expected, STEP):
            if key not in state and (unexpected or key not in may_begin):
                raise ValueError(
                    f"the saved state of {name!r} lacks {key!r} (it has {', '.join(map(str, state))}); it is another optimizer's: {WAY_OUT}"
                )
        if unexpected:
            raise ValueError(
                f"the saved state of {name!r} has {', '.join(sorted(unexpected))}, which this optimizer does not use; {WAY_OUT}"
            )
        counter = torch.as_tensor(state[STEP])
        if counter.numel() != 1:
            raise ValueError(f"saved {STEP!r} of {name!r} has shape {tuple(state[STEP].shape)}; it must be one number")
        if counter.is_cpu and not 0 <= float(counter) <= MOST_STEPS:
            raise ValueError(f"saved {STEP!r} of {name!r} is {float(counter)}; it must be a number of steps, at most {MOST_STEPS:,}")
        for key in (key for key in expected if key in state):
            if getattr(state[key], "placements", None) != getattr(param, "placements", None):
                raise ValueError(
                    f"saved {key!r} of {name!r} is not sharded like the parameter; load it with set_optimizer_state_dict of "
                    f"torch.distributed.checkpoint.state_dict, which reshards"
                )
            if state[key].shape != param.shape:
                raise ValueError(f"saved {key!r} of {name!r} has shape {tuple(state[key].shape)}, the parameter {tuple(param.shape)}")


def _is_value(dtypes: Mapping[str, torch.dtype], moment: str) -> bool:
    """Return whether a moment is saved as one floating-point array of values, which any format can store."""
    return dtypes.keys() == {moment} and dtypes[moment].is_floating_point


def _listed(arrays: Mapping[str, torch.dtype]) -> str:
    return ", ".join(f"{key!r} of {dtype}" for key, dtype in arrays.items())


def merged_groups(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return these param groups with the saved values; keys that the saved groups lack are kept (torch would drop them)."""
    # One deepcopy for all groups, so that a value that they share, such as a tensor lr, stays shared.
    copies = deepcopy([{key: value for key, value in saved.items() if key != "params"} for saved in saved_groups])
    merged = [own | saved for own, saved in zip(groups, copies, strict=True)]
    for group in merged:
        if isinstance(group.get("betas"), list):  # JSON has no tuples
            group["betas"] = tuple(group["betas"])
    return merged


def loaded_state(groups: list[dict[str, Any]], state_dict: dict[str, Any], choice_of: ChoiceOf) -> dict[Any, dict[str, Any]]:
    """Return copies of the saved states, keyed by parameter, with each array in its format's dtype. torch would cast all of them to the
    parameter's dtype (pytorch#43706).

    Missing arrays start as zeros; extra arrays that the parameter's format does not have are dropped. State of no parameter is kept.
    """
    keys = {key for saved in state_dict["param_groups"] for key in saved["params"]}
    state: dict[Any, dict[str, Any]] = {}
    for param, _, group, saved in _saved_states(groups, state_dict):
        choice = choice_of(param, group)
        own = choice.entries.keys() | extra_arrays() | {STEP}
        arrays = {array.name: saved[array.name] for array in choice.format.extra if array.name in saved}
        for moment, fmt, entries in choice.moments:
            if all(key in saved and saved[key].dtype == dtype for key, dtype in entries.items()):
                arrays |= {key: saved[key] for key in entries}
            elif moment in saved:
                value = saved[moment].detach().to(torch.float32)
                arrays |= dict(zip(entries, fmt.store(value, 0.5), strict=True))  # 0.5 makes stochastic formats round to nearest
        step = saved[STEP] if isinstance(saved[STEP], Tensor) else torch.tensor(saved[STEP], dtype=torch.float32, device="cpu")
        state[param] = {key: _copied(value, param) for key, value in saved.items() if key not in own}
        state[param][STEP] = step.to(param.device, torch.float32, copy=True).reshape(())
        for key, dtype in choice.entries.items():
            state[param][key] = zeros(param, dtype)
            if key in arrays:
                state[param][key].copy_(arrays[key].detach())
    return state | {key: value for key, value in state_dict["state"].items() if key not in keys}


def _copied(value: Any, param: Tensor) -> Any:
    """Copy an entry of a saved state that no step uses; tensors go to the parameter's device."""
    if isinstance(value, Tensor):
        return value.detach().to(param.device, copy=True)
    if isinstance(value, dict):
        return {key: _copied(each, param) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(each, param) for each in value)
    return deepcopy(value)
