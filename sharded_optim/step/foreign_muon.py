"""Translate param groups and state of other libraries' Muon, which steps the rest of a model with AdamW, to this library's.

    dion        Muon of microsoft/dion: M <- mu M + g, ours is (1 - mu) M; its state dict does not contain the Newton-Schulz coefficients
    DeepSpeed   MuonWithAuxAdam, which its engine builds for "Muon" in a config, and Keller Jordan's original

Used by `foreign_state.py`. Tested with dion of August 2026 and DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sharded_optim.formulas.weight_decay import COUPLED
from sharded_optim.step.state import STEP

__all__ = ["from_deepspeeds_muon", "from_dion", "is_deepspeeds_muon", "is_dions"]

DIONS = {"algorithm", "mu", "beta1", "beta2", "epsilon", "weight_decay", "cautious_wd", "step", "nesterov", "flatten", "adjust_lr"}
DIONS_OPTIONS = {"split_sizes", "num_heads"}  # keys that only some of dion's groups have
ADJUST_LR_FNS = {"spectral_norm": "spectral_norm", "rms_norm": "match_rms_adamw"}  # dion's name -> ours
# Keys of the Muon groups and the Adam groups of MuonWithAuxAdam. A group with any further key behaves differently, and is not recognised.
MUON_HALF = {"use_muon", "momentum", "weight_decay"}
ADAM_HALF = {"use_muon", "betas", "eps", "weight_decay"}
WITHOUT_EFFECT = {"params", "param_names", "lr", "initial_lr", "name", "moe", "ns_method", "bias_correction", STEP}

Group = dict[str, Any]
States = dict[Any, dict[str, Any]]


def is_dions(group: Mapping[str, Any]) -> bool:
    return group.keys() >= DIONS


def is_deepspeeds_muon(group: Mapping[str, Any]) -> bool:
    return group.keys() - WITHOUT_EFFECT == (MUON_HALF if group.get("use_muon") else ADAM_HALF)


def from_dion(group: Group, states: States, own: Group) -> tuple[Group, States]:
    """Translate one group, and the states of its parameters.

    Raises:
        ValueError: the group uses an option that no optimizer here has.
    """
    algorithm = group["algorithm"]
    refused = [name for name in ("cautious_wd", "num_heads") if group.get(name)]
    if algorithm not in ("muon", "adamw"):
        refused.append("algorithm")
    if algorithm == "muon" and group["adjust_lr"] not in ADJUST_LR_FNS:
        refused.append("adjust_lr")
    if algorithm == "muon" and not group["flatten"] and _dimensions(states, "momentum") > 3:
        refused.append("flatten")  # with flatten=False, dion takes the last two dimensions as the matrix
    if refused:
        raise ValueError(
            f"the state dict is from dion, with {refused[0]}={group[refused[0]]!r} in a param group, which is not continued here; "
            f"supported are the algorithms muon and adamw with adjust_lr spectral_norm or rms_norm, without cautious_wd and num_heads, and "
            f"with flatten for tensors of more than three dimensions"
        )
    translated = _shared_entries(group, own, DIONS | DIONS_OPTIONS) | _algorithm(algorithm, own) | {"eps": float(group["epsilon"])}
    if algorithm == "adamw":
        translated["betas"] = (float(group["beta1"]), float(group["beta2"]))
        names = {"exp_avg": "momentum", "exp_avg_sq": "variance"}
        translated_states = {key: {ours: state[theirs] for ours, theirs in names.items()} for key, state in states.items() if state}
    else:
        momentum = float(group["mu"])
        translated |= {"momentum": momentum, "nesterov": bool(group["nesterov"]), "adjust_lr_fn": ADJUST_LR_FNS[group["adjust_lr"]]}
        translated |= {"stacked": not group["flatten"], "split": tuple(group.get("split_sizes") or ())}
        translated_states = {
            key: {"momentum_buffer": state["momentum"].float() * (1.0 - momentum)} for key, state in states.items() if state
        }
    steps = {key: states[key].get("step_dev", group[STEP]) for key in translated_states}
    return translated, {key: {STEP: steps[key], **values} for key, values in translated_states.items()}


def from_deepspeeds_muon(group: Group, states: States, own: Group) -> tuple[Group, States]:
    """Translate one group, and the states of its parameters.

    Raises:
        ValueError: the group has convolutions, which DeepSpeed scales differently.
    """
    translated = _shared_entries(group, own, MUON_HALF | ADAM_HALF | WITHOUT_EFFECT)
    if group["use_muon"]:
        if _dimensions(states, "momentum_buffer") > 3:
            raise ValueError(
                "the state dict is from DeepSpeed's Muon, with tensors of more than three dimensions in a param group, which it scales by "
                "the last two of them; here a convolution is one matrix, so it is not continued: leave out the state of these parameters"
            )
        translated |= _algorithm("muon", own) | {"momentum": float(group["momentum"]), "nesterov": True, "adjust_lr_fn": "original"}
    else:
        translated |= _algorithm("adamw", own) | {"betas": tuple(group["betas"]), "eps": float(group["eps"]), "amsgrad": False}
    step = group.get(STEP, 1)  # Muon has no step counter; any positive value marks the momentum as begun
    return translated, {key: {STEP: step, **state} for key, state in states.items() if state}


def _shared_entries(group: Mapping[str, Any], own: Mapping[str, Any], theirs: Collection[str]) -> Group:
    """Return the entries of a group that mean the same in both libraries, and the form of its decay.

    Args:
        theirs: keys that only the other library has, or that mean something else there.
    """
    kept = {"params", "param_names", "lr", "weight_decay", "initial_lr"}
    form = COUPLED if group["weight_decay"] else own["decay_form"]
    return {key: value for key, value in group.items() if key in kept or key not in theirs} | {"decay_form": form}


def _algorithm(name: str, own: Mapping[str, Any]) -> Group:
    """Return the group's entry for the algorithm; empty if our optimizer has only one."""
    return {"algorithm": name} if "algorithm" in own else {}


def _dimensions(states: States, name: str) -> int:
    """Return the largest number of dimensions of any state tensor with this name; 0 if there is none."""
    return max((state[name].ndim for state in states.values() if name in state), default=0)
