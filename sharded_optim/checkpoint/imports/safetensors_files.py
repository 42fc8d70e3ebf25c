"""Safetensors files with a model, of Hugging Face libraries or, in chunks, of DCP with its Hugging Face storage."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_optim.checkpoint.content import Content
from sharded_optim.checkpoint.export import import_safetensors
from sharded_optim.checkpoint.imports.assembly import assemble, join_chunks
from sharded_optim.checkpoint.imports.optimizer_state import ImportOptions

__all__ = ["matches", "read"]

SUFFIX = ".safetensors"
INDEX = "model.safetensors.index.json"
SHARDING = "DCP_SHARDING_INFO"  # in a file's metadata: the offsets of its tensors in the whole tensors


def matches(path: Path) -> bool:
    return path.suffix == SUFFIX if path.is_file() else any(path.glob(f"*{SUFFIX}"))


def read(path: Path, options: ImportOptions) -> Content:
    """Read a file or a folder with a model. All tensors are in memory at once.

    With the option `model_key`, only tensors whose names begin with it and a dot; this prefix is removed.
    """
    files = [path] if path.is_file() else sorted(path.glob(f"*{SUFFIX}"))
    index = json.loads((path / INDEX).read_text())["weight_map"] if (path / INDEX).is_file() else {}
    missing = sorted(set(index.values()) - {file.name for file in files})
    if missing:
        raise FileNotFoundError(f"{path}/{missing[0]} is missing, which {INDEX} names")
    chunks: dict[str, list[tuple[Any, Tensor]]] = defaultdict(list)
    metadata: dict[str, str] = {}
    for name, offsets, tensor in _chunks(files, metadata):
        chunks[name].append((offsets, tensor))
    lost = sorted(index.keys() - chunks.keys())
    if lost:
        raise ValueError(f"{path}/{INDEX} names {lost[0]!r}, which is in none of the files ({len(lost)} such)")
    prefix = "" if options.model_key is None else f"{options.model_key}."
    model = {}
    for name, stored in chunks.items():
        if name.startswith(prefix):
            ends = [[offset + size for offset, size in zip(offsets, tensor.shape, strict=True)] for offsets, tensor in stored]
            shape = tuple(max(sizes) for sizes in zip(*ends, strict=True))
            model[name.removeprefix(prefix)] = join_chunks(stored, shape, f"{path}: {name!r}")
    if not model:
        raise ValueError(f"{path} has no tensors" + (f" whose names begin with {prefix!r}" if prefix else ""))
    for name, first in metadata.items():  # tied tensors, as safetensors.torch.save_model writes them
        if first in model and (name not in model or torch.equal(model[name], model[first])):
            model.pop(name, None)
            model[name] = model[first]  # last, as tensors are saved under their first names
    return assemble(model, None, options, str(path))


def _chunks(files: list[Path], metadata: dict[str, str]) -> Iterator[tuple[str, list[int], Tensor]]:
    """Yield the name, offsets in the whole tensor, and content of each tensor in the files. Adds the files' metadata to `metadata`."""
    safetensors = import_safetensors()
    for file in files:
        try:
            with safetensors.safe_open(file, "pt") as opened:
                metadata |= opened.metadata() or {}
                sharding = json.loads((opened.metadata() or {}).get(SHARDING, "{}"))
                for name in opened.keys():  # noqa: SIM118, it is not a dict
                    tensor = opened.get_tensor(name)
                    yield name, sharding.get(name, {}).get("saved_offsets") or [0] * tensor.ndim, tensor
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is not a safetensors file, or is damaged: {error}") from error
