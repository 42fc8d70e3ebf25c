"""Translate state dicts of other libraries' optimizers, recognised by their keys, so that training continues where it stopped.

    torch.optim     Adam, AdamW, SGD, Muon: `weight_decay` means L2 or coupled decay; SGD and Muon have no step counter
    Composer        DecoupledAdamW, DecoupledSGDW: torch's keys and `initial_lr`, the reference; a momentum buffer may be None
    optimi          Adam, AdamW, StableAdamW: debiased moments in the parameter's dtype, one step counter per group, `max_lr`, `kahan_comp`
    dion, DeepSpeed their Muon: see foreign_muon.py

Used by `load_state_dict`. The keys are those of torch 1.12 to 2.13, Composer 0.31 and optimi 0.3.3.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sharded_optim.formulas.scalars import bias_correction
from sharded_optim.formulas.weight_decay import COUPLED, DECOUPLED, L2, form_of
from sharded_optim.step.foreign_muon import from_deepspeeds_muon, from_dion, is_deepspeeds_muon, is_dions
from sharded_optim.step.param_groups import HIGH_DECAY, reference
from sharded_optim.step.state import STEP
from sharded_optim.storage.float_formats import KAHAN_COMP

__all__ = ["translate"]

TORCH, COMPOSER, OPTIMI, DION, DEEPSPEED = "torch", "Composer", "optimi", "dion", "DeepSpeed"
# Keys that are dropped: they choose torch's implementation, or are translated (decoupled_weight_decay).
TORCHS_SWITCHES = {"foreach", "fused", "capturable", "decoupled_weight_decay", "differentiable"}
OPTIMIS_SWITCHES = {"beta1", "beta2", "decouple_wd", "decouple_lr", "max_lr", "foreach", "triton", "gradient_release", "setup", "step"}
OPTIMIS_SCRATCH = {"eps_sq", "mean_square", "group"}
OPTIMIS_OTHERS = {"beta3", "k", "momentum"}  # keys of Adan, Ranger and SGD; RAdam's groups have the same keys as Adam's
TORCHS_ADAM = {"betas", "eps", "weight_decay", "amsgrad"}  # RAdam and NAdam lack amsgrad
TORCHS_SGD = {"momentum", "dampening", "nesterov", "weight_decay"}
TORCHS_MUON = {"momentum", "nesterov", "ns_coefficients", "adjust_lr_fn"}
# Keys by which a group of torch's Adam or SGD is recognised. `fused` alone would not do: torchtitan writes it into this library's groups.
TORCHS_MARKS = ({"capturable"}, {"momentum", "fused", "differentiable"})
OURS = {"decay_form", "reference_lr", "learns_reference_lr", "kahan_sum", "stochastic_rounding", "rounding_seed"}

logger = logging.getLogger(__name__)

Group = dict[str, Any]
ParamState = dict[str, Any]


def translate(state_dict: dict[str, Any], own_groups: list[Group], *, replaces_composer: bool = False) -> dict[str, Any]:
    """Translate a state dict of a known library; return any other unchanged. Does not mutate the argument.

    Args:
        state_dict: as `torch.optim.Optimizer.state_dict` returns it.
        own_groups: the param groups to load it into; equally many.
        replaces_composer: whether the loading class replaces one of Composer's.

    Raises:
        ValueError: the state dict is from an unsupported optimizer of torch or optimi, or from DeepSpeed's Adam without bias correction.

    Warns:
        UserWarning: the keys match two libraries; says how the state dict is read, once.
    """
    groups, state = [], dict(state_dict["state"])
    sources = set()
    highest_decay = max(float(group.get("weight_decay", 0.0)) for group in state_dict["param_groups"])
    doubtful, read_as = False, ""
    for index, (group, own) in enumerate(zip(state_dict["param_groups"], own_groups, strict=True)):
        # torch keeps unknown keys of a state dict that it loads, so ours may have survived training with torch, and are stale.
        if "reference_lr" in group and any(group.keys() >= keys for keys in TORCHS_MARKS):
            group = {key: value for key, value in group.items() if key not in OURS}
            state |= {
                key: {name: value for name, value in state[key].items() if name != KAHAN_COMP} for key in group["params"] if key in state
            }
        source = _source(group, f"the state dict's param_groups[{index}]")
        if source == TORCH and "initial_lr" in group and own["decay_form"] == DECOUPLED:
            # Composer's optimizers subclass torch's, and have the same keys once a scheduler has added initial_lr to torch's. A class that
            # replaces one of Composer's reads the state as Composer's. Any other class has decoupled decay only because its user chose it,
            # so the value decides: it is torch's from HIGH_DECAY on, where Composer would warn of it, else Composer's.
            source = TORCH if highest_decay >= HIGH_DECAY and not replaces_composer else COMPOSER
            doubtful = highest_decay > 0 and (not replaces_composer or highest_decay >= HIGH_DECAY)
            read_as = source
        if source is None:
            groups.append(group)
            continue
        translated, states = TRANSLATIONS[source](group, {key: state[key] for key in group["params"] if key in state}, own)
        groups.append(translated)
        state |= states
        sources.add(source)
    if sources:
        logger.info("loading the state of an optimizer of %s", ", ".join(sorted(sources)))
    if doubtful:
        _warn_of_doubt(read_as, highest_decay)
    return {**state_dict, "state": state, "param_groups": groups}


def _source(group: Group, where: str) -> str | None:
    """Return the library whose keys a group has; None if it is this library's or unknown.

    Raises:
        ValueError: the group is from an optimizer that has no counterpart here.
    """
    if group.get("bias_correction", True) is False:
        raise ValueError(f"{where} has bias_correction=False, an option of DeepSpeed's Adam; every optimizer here corrects the bias")
    if "reference_lr" in group:
        return None
    if is_dions(group):
        return DION
    if is_deepspeeds_muon(group):
        return DEEPSPEED
    if group.keys() >= {"kahan_sum", "decouple_lr"} and group.keys() & OPTIMIS_OTHERS:
        raise ValueError(
            f"{where} is from an optimizer of optimi that is not continued here; it has {', '.join(group)}; supported are Adam, AdamW "
            "and StableAdamW"
        )
    if group.keys() >= {"beta1", "beta2", "kahan_sum"}:
        return OPTIMI
    if group.keys() >= TORCHS_MUON:
        return TORCH
    if "maximize" in group or "foreach" in group:
        if not (group.keys() >= TORCHS_ADAM or group.keys() >= TORCHS_SGD):
            raise ValueError(
                f"{where} is from an optimizer of torch that is not continued here; it has {', '.join(group)}; supported are Adam, "
                "AdamW, SGD and Muon"
            )
        return TORCH
    return COMPOSER if "initial_lr" in group else None


def _warn_of_doubt(source: str, highest_decay: float) -> None:
    meaning = "coupled to lr, or L2" if source == TORCH else "the fraction that a step at initial_lr takes"
    warnings.warn(
        f"the state dict may be from torch with a scheduler or from Composer, and is read as {source}'s: weight_decay up to "
        f"{highest_decay} is {meaning}. To choose, set decay_form of the param groups before loading ('coupled' for torch's AdamW, 'l2' "
        f"for its Adam and SGD), or after it ('decoupled')",
        UserWarning,
        stacklevel=2,
    )


def _from_torch(group: Group, states: dict[Any, ParamState], own: Group) -> tuple[Group, dict[Any, ParamState]]:
    if not group["weight_decay"]:
        form = own["decay_form"]  # any form is right for no decay
    elif group.keys() >= TORCHS_MUON:
        form = COUPLED
    elif "momentum" in group:
        form = L2
    elif "decoupled_weight_decay" in group:
        form = COUPLED if group["decoupled_weight_decay"] else L2
    else:  # before torch 2.7, groups of Adam and AdamW have the same keys
        form = L2 if own["decay_form"] == L2 else COUPLED
    translated = {key: value for key, value in group.items() if key not in TORCHS_SWITCHES} | {"decay_form": form}
    if group.get("adjust_lr_fn", "") is None:
        translated["adjust_lr_fn"] = "original"  # torch's meaning of None
    return translated, {key: _with_step(_tensors(state)) for key, state in states.items()}


def _from_composer(group: Group, states: dict[Any, ParamState], own: Group) -> tuple[Group, dict[Any, ParamState]]:
    translated = {key: value for key, value in group.items() if key not in TORCHS_SWITCHES}
    translated |= {"decay_form": DECOUPLED} | reference(float(group["initial_lr"]))
    return translated, {key: _with_step(_tensors(state)) for key, state in states.items()}


def _from_optimi(group: Group, states: dict[Any, ParamState], own: Group) -> tuple[Group, dict[Any, ParamState]]:
    translated = {key: value for key, value in group.items() if key not in OPTIMIS_SWITCHES}
    betas = (float(group["beta1"]), float(group["beta2"]))
    if not group["weight_decay"]:
        form = own["decay_form"]  # any form is right for no decay
    else:  # StableAdamW's groups have no decouple_wd
        form = form_of(decouple_wd=group.get("decouple_wd", True), decouple_lr=group["decouple_lr"])
    translated |= reference(float(group["max_lr"] if group["max_lr"] is not None else group["lr"]))
    translated |= {
        "betas": betas,
        "decay_form": form,
        "amsgrad": False,
        "kahan_sum": group["kahan_sum"] is not False,
        "stochastic_rounding": False,
    }
    return translated, {key: _biased(state, betas, state.get(STEP, group.get(STEP, 0))) for key, state in states.items()}


def _biased(state: ParamState, betas: tuple[float, float], step: Any) -> ParamState:
    """Multiply optimi's moments, which are debiased, by the 1 - beta**step that this library's bias correction divides by."""
    step = int(step)
    result: ParamState = {key: value for key, value in _tensors(state).items() if key not in OPTIMIS_SCRATCH | {KAHAN_COMP}}
    for name, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True):
        if name in result:
            result[name] = result[name].to(torch.float32) * bias_correction(beta, step)
    compensation = state.get(KAHAN_COMP)
    if isinstance(compensation, Tensor) and compensation.dtype.is_floating_point:  # else None, or a placeholder for a kernel
        result[KAHAN_COMP] = compensation
    return result | {STEP: _counter(step)} if result else {}


def _counter(step: int) -> Tensor:
    return torch.tensor(step, dtype=torch.float32, device="cpu")


def _tensors(state: Mapping[str, Any]) -> ParamState:
    return {key: value for key, value in state.items() if value is not None}


def _with_step(state: ParamState) -> ParamState:
    """Add a step counter to state of SGD or Muon, which has none. Any positive value marks the momentum buffer as begun."""
    return state if STEP in state else {**state, STEP: _counter(1)}


# (saved group, saved states of its parameters, our group) -> (translated group, translated states)
TRANSLATIONS: dict[str, Callable[[Group, dict[Any, ParamState], Group], tuple[Group, dict[Any, ParamState]]]] = {
    TORCH: _from_torch,
    COMPOSER: _from_composer,
    OPTIMI: _from_optimi,
    DION: from_dion,
    DEEPSPEED: from_deepspeeds_muon,
}
