"""DeepSpeed's Universal checkpoints: a folder for each parameter, `zero/<name>/{fp32,exp_avg,exp_avg_sq,step}.pt`, and model states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sharded_optim.checkpoint.held import LOW_PRECISION, MASTER, MODEL, Held
from sharded_optim.checkpoint.imports import safely
from sharded_optim.checkpoint.imports.assembly import whole
from sharded_optim.checkpoint.imports.deepspeed_files import ModelStates, names_of_groups, tagged
from sharded_optim.checkpoint.imports.optimizer_state import Choices, translated
from sharded_optim.checkpoint.manifest import Parameters
from sharded_optim.checkpoint.saving import Content
from sharded_optim.sharding.segment import Segment
from sharded_optim.step.state import STEP

__all__ = ["content", "looks_like"]

LATEST = "latest_universal"
VALUES = "fp32"


def looks_like(path: Path) -> bool:
    return (path / LATEST).is_file() or (path / "zero").is_dir()


def content(path: Path, choices: Choices) -> Content:
    """What a folder holds. Tensors stay in its files until they are written, but for stage 3's rounded parameters."""
    folder = tagged(path, LATEST)
    states = ModelStates.of(folder)
    optimizer = safely.load(folder / "zero" / "optimizer_state.pt")
    groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    if not groups:
        raise ValueError(f"{folder}/zero/optimizer_state.pt has no param_groups")
    names = names_of_groups(groups, states.shapes, lambda: str(folder))
    shapes = {name: shape for group in states.shapes for name, shape in group.items()}
    held = list(states.untrained())
    state: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(states.shapes):
        flat = (optimizer.get("optimizer_state_dict") or {}).get("state", {}).get(number, {})
        for name in group:
            state[name] = {STEP: flat[STEP]} if STEP in flat else {}  # stage 3 has it here alone
    for name, shape in shapes.items():
        files = {file.stem: file for file in (folder / "zero" / name).glob("*.pt")}
        if VALUES not in files:
            raise FileNotFoundError(f"{folder}/zero/{name}/{VALUES}.pt is missing")
        held += _values(name, _tensor(files.pop(VALUES), name, shape), states)
        for kind, file in files.items():
            state[name][kind] = _step(file) if kind == STEP else _tensor(file, name, shape)
    named = [{**group, "params": own} for group, own in zip(groups, names, strict=True)]
    told = translated(
        {"state": {name: values for name, values in state.items() if len(values) > (STEP in values)}, "param_groups": named}, choices
    )
    held += [whole(kind, str(name), tensor) for name, values in told.state.items() for kind, tensor in values.items()]
    parameters = Parameters(
        optimizer=told.optimizer,
        groups=told.groups,
        group_of={name: index for index, own in enumerate(names) for name in own},
        steps={str(name): step for name, step in told.steps.items()},
    )
    return Content(held=held, parameters=parameters, extra=states.extra())


def _values(name: str, master: Tensor, states: ModelStates) -> list[Held]:
    if name not in states.module:
        raise ValueError(f"{states.folder}/zero/{name} is of no tensor in {states.files[0]}")
    own = states.module[name]
    if own.dtype not in LOW_PRECISION:
        return [whole(MODEL, name, master)]
    return [whole(MODEL, name, own if own.shape == master.shape else master.to(own.dtype)), whole(MASTER, name, master)]


def _tensor(file: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    found = safely.load(file)
    if isinstance(found, Mapping):
        found = found.get("param")
    numel = Segment.whole(name, shape).numel
    if not isinstance(found, Tensor) or found.numel() < numel or (found.numel() > numel and found.ndim > 1):
        raise ValueError(f"{file} has no tensor of the shape {shape}")
    return found.flatten()[:numel].view(shape)  # stage 3's are flat, with padding


def _step(file: Path) -> Any:
    found = safely.load(file)
    return found.get("param", found) if isinstance(found, Mapping) else found
