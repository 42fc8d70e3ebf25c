"""Translate groups and state of other libraries' Muon, which steps the rest of a model by AdamW, to this library's.

    dion        Muon of microsoft/dion: M <- mu M + g, of which ours is the (1 - mu)-th; its state does not tell the coefficients
    DeepSpeed   MuonWithAuxAdam, as its engine makes it where a config says "Muon"

Used by `foreign_state.py`. Tried with dion of August 2026 and DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sharded_optim.formulas.weight_decay import COUPLED
from sharded_optim.step.state import STEP

__all__ = ["DEEPSPEEDS_MUON", "DIONS_MUON", "from_deepspeeds_muon", "from_dion"]

DIONS_MUON = {"algorithm", "mu", "beta1", "epsilon"}  # keys of its groups
DEEPSPEEDS_MUON = {"use_muon"}
ADJUST_LR_FNS = {"spectral_norm": "spectral_norm", "rms_norm": "match_rms_adamw"}  # by dion's names
KEPT = {"params", "param_names", "lr", "weight_decay", "initial_lr"}

Group = dict[str, Any]
States = dict[Any, dict[str, Any]]


def from_dion(group: Group, states: States, own: Group) -> tuple[Group, States]:
    """Translate one group, and the states of its parameters.

    Raises:
        ValueError: it does what no optimizer here does.
    """
    algorithm = group["algorithm"]
    asked = {"cautious_wd": bool(group.get("cautious_wd")), "num_heads": bool(group.get("num_heads"))}
    refused = [name for name, is_asked in asked.items() if is_asked]
    if algorithm not in ("muon", "adamw"):
        refused.append("algorithm")
    if algorithm == "muon" and group["adjust_lr"] not in ADJUST_LR_FNS:
        refused.append("adjust_lr")
    if refused:
        raise ValueError(
            f"the state dict is of dion, with {refused[0]}={group[refused[0]]!r} in a param group, which is not continued here; continued "
            f"are algorithms muon and adamw with adjust_lr spectral_norm or rms_norm, without cautious_wd and num_heads"
        )
    translated = _kept(group, own) | {"algorithm": algorithm, "eps": float(group["epsilon"])}
    if algorithm == "adamw":
        translated["betas"] = (float(group["beta1"]), float(group["beta2"]))
        names = {"exp_avg": "momentum", "exp_avg_sq": "variance"}
        found = {key: {ours: state[theirs] for ours, theirs in names.items()} for key, state in states.items() if state}
    else:
        momentum = float(group["mu"])
        translated |= {"momentum": momentum, "nesterov": bool(group["nesterov"]), "adjust_lr_fn": ADJUST_LR_FNS[group["adjust_lr"]]}
        translated |= {"stacked": not group["flatten"], "split": tuple(group.get("split_sizes") or ())}
        found = {key: {"momentum_buffer": state["momentum"].float() * (1.0 - momentum)} for key, state in states.items() if state}
    steps = {key: states[key].get("step_dev", group["step"]) for key in found}
    return translated, {key: {STEP: steps[key], **values} for key, values in found.items()}


def from_deepspeeds_muon(group: Group, states: States, own: Group) -> tuple[Group, States]:
    """Translate one group, and the states of its parameters."""
    translated = _kept(group, own)
    if group["use_muon"]:
        translated |= {"algorithm": "muon", "momentum": float(group["momentum"]), "nesterov": True, "adjust_lr_fn": "original"}
    else:
        translated |= {"algorithm": "adamw", "betas": tuple(group["betas"]), "eps": float(group["eps"]), "amsgrad": False}
    step = group.get(STEP, 1)  # Muon counts none: it only matters that the momentum has begun
    return translated, {key: {STEP: step, **state} for key, state in states.items() if state}


def _kept(group: Mapping[str, Any], own: Mapping[str, Any]) -> Group:
    """What means the same to both, and the form of the decay."""
    form = COUPLED if group["weight_decay"] else own["decay_form"]
    return {key: value for key, value in group.items() if key in KEPT} | {"decay_form": form}
