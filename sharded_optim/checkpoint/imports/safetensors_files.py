"""Safetensors: a model of Hugging Face libraries, a file or a folder, or one that DCP has saved with its Hugging Face storage, in parts."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_optim.checkpoint import optional
from sharded_optim.checkpoint.imports.assembly import assemble, tiled
from sharded_optim.checkpoint.imports.optimizer_state import Choices
from sharded_optim.checkpoint.saving import Content

__all__ = ["content", "looks_like"]

SUFFIX = ".safetensors"
INDEX = "model.safetensors.index.json"
SHARDING = "DCP_SHARDING_INFO"  # in a file's metadata: where in the whole tensors its tensors lie


def looks_like(path: Path) -> bool:
    return path.suffix == SUFFIX if path.is_file() else any(path.glob(f"*{SUFFIX}"))


def content(path: Path, choices: Choices) -> Content:
    """What a file or a folder holds: a model, all of whose tensors are in memory at once.

    With `model_key` only the tensors of which that is the beginning of the name.
    """
    chunks: dict[str, list[tuple[Any, Tensor]]] = defaultdict(list)
    metadata: dict[str, str] = {}
    for name, offsets, tensor in _chunks([path] if path.is_file() else _files(path), metadata):
        chunks[name].append((offsets, tensor))
    if path.is_dir() and (path / INDEX).is_file():
        lost = sorted(set(_index(path)) - chunks.keys())
        if lost:
            raise ValueError(f"{path}/{INDEX} names {lost[0]!r}, which is in none of the files ({len(lost)} such)")
    prefix = "" if choices.model_key is None else f"{choices.model_key}."
    model = {}
    for name, stored in chunks.items():
        if name.startswith(prefix):
            ends = [[offset + size for offset, size in zip(offsets, tensor.shape, strict=True)] for offsets, tensor in stored]
            shape = tuple(max(sizes) for sizes in zip(*ends, strict=True))
            model[name.removeprefix(prefix)] = tiled(stored, shape, f"{path}: {name!r}")
    if not model:
        raise ValueError(f"{path} has no tensors" + (f" whose names begin with {prefix!r}" if prefix else ""))
    for name, first in metadata.items():  # of tied tensors, as safetensors.torch.save_model writes it
        if first in model and (name not in model or torch.equal(model[name], model[first])):
            model.pop(name, None)
            model[name] = model[first]  # the last: tensors are called by their first names
    return assemble(model, None, choices, str(path))


def _files(folder: Path) -> list[Path]:
    found = sorted(folder.glob(f"*{SUFFIX}"))
    if (folder / INDEX).is_file():
        missing = sorted(set(_index(folder).values()) - {file.name for file in found})
        if missing:
            raise FileNotFoundError(f"{folder}/{missing[0]} is missing, which {INDEX} names")
    return found


def _index(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def _chunks(files: list[Path], metadata: dict[str, str]) -> Iterator[tuple[str, list[int], Tensor]]:
    """What is in the files; adds what their metadata say."""
    safetensors = optional.safetensors()
    for file in files:
        try:
            with safetensors.safe_open(file, "pt") as opened:
                metadata |= opened.metadata() or {}
                places = json.loads((opened.metadata() or {}).get(SHARDING, "{}"))
                for name in opened.keys():  # noqa: SIM118, it is no dict
                    tensor = opened.get_tensor(name)
                    yield name, places.get(name, {}).get("saved_offsets") or [0] * tensor.ndim, tensor
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is not a safetensors file, or is damaged: {error}") from error
