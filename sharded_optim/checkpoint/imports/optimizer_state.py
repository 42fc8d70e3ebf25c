"""Translate the optimizer state of other libraries, or of this library, to the state that checkpoints hold.

`step/foreign_state.py` translates; a live optimizer with a single element completes and checks hyperparameters. Used by the formats.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharded_optim.checkpoint.manifest import Parameters
from sharded_optim.formulas.weight_decay import COUPLED, DECOUPLED, FORMS, L2
from sharded_optim.optimizers import OPTIMIZERS
from sharded_optim.step import foreign_state
from sharded_optim.step.engine import Engine
from sharded_optim.step.param_groups import reference
from sharded_optim.step.state import STEP
from sharded_optim.storage.formats import extra_arrays

__all__ = ["ImportOptions", "TranslatedState", "translate"]

# Keys of other optimizers' groups that no optimizer of this library has; left out, after `_normalized` has refused unsupported values.
FOREIGN_KEYS = {"maximize", "differentiable", "bias_correction", "step"}

Group = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """The options of `import_from`."""

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
class TranslatedState:
    """An optimizer's state dict, translated to a class of this library.

    Attributes:
        optimizer: the name of that class.
        groups: hyperparameters of each param group.
        state: moments and Kahan compensations of each parameter, by the parameter's key in the source.
        steps: the step counter of each parameter, by the same keys.
    """

    optimizer: str
    groups: tuple[Group, ...]
    state: dict[Hashable, dict[str, Tensor]]
    steps: dict[Hashable, float]

    def parameters(self, names_by_group: Sequence[Sequence[str]], steps: Mapping[Any, float]) -> Parameters:
        """Return the part of a manifest about the optimizer.

        Args:
            names_by_group: the names of the parameters of each param group.
            steps: step counters by these names.
        """
        group_of = {name: index for index, names in enumerate(names_by_group) for name in names}
        return Parameters(optimizer=self.optimizer, groups=self.groups, group_of=group_of, steps=steps)


def translate(state_dict: Mapping[str, Any], options: ImportOptions, *, from_composer: bool = False) -> TranslatedState:
    """Translate a state dict in the form of torch.optim.

    Args:
        state_dict: keys of parameters may be of any hashable type.
        from_composer: whether the state dict is known to be of one of Composer's own optimizers.

    Raises:
        ValueError: the state dict is of an unsupported optimizer.
    """
    given = [_normalized(group, from_composer) for group in state_dict["param_groups"]]
    if not given:
        raise ValueError("the optimizer's state has no param groups")
    state = {key: dict(values) for key, values in state_dict["state"].items()}
    for group in given:
        for key in group["params"]:
            if group.get("step") is not None and state.get(key):
                state[key].setdefault(STEP, group["step"])  # DeepSpeed's FusedAdam counts by group
    own = [{"decay_form": options.decay_form or (DECOUPLED if from_composer else COUPLED), "algorithm": None} for _ in given]
    foreign = foreign_state.translate({"state": state, "param_groups": given}, own, replaces_composer=from_composer)
    name = options.optimizer or _continuing_class(given, foreign["param_groups"], from_composer)
    is_own = all("reference_lr" in group for group in given)
    groups, states, steps = [], {}, {}
    for index, group in enumerate(foreign["param_groups"]):
        engine = _one_element_optimizer(name, group, f"param_groups[{index}]")
        groups.append(_complete(engine, group, f"param_groups[{index}] of the optimizer's state"))
        for key in group["params"]:
            if foreign["state"].get(key):
                values = dict(foreign["state"][key])
                steps[key] = float(values.pop(STEP, 1.0))
                states[key] = _tensors(engine, values, groups[-1], f"the state of {key!r}", steps[key], is_own=is_own)
    return TranslatedState(optimizer=name, groups=tuple(groups), state=states, steps=steps)


def _normalized(group: Mapping[str, Any], from_composer: bool) -> Group:
    """Return a param group with numbers in place of tensors, and with the keys by which `foreign_state` recognizes it."""
    values = {key: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for key, value in group.items()}
    if "lr" not in values or "params" not in values:
        raise ValueError(f"a param group of the optimizer's state has no lr or no params; it has {', '.join(map(str, values))}")
    for key in ("maximize", "differentiable"):
        if values.get(key):
            raise ValueError(f"the optimizer's state has {key}={values[key]!r}, which is not continued here")
    if values.get("bias_correction") is False:
        raise ValueError("the optimizer's state has bias_correction=False, which is not continued here")
    if from_composer:  # without torch's keys, by which it would be recognized as torch's
        values = {
            key: value for key, value in values.items() if key not in ("maximize", "foreach", "differentiable", "capturable", "fused")
        }
        values.setdefault("initial_lr", values["lr"])
    elif _is_from_deepspeed(values):
        values |= {"amsgrad": bool(values.get("amsgrad", False)), "maximize": False}
    return values


def _is_from_deepspeed(group: Group) -> bool:
    """Return whether a param group is of one of DeepSpeed's own Adams, which have some of torch's keys."""
    is_other = bool(group.keys() & {"reference_lr", "beta1", "maximize", "foreach", "use_muon"})
    is_adam = group.keys() >= {"betas", "eps", "weight_decay"}
    return not is_other and is_adam and ("bias_correction" in group or "initial_lr" not in group)


def _continuing_class(given: Sequence[Group], groups: Sequence[Group], from_composer: bool) -> str:
    """Return the class of this library that continues a saved optimizer."""
    first = given[0]
    if any("algorithm" in group for group in groups) or "ns_coefficients" in first:
        return "Muon"
    if "momentum" in first:
        return "DecoupledSGDW"
    is_optimi = "beta1" in first
    decoupled = from_composer or (
        "reference_lr" not in first and not is_optimi and any(group.get("decay_form") == DECOUPLED for group in groups)
    )
    if decoupled or any(group.get("amsgrad") for group in groups) or {"reference_lr", "amsgrad"} <= first.keys():
        return "DecoupledAdamW"
    if is_optimi and "decouple_wd" not in first:
        return "StableAdamW"
    return "Adam" if any(group.get("decay_form") == L2 for group in groups) else "AdamW"


def _one_element_optimizer(name: str, group: Group, where: str) -> Engine:
    """Make an optimizer with one parameter, to complete and check hyperparameters."""
    params = [nn.Parameter(torch.zeros(1, 1, dtype=torch.float32, device="cpu"))]  # a matrix, as Muon requires
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return OPTIMIZERS[name](params, lr=max(float(group["lr"]), 0.0))  # pyright: ignore[reportCallIssue]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} of the optimizer's state does not fit {name}: {error}") from error


def _complete(engine: Engine, group: Group, where: str) -> Group:
    """Return a group with all hyperparameters of the engine's class, and with further entries, such as a scheduler's initial_lr."""
    own = {key: value for key, value in engine.param_groups[0].items() if key not in ("params", "param_names")}
    given = {key: value for key, value in group.items() if key not in FOREIGN_KEYS and key not in ("params", "param_names")}
    merged = own | reference(float(group["lr"])) | given
    unknown = (engine.checks.foreign.keys() | engine.checks.compared) & merged.keys() - own.keys()
    unsupported = sorted(key for key in unknown if merged[key])
    if unsupported:
        raise ValueError(
            f"{where} has {unsupported[0]}={merged[unsupported[0]]!r}, which {type(engine).__name__} does not support; choose the "
            f"optimizer that continues it with --optimizer (optimizer=)"
        )
    merged = {key: value for key, value in merged.items() if key not in unknown}
    if "betas" in merged:
        merged["betas"] = tuple(merged["betas"])
    engine.checks.check(merged, where, engine.state_dtype, scheduled=True)
    return merged


def _tensors(engine: Engine, values: Mapping[str, Any], group: Group, where: str, steps: float, *, is_own: bool) -> dict[str, Tensor]:
    """Return those state tensors of a parameter that the engine's class knows; warn of others, which are left out."""
    algorithm = engine._choose(group)
    missing = [key for key in algorithm.state if key not in values and key not in algorithm.optional_state]
    if missing and steps > 0:
        raise ValueError(
            f"{where} lacks {missing[0]!r}, which {type(engine).__name__} needs; it has {', '.join(map(str, values)) or 'nothing'}. Choose "
            f"the optimizer that continues it with --optimizer (optimizer=)"
        )
    beside = extra_arrays()
    if is_own:
        beside |= {key for key in values if str(key).partition(".")[0] in algorithm.state}  # extra arrays of moments
    known = {*algorithm.state, *algorithm.ignored_state, *beside}
    dropped = sorted(str(key) for key in values.keys() - known)
    if dropped:
        warnings.warn(f"{where} has {', '.join(dropped)}, which {type(engine).__name__} does not have; left out", UserWarning, stacklevel=3)
    tensors = {}
    for key in (key for key in values if key in known):
        value = values[key]
        if not isinstance(value, Tensor):
            raise ValueError(f"{where} has {key!r} as a {type(value).__name__}, not a tensor")
        # State of this library keeps its dtype. Moments of other libraries have the parameter's dtype, and are continued in float32.
        tensors[key] = value if is_own or key in beside else value.to(torch.float32)
    return tensors
