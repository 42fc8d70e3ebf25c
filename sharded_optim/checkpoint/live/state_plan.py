"""Load into an optimizer in two steps: `plan_state` computes all changes, and `install_state` makes them.

In between, `loading.py` gathers the plan's problems from all ranks, and loads its targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharded_optim.checkpoint.live.optimizer import Group, LiveOptimizer, LiveParam, plain_hyperparameters
from sharded_optim.checkpoint.local_tensor import MASTER, LocalTensor
from sharded_optim.checkpoint.manifest import Manifest, Parameters, key_of
from sharded_optim.checkpoint.values import encode
from sharded_optim.step.engine import Engine
from sharded_optim.step.state import STEP, zeros

__all__ = ["StatePlan", "install_state", "plan_state"]


@dataclass
class StatePlan:
    """The changes that loading makes to an optimizer.

    Attributes:
        targets: tensors to load. Newly allocated ones are not in the optimizer's state yet.
        problems: mismatches: the name of a parameter ("" if it is about none) and a message.
        states: parameters and their new state; None: no state. Parameters that are not listed keep their state.
        groups: the new hyperparameters of each param group.
    """

    targets: list[LocalTensor] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    states: list[tuple[Tensor, dict[str, Any] | None]] = field(default_factory=list)
    groups: list[Mapping[str, Any]] = field(default_factory=list)


def plan_state(live: LiveOptimizer, manifest: Manifest, saved: Parameters, saved_groups: Sequence[set[int]]) -> StatePlan:
    """Plan the load into an optimizer. Changes nothing.

    Args:
        saved: the parameters of the manifest.
        saved_groups: the union of `LiveOptimizer.saved_groups` over all ranks.
    """
    plan = StatePlan()
    for index, (group, indices) in enumerate(zip(live.groups, saved_groups, strict=True)):
        values, problems = _plan_group(live.engine, f"param_groups[{index}]", group, [saved.groups[number] for number in sorted(indices)])
        plan.groups.append(values)
        plan.problems += [("", problem) for problem in problems]
    for param in live.params:
        _plan_param(live, param, plan, manifest, saved)
    missing = sorted(name for name in live.group_of if name not in saved.group_of and not live.is_empty(name))
    plan.problems += [(name, f"parameter {name!r} is in no param group of the checkpoint") for name in missing]
    return plan


def _plan_group(engine: Engine, where: str, group: Group, saved: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], list[str]]:
    """Compute the new hyperparameters of a param group, and the mismatches.

    Args:
        saved: hyperparameters of the saved groups that the group's parameters were in.
    """
    own = plain_hyperparameters(group)
    if not saved:
        return own, []
    problems = list(_group_conflicts(where, saved))
    # A hyperparameter that is False, 0 or None is equivalent to a missing one.
    lacking = {key for key in engine.checks.compared & own.keys() - saved[0].keys() if own[key]}
    unexpected = {key for key in engine.checks.foreign.keys() & saved[0].keys() - own.keys() if saved[0][key]}
    problems += [f"{where} has the hyperparameter {key!r}, the checkpoint has not" for key in sorted(lacking)]
    problems += [f"{where} has no hyperparameter {key!r}, the checkpoint has {saved[0][key]!r}" for key in sorted(unexpected)]
    merged = own | {key: value for key, value in saved[0].items() if key not in unexpected}
    try:
        engine.checks.check(dict(merged), f"{where} of the checkpoint", engine.state_dtype, scheduled=True)
    except ValueError as error:
        return own, [*problems, str(error)]
    return merged, problems


def _group_conflicts(where: str, saved: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Describe the differences between saved groups that are one group of the live optimizer."""
    first, *others = (encode(dict(group), where) for group in saved)  # encoded, as comparing tensors gives no truth value
    for other in others:
        differ = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if differ:
            yield (
                f"{where} has parameters that were in several groups of the checkpoint, with different {', '.join(differ)}; build groups "
                f"like those that were saved"
            )


def _plan_param(live: LiveOptimizer, param: LiveParam, plan: StatePlan, manifest: Manifest, saved: Parameters) -> None:
    if param.is_master:
        plan.targets += param.tensors(MASTER, param.param)
    names = param.names
    if names and not any(name in saved.group_of for name in names):
        return
    steps = {saved.steps.get(name) for name in names}
    if len(steps) > 1:
        counters = ", ".join(f"{name!r}: {saved.steps.get(name, 'no state')}" for name in names[:8])
        problem = (
            f"the wrapper has flattened parameters together that have taken different numbers of steps ({counters}), and counts them "
            f"together; load under another wrapper"
        )
        plan.problems.append(("", problem))
        return
    step = steps.pop() if steps else None
    if step is None:
        plan.states.append((param.param, None))
        return
    group = live.groups[param.group] | dict(plan.groups[param.group])
    state, targets = _new_state(live.engine, param, group, step, manifest)
    plan.targets += targets
    entries = [(manifest.tensors.get(target.key), target.segment) for target in targets if target.segment.tensor_numel]
    if all(entry is not None and entry.shape == segment.shape for entry, segment in entries):  # else it is reported; the old state stays
        plan.states.append((param.param, state))


def _new_state(engine: Engine, param: LiveParam, group: Group, step: float, manifest: Manifest) -> tuple[dict[str, Any], list[LocalTensor]]:
    """Build the state that a parameter has after loading, and list the tensors in it to load.

    Live tensors of the right dtype are reused. Tensors that the checkpoint lacks start as zeros, if `may_begin` allows it.
    """
    live = engine.state.get(param.param, {})
    choice = engine.choice_of(param.param, group)
    stored = {kind for kind in choice.entries if any(key_of(kind, name) in manifest.tensors for name in param.names)}
    new = choice.may_begin(stored) - stored
    state: dict[str, Any] = {STEP: torch.tensor(step, dtype=torch.float32, device=param.param.device)}
    targets: list[LocalTensor] = []
    for kind, dtype in choice.entries.items():
        keeps = kind in live and live[kind].dtype == dtype and kind not in new
        state[kind] = live[kind] if keeps else zeros(param.param, dtype)
        if kind not in new:
            targets += param.tensors(kind, state[kind])
    return state, targets


def install_state(live: LiveOptimizer, plan: StatePlan, *, hyperparameters: bool) -> None:
    """Replace the optimizer's state by that of the plan.

    Args:
        hyperparameters: whether the checkpoint's hyperparameters replace the optimizer's.
    """
    for param, state in plan.states:
        if state is None:
            live.engine.state.pop(param, None)
            continue
        current = live.engine.state[param]
        for key in current.keys() - state.keys():
            del current[key]
        current.update(state)
    if hyperparameters:
        for group, values in zip(live.groups, plan.groups, strict=True):
            for key, value in values.items():
                own = group.get(key)
                if isinstance(own, Tensor) and own.numel() == 1 and isinstance(value, int | float):
                    own.fill_(value)
                else:
                    group[key] = value
    live.after_load()
