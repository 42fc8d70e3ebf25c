"""Folders of torch.distributed.checkpoint (DCP): `.metadata`, a pickle, and data files, whose parts are each a file of `torch.save`.

Read without torch.distributed.checkpoint, whose own reader unpickles anything. All tensors are in memory at once.
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

from sharded_optim.checkpoint.content import Content
from sharded_optim.checkpoint.imports import unpickling
from sharded_optim.checkpoint.imports.assembly import join_chunks
from sharded_optim.checkpoint.imports.optimizer_state import ImportOptions
from sharded_optim.checkpoint.imports.state_dicts import content_of
from sharded_optim.checkpoint.imports.unpickling import StandIn

__all__ = ["read"]

METADATA = "torch.distributed.checkpoint.metadata"
STAND_INS = {
    **{
        (METADATA, name): type(name, (StandIn,), {})
        for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "StorageMeta")
    },
    **{(METADATA, name): StandIn for name in ("ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "_MEM_FORMAT_ENCODING")},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StandIn,
    ("torch.serialization", "_get_layout"): StandIn,
    ("pathlib", "PosixPath"): StandIn,
    ("torch", "Size"): torch.Size,
}
TENSOR_CLASS = STAND_INS[METADATA, "TensorStorageMetadata"]
METADATA_CLASS = STAND_INS[METADATA, "Metadata"]


class _Unpickler(pickle.Unpickler):
    """An unpickler of `.metadata`, whose pickle protocol torch's weights-only unpickler does not support. Imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in STAND_INS:
            return STAND_INS[module, name]
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which might run code, and is not loaded")


def read(path: Path, options: ImportOptions) -> Content:
    """Read a folder of DCP."""
    metadata = _metadata(path / ".metadata")
    paths = metadata.field("planner_data") or {}
    entries = metadata.field("state_dict_metadata")
    locations = metadata.field("storage_data")
    if not (isinstance(entries, Mapping) and isinstance(locations, Mapping) and isinstance(paths, Mapping)):
        raise ValueError(f"{path}/.metadata does not say what is stored where")
    parts: dict[str, list[tuple[StandIn, StandIn]]] = defaultdict(list)
    for index, location in locations.items():
        parts[index.field("fqn")].append((index, location))
    tree: dict[Hashable, Any] = {}
    for name, entry in entries.items():
        stored = [(index.field("offset"), _stored(path, location)) for index, location in parts[name]]
        *outer, last = paths.get(name, (name,))
        table = tree
        for key in outer:
            table = table.setdefault(key, {})
        table[last] = _join(stored, entry, f"{path}: {name!r}")
    return content_of(_with_lists(tree), options, str(path))


def _metadata(path: Path) -> StandIn:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the folder that has it")
    with open(path, "rb") as stream:
        try:
            metadata = _Unpickler(stream).load()
        except Exception as error:  # of any type, if it is damaged or crafted
            raise ValueError(f"{path} is not loaded: {error}") from error
    if not isinstance(metadata, METADATA_CLASS):
        raise ValueError(f"{path} is not the metadata of torch.distributed.checkpoint")
    return metadata


def _stored(folder: Path, location: StandIn) -> Any:
    """Load the value that is stored in a part of a file."""
    name = str(location.field("relative_path"))
    if Path(name).name != name:
        raise ValueError(f"{folder}/.metadata names a file outside of the folder: {name!r}")
    if location.field("transform_descriptors"):
        raise ValueError(f"{folder}/{name} is compressed or otherwise transformed, which is not read here; save without extensions")
    with open(folder / name, "rb") as stream:
        stream.seek(location.field("offset"))
        return unpickling.load_stream(io.BytesIO(stream.read(location.field("length"))), f"{folder}/{name}")


def _join(stored: list[tuple[Any, Any]], entry: Any, where: str) -> Any:
    """Join the parts of a value. `stored` has the offset and the content of each part; only tensors have several."""
    if not isinstance(entry, TENSOR_CLASS):
        if len(stored) != 1:
            raise ValueError(f"{where} is stored {len(stored)} times")
        return stored[0][1]
    shape = tuple(entry.field("size"))
    if not stored and math.prod(shape) == 0:  # DCP stores no part of an empty tensor
        return torch.empty(shape, dtype=entry.field("properties").state[0], device="cpu")
    return join_chunks(stored, shape, where)


def _with_lists(value: Any) -> Any:
    """Turn dicts whose keys are all integers into lists: `read` builds such dicts from lists that DCP has flattened."""
    if not isinstance(value, dict):
        return value
    items = {key: _with_lists(item) for key, item in value.items()}
    return [items[key] for key in sorted(items)] if items and all(type(key) is int for key in items) else items
