"""Folders of torch.distributed.checkpoint: `.metadata`, a pickle, and parts of files, each of which is a file of `torch.save`.

Read without torch.distributed.checkpoint, whose own reader unpickles what it is given. All tensors are in memory at once.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import defaultdict
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_optim.checkpoint.imports import safely
from sharded_optim.checkpoint.imports.assembly import content_of_tree, tiled
from sharded_optim.checkpoint.imports.optimizer_state import Choices
from sharded_optim.checkpoint.imports.safely import Inert
from sharded_optim.checkpoint.saving import Content

__all__ = ["content"]

METADATA = "torch.distributed.checkpoint.metadata"
STAND_INS = {
    **{(METADATA, name): type(name, (Inert,), {}) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "StorageMeta")},
    **{(METADATA, name): Inert for name in ("ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "_MEM_FORMAT_ENCODING")},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Inert,
    ("torch.serialization", "_get_layout"): Inert,
    ("pathlib", "PosixPath"): Inert,
    ("torch", "Size"): torch.Size,
}
TENSOR = STAND_INS[METADATA, "TensorStorageMetadata"]
ALL = STAND_INS[METADATA, "Metadata"]


class _Unpickler(pickle.Unpickler):
    """Of `.metadata`, whose pickle protocol torch's weights-only unpickler does not know. Imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in STAND_INS:
            return STAND_INS[module, name]
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which might run code, and is not loaded")


def content(path: Path, choices: Choices) -> Content:
    """What a folder holds."""
    metadata = _metadata(path / ".metadata")
    paths = metadata.field("planner_data") or {}
    entries = metadata.field("state_dict_metadata")
    places = metadata.field("storage_data")
    if not (isinstance(entries, Mapping) and isinstance(places, Mapping) and isinstance(paths, Mapping)):
        raise ValueError(f"{path}/.metadata does not say what is stored where")
    parts: dict[str, list[tuple[Inert, Inert]]] = defaultdict(list)
    for index, place in places.items():
        parts[index.field("fqn")].append((index, place))
    tree: dict[Hashable, Any] = {}
    for name, entry in entries.items():
        stored = [(index.field("offset"), _stored(path, place)) for index, place in parts[name]]
        value = _tensor(stored, entry, f"{path}: {name!r}") if isinstance(entry, TENSOR) else _only(stored, f"{path}: {name!r}")
        _put(tree, paths.get(name, (name,)), value)
    return content_of_tree(_with_lists(tree), choices, str(path))


def _metadata(path: Path) -> Inert:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the folder that has it")
    with open(path, "rb") as stream:
        try:
            found = _Unpickler(stream).load()
        except Exception as error:  # whatever a damaged or crafted one makes of it
            raise ValueError(f"{path} is not loaded: {error}") from error
    if not isinstance(found, ALL):
        raise ValueError(f"{path} is not the metadata of torch.distributed.checkpoint")
    return found


def _stored(folder: Path, place: Inert) -> Any:
    """One part of a file."""
    name = str(place.field("relative_path"))
    if Path(name).name != name:
        raise ValueError(f"{folder}/.metadata names a file outside of the folder: {name!r}")
    if place.field("transform_descriptors"):
        raise ValueError(f"{folder}/{name} is compressed or otherwise transformed, which is not read here; save without extensions")
    with open(folder / name, "rb") as stream:
        stream.seek(place.field("offset"))
        return safely.load_stream(io.BytesIO(stream.read(place.field("length"))), f"{folder}/{name}")


def _only(stored: list[tuple[Any, Any]], where: str) -> Any:
    if len(stored) != 1:
        raise ValueError(f"{where} is stored {len(stored)} times")
    return stored[0][1]


def _tensor(stored: list[tuple[Any, Any]], entry: Inert, where: str) -> Tensor:
    shape = tuple(entry.field("size"))
    if not stored and math.prod(shape) == 0:  # nobody has stored nothing
        return torch.empty(shape, dtype=entry.field("properties").state[0], device="cpu")
    return tiled(stored, shape, where)


def _put(tree: dict[Hashable, Any], path: tuple[Hashable, ...], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _with_lists(value: Any) -> Any:
    """Lists, which paths go through with numbers, where dicts have texts."""
    if not isinstance(value, dict):
        return value
    found = {key: _with_lists(each) for key, each in value.items()}
    return [found[key] for key in sorted(found)] if found and all(type(key) is int for key in found) else found
