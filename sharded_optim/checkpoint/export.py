"""Checkpoints for other programs: a folder of safetensors files as Hugging Face libraries read it, or one file of torch's.

Written beside the destination, and renamed when all of it is on the disk. What exists is not overwritten.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sharded_optim.checkpoint import optional
from sharded_optim.checkpoint.errors import CheckpointError
from sharded_optim.checkpoint.held import MASTER, MODEL
from sharded_optim.checkpoint.manifest import Parameters, TensorEntry
from sharded_optim.checkpoint.whole import WholeCheckpoint
from sharded_optim.step.state import STEP

__all__ = ["export_safetensors", "export_torch"]

Where = str | os.PathLike[str]

FILE_BYTES = 5 * 10**9  # of tensors in a file, as Hugging Face libraries cut them


def export_safetensors(root: Where, destination: Where, *, step: int | None = None, masters: bool = False) -> list[str]:
    """Write a checkpoint's model as Hugging Face libraries do: `model.safetensors`, or several files of 5 GB with an index.

    Tensors have the names that they have in the model, a tied one all of its names, so that `model.load_state_dict(load_file(..))` takes
    them. `safetensors.torch.load_model` takes one name of each: with strict=False. A tokenizer or config.json is not part of a checkpoint.
    Holds one file in memory.

    Args:
        root: of the checkpoints.
        destination: a folder that does not exist.
        step: None: the highest that is committed.
        masters: the float32 values of parameters, where there are some, in the place of those that were rounded.

    Returns:
        The names of the files.

    Raises:
        CheckpointError: there is no such checkpoint, or it holds no model.
        DamagedError: it is not what was saved.
        FileExistsError: the destination exists.
    """
    safetensors = optional.safetensors()
    _refuse_existing(Path(destination))
    checkpoint = WholeCheckpoint(root, step)
    model = _model_of(checkpoint, masters)
    files = _cut(model)
    with _beside(Path(destination)) as draft:
        draft.mkdir()
        for file, names in files.items():
            (draft / file).touch()
            mode = stat.S_IMODE((draft / file).stat().st_mode)
            tied = {name: model[name].name for name in names if name != model[name].name}
            safetensors.torch.save_file(
                {name: checkpoint.tensor(model[name]) for name in names}, draft / file, metadata=tied | {"format": "pt"}
            )
            (draft / file).chmod(mode)  # safetensors lets nobody else read what it writes
            _sync(draft / file)
        written = list(files)
        if len(files) > 1:
            places = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": sum(entry.size for entry in model.values())}, "weight_map": places}
            written.append("model.safetensors.index.json")
            (draft / written[-1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            _sync(draft / written[-1])
        _sync(draft)
    return written


def export_torch(root: Where, destination: Where, *, step: int | None = None, masters: bool = False) -> None:
    """Write a checkpoint as one file for `torch.load(..., weights_only=True)`: {"model": .., "optimizer": .., "extra": .., "step": ..}.

    "model" is for `model.load_state_dict`, "optimizer" for `load_state_dict` of an optimizer of this library with the same param groups;
    None, where the checkpoint has none. Parameters are numbered in the order of the groups, and named there as "param_names". Under FSDP1
    with use_orig_params=False, where an optimizer has no order of its own, compare these names with those of the groups it is loaded into.
    Holds all of it in memory.

    Args:
        root, step, masters: as of `export_safetensors`.
        destination: a file that does not exist.

    Raises:
        CheckpointError, DamagedError, FileExistsError: as of `export_safetensors`.
    """
    _refuse_existing(Path(destination))
    checkpoint = WholeCheckpoint(root, step)
    entries = _model_of(checkpoint, masters, empty=True)
    tensors = {entry.key: checkpoint.tensor(entry) for entry in {entry.key: entry for entry in entries.values()}.values()}
    model = {name: tensors[entry.key] for name, entry in entries.items()}
    parameters = checkpoint.manifest.parameters
    content = {
        "model": model or None,
        "optimizer": None if parameters is None else _optimizer_of(checkpoint, parameters),
        "extra": checkpoint.manifest.extra,
        "step": checkpoint.manifest.step,
    }
    with _beside(Path(destination)) as draft:
        torch.save(content, draft)
        _sync(draft)


def _model_of(checkpoint: WholeCheckpoint, masters: bool, *, empty: bool = False) -> Mapping[str, TensorEntry]:
    model = checkpoint.model(masters=masters)
    if not model and not empty:
        raise CheckpointError(f"step {checkpoint.manifest.step} was saved without a model; there is nothing to write for {MODEL!r}")
    return model


def _cut(model: Mapping[str, TensorEntry]) -> dict[str, list[str]]:
    """Which tensors go into which file."""
    files: list[list[str]] = [[]]
    size = 0
    for name, entry in model.items():
        if files[-1] and size + entry.size > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += entry.size
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{number:05d}-of-{len(files):05d}.safetensors": entries for number, entries in enumerate(files, 1)}


def _optimizer_of(checkpoint: WholeCheckpoint, parameters: Parameters) -> dict[str, Any]:
    """A state dict as torch.optim makes it: it numbers parameters group by group."""
    members: list[list[str]] = [[] for _ in parameters.groups]
    for name, group in parameters.group_of.items():
        members[group].append(name)
    numbers = {name: number for number, name in enumerate(name for names in members for name in names)}
    groups = [
        {**values, "param_names": names, "params": [numbers[name] for name in names]}
        for values, names in zip(parameters.groups, members, strict=True)
    ]
    state: dict[int, dict[str, Any]] = {
        numbers[name]: {STEP: torch.tensor(float(step), dtype=torch.float32, device="cpu")} for name, step in parameters.steps.items()
    }
    for entry in checkpoint.manifest.tensors.values():
        if entry.kind not in (MODEL, MASTER):
            state[numbers[entry.name]][entry.kind] = checkpoint.tensor(entry)
    return {"state": dict(sorted(state.items())), "param_groups": groups}


# ------------------------------------------------------------------------------------------------------------------------- files


def _refuse_existing(destination: Path) -> None:
    if os.path.lexists(destination):
        raise FileExistsError(errno.EEXIST, "exists, and an export overwrites nothing; give a new name", str(destination))


@contextmanager
def _beside(destination: Path) -> Iterator[Path]:
    """A name beside the destination, of what becomes the destination when the block is left; if that fails, nothing is left."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    draft = destination.parent / f".{destination.name}.{secrets.token_hex(4)}"
    try:
        yield draft
        _refuse_existing(destination)
        os.rename(draft, destination)
    except BaseException:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
        raise
    _sync(destination.parent)


def _sync(path: Path) -> None:
    """Return when a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
