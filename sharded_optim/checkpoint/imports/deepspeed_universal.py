"""DeepSpeed's Universal checkpoints: a folder for each parameter, `zero/<name>/{fp32,exp_avg,exp_avg_sq,step}.pt`, and model states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sharded_optim.checkpoint.content import Content
from sharded_optim.checkpoint.imports import unpickling
from sharded_optim.checkpoint.imports.assembly import whole
from sharded_optim.checkpoint.imports.deepspeed_files import ModelStates, group_names, tagged_folder
from sharded_optim.checkpoint.imports.optimizer_state import ImportOptions, translate
from sharded_optim.checkpoint.local_tensor import LOW_PRECISION, MASTER, MODEL, LocalTensor
from sharded_optim.sharding.segment import Segment
from sharded_optim.step.state import STEP

__all__ = ["LATEST", "matches", "read"]

LATEST = "latest_universal"
VALUES = "fp32"


def matches(path: Path) -> bool:
    return (path / LATEST).is_file() or (path / "zero").is_dir()


def read(path: Path, options: ImportOptions) -> Content:
    """Read a folder. Tensors stay in the mapped files until they are saved, except rounded parameters of stage 3, which are computed."""
    folder = tagged_folder(path, LATEST)
    states = ModelStates.of(folder)
    optimizer = unpickling.load(folder / "zero" / "optimizer_state.pt")
    groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    if not groups:
        raise ValueError(f"{folder}/zero/optimizer_state.pt has no param_groups")
    names = group_names(groups, states.shapes, str(folder))
    tensors = list(states.untrained())
    state: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(states.shapes):
        flat = (optimizer.get("optimizer_state_dict") or {}).get("state", {}).get(number, {})
        for name, shape in group.items():
            files = {file.stem: file for file in (folder / "zero" / name).glob("*.pt")}
            if VALUES not in files:
                raise FileNotFoundError(f"{folder}/zero/{name}/{VALUES}.pt is missing")
            tensors += _values(name, _tensor(files.pop(VALUES), name, shape), states)
            state[name] = {STEP: flat[STEP]} if STEP in flat else {}  # stage 3 has the step counter only here
            state[name] |= {kind: _content(file) if kind == STEP else _tensor(file, name, shape) for kind, file in files.items()}
    named = [{**group, "params": own} for group, own in zip(groups, names, strict=True)]
    trained = {name: values for name, values in state.items() if len(values) > (STEP in values)}
    translated = translate({"state": trained, "param_groups": named}, options)
    tensors += [whole(kind, str(name), tensor) for name, values in translated.state.items() for kind, tensor in values.items()]
    return Content(tensors=tensors, parameters=translated.parameters(names, translated.steps), extra=states.extra())


def _values(name: str, master: Tensor, states: ModelStates) -> list[LocalTensor]:
    if name not in states.module:
        raise ValueError(f"{states.folder}/zero/{name} belongs to no tensor in {states.files[0]}")
    own = states.module[name]
    if own.dtype not in LOW_PRECISION:
        return [whole(MODEL, name, master)]
    return [whole(MODEL, name, own if own.shape == master.shape else master.to(own.dtype)), whole(MASTER, name, master)]


def _tensor(file: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = _content(file)
    numel = Segment.whole(name, shape).numel
    if not isinstance(tensor, Tensor) or tensor.numel() < numel or (tensor.numel() > numel and tensor.ndim > 1):
        raise ValueError(f"{file} has no tensor of the shape {shape}")
    return tensor.flatten()[:numel].view(shape)  # flat and padded in stage 3


def _content(file: Path) -> Any:
    content = unpickling.load(file)
    return content.get("param", content) if isinstance(content, Mapping) else content
