"""State dicts of other libraries' optimizers, recognised by their keys and told in ours, so that a trajectory continues where it was.

    torch.optim     Adam, AdamW, SGD: `weight_decay` means L2 or coupled decay; SGD has no step counter
    Composer        DecoupledAdamW, DecoupledSGDW: the reference learning rate is `initial_lr`; a momentum buffer may be None
    optimi          Adam, AdamW, StableAdamW: debiased moments in the parameter's dtype, one step counter per group, `max_lr`, `kahan_comp`

Used when a state dict is loaded. The keys are those of torch 1.12 to 2.13, Composer 0.31 and optimi 0.3.3.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sharded_optim.algorithms.bias_correction import bias_correction
from sharded_optim.algorithms.weight_decay import L2
from sharded_optim.formats import KAHAN_COMP
from sharded_optim.state import STEP

__all__ = ["translate"]

TORCHS_SWITCHES = {"foreach", "fused", "capturable", "decoupled_weight_decay"}  # how it computes, which is not ours to follow
OPTIMIS_SWITCHES = {"beta1", "beta2", "decouple_wd", "decouple_lr", "max_lr", "foreach", "triton", "gradient_release", "setup", "step"}
OPTIMIS_SCRATCH = {"eps_sq", "mean_square", "group", KAHAN_COMP}

logger = logging.getLogger(__name__)

Group = dict[str, Any]
ParamState = dict[str, Any]


def translate(state_dict: dict[str, Any], own_groups: list[Group]) -> dict[str, Any]:
    """The state dict in our terms; itself, where it is one of ours or of nobody we know. Nothing given is changed.

    Args:
        state_dict: as `torch.optim.Optimizer.state_dict` returns it.
        own_groups: the param groups it is going to be loaded into.
    """
    groups, state = [], dict(state_dict["state"])
    sources = set()
    for index, group in enumerate(state_dict["param_groups"]):
        source = _source(group)
        if source is None:
            groups.append(group)
            continue
        sources.add(source.__name__.removeprefix("_from_"))
        own = own_groups[index] if index < len(own_groups) else {}
        translated, states = source(group, {key: state[key] for key in group["params"] if key in state}, own)
        groups.append(translated)
        state |= states
    if sources:
        logger.info("loading the state of an optimizer of %s", ", ".join(sorted(sources)))
    return {**state_dict, "state": state, "param_groups": groups}


def _source(group: Group) -> Any:
    """The function that translates this group, or None."""
    if "reference_lr" in group:
        return None
    if "beta1" in group and "kahan_sum" in group:
        return _from_optimi
    if "maximize" in group or "foreach" in group:
        return _from_torch
    if "initial_lr" in group:  # torch's schedulers write it too, but torch's groups were recognised above
        return _from_composer
    return None


def _from_torch(group: Group, states: dict[Any, ParamState], own: Group) -> tuple[Group, dict[Any, ParamState]]:
    if not group["weight_decay"]:
        form = own.get("decay_form", "coupled")  # of nothing
    elif "momentum" in group:
        form = L2
    elif "decoupled_weight_decay" in group:
        form = "coupled" if group["decoupled_weight_decay"] else L2
    else:  # before torch 2.7, Adam's and AdamW's look alike
        form = L2 if own.get("decay_form") == L2 else "coupled"
    translated = {key: value for key, value in group.items() if key not in TORCHS_SWITCHES} | {"decay_form": form}
    return translated, {key: _with_step(_tensors(state)) for key, state in states.items()}


def _from_composer(group: Group, states: dict[Any, ParamState], own: Group) -> tuple[Group, dict[Any, ParamState]]:
    reference_lr = float(group["initial_lr"])
    translated = group | {"decay_form": "decoupled", "reference_lr": reference_lr, "learns_reference_lr": reference_lr == 0.0}
    return translated, {key: _with_step(_tensors(state)) for key, state in states.items()}


def _from_optimi(group: Group, states: dict[Any, ParamState], own: Group) -> tuple[Group, dict[Any, ParamState]]:
    translated = {key: value for key, value in group.items() if key not in OPTIMIS_SWITCHES}
    betas = (float(group["beta1"]), float(group["beta2"]))
    if not group["weight_decay"]:
        form = own.get("decay_form", "coupled")  # of nothing
    elif group["decouple_lr"]:
        form = "decoupled"
    else:
        form = "coupled" if group.get("decouple_wd", True) else L2  # StableAdamW's groups do not say
    reference_lr = float(group["max_lr"] if group["max_lr"] is not None else group["lr"])
    translated |= {
        "betas": betas,
        "decay_form": form,
        "amsgrad": False,
        "reference_lr": reference_lr,
        "learns_reference_lr": reference_lr == 0.0,
        "kahan_sum": group["kahan_sum"] is not False,
        "stochastic_rounding": False,
    }
    return translated, {key: _biased(state, betas, state.get(STEP, group.get(STEP, 0))) for key, state in states.items()}


def _biased(state: ParamState, betas: tuple[float, float], step: Any) -> ParamState:
    """optimi's moments times 1 - beta**step, its group's: then our bias correction gives them back, now and in every later step."""
    step = int(step)
    result: ParamState = {key: value for key, value in _tensors(state).items() if key not in OPTIMIS_SCRATCH}
    for name, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True):
        if name in result:
            result[name] = result[name].to(torch.float32) * bias_correction(beta, step)
    compensation = state.get(KAHAN_COMP)
    if isinstance(compensation, Tensor) and compensation.dtype.is_floating_point:  # else None, or a placeholder for a kernel
        result[KAHAN_COMP] = compensation
    return result | {STEP: torch.tensor(float(step))} if result else {}


def _tensors(state: Mapping[str, Any]) -> ParamState:
    return {key: value for key, value in state.items() if value is not None}


def _with_step(state: ParamState) -> ParamState:
    """SGD counts no steps; all that matters of them is that a momentum buffer has begun."""
    return state if STEP in state else {**state, STEP: torch.tensor(1.0)}
