"""Check constructor arguments, with errors that name the public class, the closest argument and the remedy. Used by all optimizers."""

from __future__ import annotations

import difflib
import inspect
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from sharded_optim.formulas.hyperparameters import COMMON, Hyperparameter, Unsupported, by_name
from sharded_optim.formulas.weight_decay import DECOUPLED

__all__ = [
    "CONTAINER_ATTRIBUTES",
    "argument_names",
    "check_iterable",
    "hands_on",
    "refuse_options_on_wrapper",
    "refuse_unknown",
    "warn_of_swapped_eps",
]

# Arguments of torch's optimizers that do not exist here, and the remedy for each.
WAYS_OUT = {
    "fused": "every backend is fused; leave it out, or choose the backend with backend=",
    "capturable": "a CUDA graph can capture any step on a GPU; leave it out",
    "parameters_as_bucket_view": "a ShardedOptimizer always keeps parameters in buckets; leave it out",
    "overlap_with_ddp": "ShardedOptimizer reduces gradients during backward, without DistributedDataParallel; leave it out",
    "consolidate_state_dict": "it is a method of ShardedOptimizer, which every rank calls before one saves for all; leave it out here",
}
PASSES = {"fused": True}  # values accepted besides None and False, because they request the only behaviour there is
INTERNAL = ("defaults", "algorithm")  # arguments that public classes pass to their base
# Positional arguments may be in another library's order: an eps of SWAPPED_EPS or more may be a weight decay, and a weight decay up to
# SWAPPED_DECAY, which lr multiplies and which would have no effect in float32, may be an eps.
SWAPPED_EPS = 1e-3
SWAPPED_DECAY = 1e-8


def argument_names(*classes: type) -> list[str]:
    """Return the argument names of a class and of the classes that it forwards keyword arguments to."""
    parameters = [each for cls in classes for each in inspect.signature(cls).parameters.values()]
    names = dict.fromkeys(each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD)
    return [name for name in names if name not in INTERNAL]


def hands_on(cls: type) -> bool:
    """Return whether a class takes `**kwargs`, which it forwards."""
    return any(each.kind is inspect.Parameter.VAR_KEYWORD for each in inspect.signature(cls).parameters.values())


def refuse_unknown(caller: str, given: Mapping[str, Any], names: Sequence[str], hyperparameters: Iterable[Hyperparameter]) -> None:
    """Raise TypeError for an unknown argument, unless it is a known switch of another library that is off, or asks for the default.

    Args:
        caller: name of the called class.
        given: the arguments that the class does not take, with their values.
        names: the arguments that the class takes.
        hyperparameters: the hyperparameters that param groups may have.
    """
    for name, value in given.items():
        declared = by_name(hyperparameters).get(name)
        is_known = name in WAYS_OUT or declared is not None
        if is_known and (value is None or value is False or value is PASSES.get(name, False)):
            continue
        if isinstance(declared, Unsupported):
            way_out = declared.way_out
        elif declared is not None and name not in by_name(COMMON):
            way_out = f"set it in the param groups: [{{'params': ..., {name!r}: {value!r}}}]"
        elif name in WAYS_OUT:
            way_out = WAYS_OUT[name]
        else:
            near = difflib.get_close_matches(name, names, n=1)
            way_out = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(names)}"
        raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}, of value {value!r}; {way_out}")


def check_iterable(params: Any, where: str) -> None:
    """Raise TypeError unless the value is an iterable of parameters.

    Args:
        where: name of the argument or of the group's entry, for the error.
    """
    is_model = isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList)  # a ParameterList is iterable, to torch too
    if is_model or not isinstance(params, Iterable):
        given = "a method that was not called" if inspect.ismethod(params) else type(params).__name__
        raise TypeError(f"{where} must be an iterable of parameters, got {given}; pass model.parameters() or model.named_parameters()")
    if isinstance(params, Mapping):
        way_out = "put a param group into a list" if "params" in params else "pass model.named_parameters()"
        raise TypeError(f"{where} must be an iterable of parameters or of dicts, got {type(params).__name__}; {way_out}")


# Attributes in which wrappers and trainers store an optimizer, several optimizers, or another such container; tried in this order.
CONTAINER_ATTRIBUTES = ("optimizer", "optimizers", "_optimizer", "_optimizers", "basic_optimizer", "optim")


def _holds(container: Any, optimizer: Any, levels: int = 4) -> bool:
    """Return whether a container holds this optimizer, directly or nested up to `levels` deep."""
    if container is optimizer or levels == 0:
        return container is optimizer
    if isinstance(container, list | tuple):
        members = list(container)
    else:
        values = container if isinstance(container, dict) else getattr(container, "__dict__", {})
        members = [value for name, value in values.items() if values is container or name in CONTAINER_ATTRIBUTES]
    return any(_holds(each, optimizer, levels - 1) for each in members)


def refuse_options_on_wrapper(optimizer: Any) -> None:
    """Raise ValueError if layout or process_group was set on the framework wrapper that calls `step`, and not on the optimizer itself."""
    frame = sys._getframe(2)
    while frame is not None:
        # Before Python 3.13, reading f_locals keeps the locals alive until the frame returns: read it only in `step` methods.
        is_method = frame.f_code.co_name == "step" and frame.f_code.co_varnames[:1] == ("self",)
        wrapper = frame.f_locals["self"] if is_method else None
        given = getattr(wrapper, "__dict__", {})
        # Wrappers of an optimizer have `zero_grad`; other objects with a `step` may have a `layout` of their own.
        if hasattr(wrapper, "zero_grad") and wrapper is not optimizer and _holds(wrapper, optimizer):
            for name in ("layout", "process_group"):
                if given.get(name) is not None and given[name] is not getattr(optimizer, name):
                    raise ValueError(
                        f"{name} was set on the {type(wrapper).__name__} around the optimizer, which does not pass it on; write "
                        f"so.unwrap_optimizer(optimizer).{name} = ..."
                    )
        frame = frame.f_back


def warn_of_swapped_eps(optimizer: type, defaults: Mapping[str, Any]) -> None:
    """Warn if eps and weight decay look like positional arguments in another library's order."""
    if not {"eps", "weight_decay"} <= defaults.keys():
        return
    eps, weight_decay = float(defaults["eps"]), float(defaults["weight_decay"])
    is_no_decay = 0.0 < weight_decay <= SWAPPED_DECAY and defaults.get("decay_form") != DECOUPLED
    if not is_no_decay and not (SWAPPED_EPS <= eps > weight_decay):
        return
    names = list(inspect.signature(optimizer).parameters)
    order = "eps before weight_decay, as torch does, and optimi has weight_decay first"
    if "eps" in names and "weight_decay" in names and names.index("weight_decay") < names.index("eps"):
        order = "weight_decay before eps, as optimi does, and torch has eps first"
    other = f"eps={weight_decay!r}" + (f", weight_decay={eps!r}" if eps >= SWAPPED_EPS else " and the weight_decay that you want")
    warnings.warn(
        f"eps={eps!r} and weight_decay={weight_decay!r} look swapped: {optimizer.__name__} takes {order}. As given, {eps!r} is added to "
        f"the root of the second moment, and the weight decay is {weight_decay!r}. If you meant the other order, pass {other}, by keyword",
        UserWarning,
        stacklevel=4,
    )
