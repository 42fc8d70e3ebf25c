"""Optimizer state of other libraries, or ours, as a manifest has it: all hyperparameters of a class of ours, moments, step counters.

`foreign_state.py` translates; it is written for a live optimizer, of which a small one takes the place here.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharded_optim.formulas.weight_decay import COUPLED, DECOUPLED, FORMS, L2
from sharded_optim.optimizers import OPTIMIZERS
from sharded_optim.step import foreign_state
from sharded_optim.step.engine import Engine
from sharded_optim.step.param_groups import reference
from sharded_optim.step.state import STEP
from sharded_optim.storage.formats import extra_arrays

__all__ = ["Choices", "Translated", "translated"]

SWITCHES = {"maximize", "differentiable", "bias_correction", "step"}  # of others' groups; refused where they mean something

Group = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a user has said about a source. See `import_from`."""

    optimizer: str | None = None
    decay_form: str | None = None
    model_key: str | None = None
    optimizer_key: str | None = None
    param_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.optimizer is not None and self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.decay_form is not None and self.decay_form not in FORMS:
            raise ValueError(f"decay_form is one of {', '.join(FORMS)}, got {self.decay_form!r}")


@dataclass(frozen=True, kw_only=True)
class Translated:
    """A state dict in our terms.

    Attributes:
        optimizer: a class of ours.
        groups: hyperparameters of each param group.
        state: of each parameter, by what the source calls it: moments and Kahan compensations.
        steps: step counters.
    """

    optimizer: str
    groups: tuple[Group, ...]
    state: dict[Hashable, dict[str, Tensor]]
    steps: dict[Hashable, float]


def translated(state_dict: Mapping[str, Any], choices: Choices, *, of_composer: bool = False) -> Translated:
    """A state dict of torch.optim's form in our terms.

    Args:
        state_dict: its "state" by what "params" of its "param_groups" have.
        of_composer: whether it is known to be of one of Composer's own optimizers.

    Raises:
        ValueError: it is of an optimizer that is not continued here.
    """
    given = [_recognisable(group, of_composer) for group in state_dict["param_groups"]]
    if not given:
        raise ValueError("the optimizer's state has no param groups")
    state = {key: dict(values) for key, values in state_dict["state"].items()}
    for group in given:
        for key in group["params"]:
            if group.get("step") is not None and state.get(key):
                state[key].setdefault(STEP, group["step"])  # DeepSpeed's FusedAdam counts by group
    own = [{"decay_form": choices.decay_form or (DECOUPLED if of_composer else COUPLED)} for _ in given]
    told = foreign_state.translate({"state": state, "param_groups": given}, own, replaces_composer=of_composer)
    name = choices.optimizer or _nearest(given, told["param_groups"], of_composer)
    is_ours = all("reference_lr" in group for group in given)
    groups, states, steps = [], {}, {}
    for index, group in enumerate(told["param_groups"]):
        engine = _small(name, group, f"param_groups[{index}]")
        groups.append(_complete(engine, group, f"param_groups[{index}] of the optimizer's state"))
        for key in group["params"]:
            if told["state"].get(key):
                values = dict(told["state"][key])
                steps[key] = float(values.pop(STEP, 1.0))
                states[key] = _tensors(engine, values, groups[-1], f"the state of {key!r}", steps[key], is_ours=is_ours)
    return Translated(optimizer=name, groups=tuple(groups), state=states, steps=steps)


def _recognisable(group: Mapping[str, Any], of_composer: bool) -> Group:
    """A param group with numbers for tensors, and with the keys by which `foreign_state` knows it."""
    found = {key: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for key, value in group.items()}
    if "lr" not in found or "params" not in found:
        raise ValueError(f"a param group of the optimizer's state has no lr or no params; it has {', '.join(map(str, found))}")
    for key in ("maximize", "differentiable"):
        if found.get(key):
            raise ValueError(f"the optimizer's state has {key}={found[key]!r}, which is not continued here")
    if found.get("bias_correction") is False:
        raise ValueError("the optimizer's state has bias_correction=False, which is not continued here")
    if of_composer:  # without torch's keys, which it has too
        found = {key: value for key, value in found.items() if key not in ("maximize", "foreach", "differentiable", "capturable", "fused")}
        found.setdefault("initial_lr", found["lr"])
    elif _is_deepspeeds(found):
        found |= {"amsgrad": bool(found.get("amsgrad", False)), "maximize": False}
    return found


def _is_deepspeeds(group: Group) -> bool:
    """Whether it is of one of DeepSpeed's own Adams, which have torch's keys, but fewer."""
    is_known = bool(group.keys() & {"reference_lr", "beta1", "maximize", "foreach"})
    is_adams = group.keys() >= {"betas", "eps", "weight_decay"}
    return not is_known and is_adams and ("bias_correction" in group or "initial_lr" not in group)


def _nearest(given: Sequence[Group], groups: Sequence[Group], of_composer: bool) -> str:
    """The class of ours that continues it."""
    first = given[0]
    if "momentum" in first:
        return "DecoupledSGDW"
    is_optimis = "beta1" in first
    decoupled = of_composer or (
        "reference_lr" not in first and not is_optimis and any(group.get("decay_form") == DECOUPLED for group in groups)
    )
    if decoupled or any(group.get("amsgrad") for group in groups) or {"reference_lr", "amsgrad"} <= first.keys():
        return "DecoupledAdamW"
    if is_optimis and "decouple_wd" not in first:
        return "StableAdamW"
    return "Adam" if any(group.get("decay_form") == L2 for group in groups) else "AdamW"


def _small(name: str, group: Group, where: str) -> Engine:
    """An optimizer with one parameter, which has all hyperparameters and knows what is wrong with them."""
    params = [nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return OPTIMIZERS[name](params, lr=max(float(group["lr"]), 0.0))  # pyright: ignore[reportCallIssue]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} of the optimizer's state does not fit {name}: {error}") from error


def _complete(engine: Engine, group: Group, where: str) -> Group:
    """All hyperparameters that our class has, and what else the group holds, as a scheduler's initial_lr."""
    own = {key: value for key, value in engine.param_groups[0].items() if key not in ("params", "param_names")}
    told = {key: value for key, value in group.items() if key not in SWITCHES and key not in ("params", "param_names")}
    merged = own | reference(float(group["lr"])) | told
    strange = (engine.foreign_hyperparameters().keys() | engine.compared) & merged.keys() - own.keys()
    wrong = sorted(key for key in strange if merged[key])
    if wrong:
        raise ValueError(
            f"{where} has {wrong[0]}={merged[wrong[0]]!r}, which {type(engine).__name__} has not; choose the optimizer that continues it "
            f"with --optimizer (optimizer=)"
        )
    merged = {key: value for key, value in merged.items() if key not in strange}
    if "betas" in merged:
        merged["betas"] = tuple(merged["betas"])
    engine._check_group(merged, where, scheduled=True)
    return merged


def _tensors(engine: Engine, values: Mapping[str, Any], group: Group, where: str, steps: float, *, is_ours: bool) -> dict[str, Tensor]:
    algorithm = engine._choose(group)
    missing = [key for key in algorithm.state if key not in values and key not in algorithm.optional_state]
    if missing and steps > 0:
        raise ValueError(
            f"{where} lacks {missing[0]!r}, which {type(engine).__name__} needs; it has {', '.join(map(str, values)) or 'nothing'}. Choose "
            f"the optimizer that continues it with --optimizer (optimizer=)"
        )
    beside = extra_arrays()
    if is_ours:
        beside |= {key for key in values if str(key).partition(".")[0] in algorithm.state}  # further arrays of moments
    known = {*algorithm.state, *algorithm.ignored_state, *beside}
    dropped = sorted(str(key) for key in values.keys() - known)
    if dropped:
        warnings.warn(
            f"{where} has {', '.join(dropped)}, of which {type(engine).__name__} knows nothing; left out", UserWarning, stacklevel=3
        )
    found = {}
    for key in values.keys() & known:
        value = values[key]
        if not isinstance(value, Tensor):
            raise ValueError(f"{where} has {key!r} that is a {type(value).__name__}, not a tensor")
        # Ours keeps the dtype that it was given; others' has the parameter's, and ours begins with float32.
        found[key] = value if is_ours or key in beside else value.to(torch.float32)
    return {key: found[key] for key in values if key in found}
