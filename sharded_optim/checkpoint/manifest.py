"""The manifest of a checkpoint as Python objects: its tensors, and the file, offset and SHA-256 of each of their chunks.

The file `COMMITTED` holds the SHA-256 of the manifest. The manifest covers everything else: it has the size of each shard file, and the
SHA-256 of each header and each chunk. Saving builds manifests, and everything that reads checkpoints uses them; `manifest_json.py` converts
them to JSON and back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from sharded_optim.formulas.hyperparameters import by_name
from sharded_optim.optimizers import OPTIMIZERS
from sharded_optim.sharding.segment import Segment
from sharded_optim.step.engine import Engine

__all__ = [
    "CHUNK_BYTES",
    "FORMAT",
    "MAX_HEADER_BYTES",
    "MAX_MANIFEST_BYTES",
    "MODEL",
    "VERSION",
    "Chunk",
    "Manifest",
    "Parameters",
    "ShardFile",
    "TensorEntry",
    "check_name",
    "key_of",
    "sha256",
]

FORMAT = "sharded_optim.checkpoint"
VERSION = (1, 0)  # a higher first number means that older versions of this library cannot read it
MODEL = "model"  # the kind of parameters and buffers
# Larger manifests and headers are neither written nor read, as a reader allocates memory of their size.
MAX_MANIFEST_BYTES = 2**30
MAX_HEADER_BYTES = 100_000_000  # of a shard file, the limit of other readers of safetensors
CHUNK_BYTES = 4 * 2**20  # the largest chunk
MAX_STEPS = 2**53  # the largest step counter: up to here floats count exactly


def sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def key_of(kind: str, name: str) -> str:
    """Return the key of a tensor in a checkpoint: its kind (see `LocalTensor`), and the name of the parameter or buffer."""
    return f"{kind}/{name}"


def check_name(value: Any) -> str:
    """Return the value if it is a name; raise ValueError if it is not a string, or not encodable as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a name")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the name {value!r} has half of a character (a lone surrogate)") from error
    return value


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """A safetensors file of a checkpoint."""

    size: int  # bytes
    header_size: int  # bytes before the data
    header_sha256: str


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Elements of a tensor that are contiguous in a file, and are read and hashed together."""

    key: str  # of the tensor
    dtype: torch.dtype
    segment: Segment
    file: str
    offset: int  # bytes, from the beginning of the file
    size: int  # bytes
    sha256: str

    def __hash__(self) -> int:
        return hash((self.file, self.offset))  # two fields identify a chunk; hashing all would be slow for many chunks


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """A whole tensor of a checkpoint."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    @property
    def key(self) -> str:
        return key_of(self.kind, self.name)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return Segment.whole(self.name, self.shape).numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Hyperparameters, param groups and step counters of an optimizer: everything about it in a checkpoint except tensors.

    Attributes:
        optimizer: the name of its class.
        groups: hyperparameters of each param group.
        group_of: index of each parameter's group, by the parameter's name.
        steps: the step counter of each parameter that has state, by the parameter's name.

    Raises:
        ValueError: a step counter is not a whole number or its parameter is in no group, or a hyperparameter has an impossible value.
    """

    optimizer: str
    groups: tuple[Mapping[str, Any], ...]
    group_of: Mapping[str, int]
    steps: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, step in self.steps.items():
            if not (type(step) in (int, float) and 0 <= step <= MAX_STEPS and step == int(step)):
                raise ValueError(f"the step counter of {name!r} is {step!r}; it must be a whole number from 0 to {MAX_STEPS}")
            if name not in self.group_of:
                raise ValueError(f"{name!r} has a step counter, but is in no param group")
        declared = by_name(OPTIMIZERS.get(self.optimizer, Engine).hyperparameters)
        for index, group in enumerate(self.groups):
            for name in declared.keys() & group.keys():
                declared[name].check(group[name], f"param_groups[{index}]", scheduled=True)

    def names_by_group(self) -> list[list[str]]:
        """List the names of the parameters of each param group."""
        names: list[list[str]] = [[] for _ in self.groups]
        for name, index in self.group_of.items():
            names[index].append(name)
        return names


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a checkpoint, without the bytes of its tensors."""

    step: int
    world_size: int
    files: Mapping[str, ShardFile]
    tensors: Mapping[str, TensorEntry]  # by key
    parameters: Parameters | None
    extra: Any
    wrapper: Mapping[str, Any] = field(default_factory=dict)  # state that only the same wrapper can restore, by the wrapper's name
    libraries: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)  # further names of tied tensors -> the name that each is saved under

    @cached_property
    def kinds(self) -> frozenset[str]:
        return frozenset(entry.kind for entry in self.tensors.values())

    @property
    def size(self) -> int:
        """Bytes of all shard files."""
        return sum(file.size for file in self.files.values())

    @cached_property
    def chunks(self) -> Sequence[Chunk]:
        """The chunks of all tensors, by file and offset."""
        chunks = [chunk for entry in self.tensors.values() for chunk in entry.chunks]
        return sorted(chunks, key=lambda chunk: (chunk.file, chunk.offset))

    @cached_property
    def chunks_of(self) -> Mapping[str, list[Chunk]]:
        """The chunks of each file, by offset."""
        chunks_of: dict[str, list[Chunk]] = {name: [] for name in self.files}
        for chunk in self.chunks:
            chunks_of[chunk.file].append(chunk)
        return chunks_of
