"""The manifest of a checkpoint: what it holds, and where each byte of it lies. JSON, versioned, and checked when it is read.

`manifest.json` is covered by `COMMITTED`, which holds its SHA-256; everything else is covered by the manifest: of each shard file the size
and the SHA-256 of its header, and of each chunk of data the SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from sharded_optim.checkpoint.dtypes import dtype_named, name_of
from sharded_optim.checkpoint.errors import DamagedError, MismatchError
from sharded_optim.checkpoint.values import LATER, decode, encode, marks_in
from sharded_optim.formulas.hyperparameters import by_name
from sharded_optim.optimizers import OPTIMIZERS
from sharded_optim.sharding.segment import Segment, find_tiling_error
from sharded_optim.step.engine import Engine

__all__ = [
    "CHUNK_BYTES",
    "LARGEST_HEADER",
    "LARGEST_MANIFEST",
    "MODEL",
    "Chunk",
    "Manifest",
    "Parameters",
    "ShardFile",
    "TensorEntry",
    "check_text",
    "key_of",
    "sha256",
]

FORMAT = "sharded_optim.checkpoint"
MODEL = "model"  # the kind of parameters and buffers
VERSION = (1, 0)  # what raises the first number, older versions of this library cannot read
FEATURES = LATER  # that a manifest may require of its reader, and that this one has: marks of values
# What is larger is not read: memory is allocated by these numbers. Nothing larger is saved.
LARGEST_MANIFEST = 2**30  # bytes
LARGEST_HEADER = 100_000_000  # bytes of a shard file before the data, as other readers of safetensors have it
CHUNK_BYTES = 4 * 2**20  # of data that are hashed and read together
LARGEST_NUMBER = 2**62  # bytes of a tensor without its empty dimensions, up to which no product overflows
LARGEST_COUNT = 2**53  # steps, up to which float counters are exact
SHARD_NAME = re.compile(r"shard-[0-9]{5}-of-[0-9]{5}\.safetensors")
SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def key_of(kind: str, name: str) -> str:
    """What a tensor is called: its kind ("model", or an entry of the optimizer's state) and its parameter or buffer."""
    return f"{kind}/{name}"


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """A safetensors file."""

    size: int  # bytes
    header_size: int  # bytes before the data
    header_sha256: str


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Elements of a tensor that lie together in a file, and are read and hashed together."""

    segment: Segment
    file: str
    offset: int  # bytes, from the beginning of the file
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """A whole tensor."""

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
        """Bytes."""
        return Segment.whole(self.name, self.shape).numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What a checkpoint knows of the parameters of an optimizer beside tensors.

    Attributes:
        optimizer: the class's name.
        groups: hyperparameters of each param group.
        group_of: index of each parameter's group, by its name.
        steps: the step counter of each parameter that has state.

    Raises:
        ValueError: a step counter is no count, a parameter is in no group, or a hyperparameter is none that any optimizer could use.
    """

    optimizer: str
    groups: tuple[Mapping[str, Any], ...]
    group_of: Mapping[str, int]
    steps: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, step in self.steps.items():
            if not (type(step) in (int, float) and 0 <= step <= LARGEST_COUNT and step == int(step)):
                raise ValueError(f"the step counter of {name!r} is {step!r}; it must be a whole number from 0 to {LARGEST_COUNT}")
            if name not in self.group_of:
                raise ValueError(f"{name!r} has a step counter, and is in no param group")
        declared = by_name(OPTIMIZERS.get(self.optimizer, Engine).hyperparameters)
        for index, group in enumerate(self.groups):
            for name, each in declared.items():
                if name in group:
                    each.check(group[name], f"param_groups[{index}]", scheduled=True)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint."""

    step: int
    world_size: int
    files: Mapping[str, ShardFile]
    tensors: Mapping[str, TensorEntry]  # by key
    parameters: Parameters | None
    extra: Any
    wrapper: Mapping[str, Any] = field(default_factory=dict)  # what only the same wrapper takes up again, by the wrapper's name
    libraries: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)  # further names of the model's tensors, each with the one that they have here

    @cached_property
    def kinds(self) -> frozenset[str]:
        return frozenset(entry.kind for entry in self.tensors.values())

    @property
    def size(self) -> int:
        """Bytes of all shard files."""
        return sum(file.size for file in self.files.values())

    def chunks(self) -> list[tuple[TensorEntry, Chunk]]:
        """Of all tensors, in the order of the files."""
        found = [(entry, chunk) for entry in self.tensors.values() for chunk in entry.chunks]
        return sorted(found, key=lambda pair: (pair[1].file, pair[1].offset))

    @cached_property
    def chunks_of(self) -> Mapping[str, list[tuple[TensorEntry, Chunk]]]:
        """Of each file, in its order."""
        found: dict[str, list[tuple[TensorEntry, Chunk]]] = {name: [] for name in self.files}
        for entry, chunk in self.chunks():
            found[chunk.file].append((entry, chunk))
        return found

    # ------------------------------------------------------------------------------------------------------------------------ JSON

    def to_json(self) -> bytes:
        names = list(self.files)
        numbers = {name: number for number, name in enumerate(names)}
        values = {
            "parameters": None if self.parameters is None else _parameters_to_json(self.parameters),
            "wrapper": encode(dict(self.wrapper), "wrapper"),
            "extra": encode(self.extra, "extra"),
        }
        content = {
            "format": FORMAT,
            "version": list(VERSION),
            "requires": sorted(marks_in(values) & FEATURES),
            "step": self.step,
            "world_size": self.world_size,
            "libraries": dict(self.libraries),
            **({"aliases": dict(self.aliases)} if self.aliases else {}),
            "files": [
                {"name": name, "size": file.size, "header_size": file.header_size, "header_sha256": file.header_sha256}
                for name, file in self.files.items()
            ],
            # A chunk: file, offset, size, the segment's start, run, stride and count, SHA-256.
            "tensors": [
                {
                    "kind": entry.kind,
                    "name": entry.name,
                    "shape": list(entry.shape),
                    "dtype": name_of(entry.dtype, entry.key),
                    "chunks": [
                        [numbers[chunk.file], chunk.offset, chunk.size, *_extent(chunk.segment), chunk.sha256] for chunk in entry.chunks
                    ],
                }
                for entry in self.tensors.values()
            ],
            **values,
        }
        # One line for each tensor: to be read by people and by line-based tools, without a line for each number.
        rows = {key: value for key, value in content.items() if key not in ("tensors", "files")}
        lines = [f"{json.dumps(key)}: {_dumps(value)}" for key, value in rows.items()]
        for key in ("files", "tensors"):
            lines.append(f"{json.dumps(key)}: [\n" + ",\n".join(map(_dumps, content[key])) + "\n]")
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Manifest:
        """Read and check one.

        Args:
            where: it was read from, for error messages.

        Raises:
            MismatchError: this version of the library, or this environment, cannot read it, though it may be whole.
            DamagedError: it contradicts itself, or has numbers that cannot be.
        """
        try:
            try:
                return cls._from_text(text)
            except RecursionError:  # perhaps because this is called from deep inside of a program: a thread has a stack of its own
                return _in_a_thread(lambda: cls._from_text(text))
        except MismatchError as error:
            raise MismatchError(f"{where}: {error}") from error
        except RecursionError as error:
            raise DamagedError(f"{where}: it is nested too deeply") from error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RuntimeError) as error:  # torch's are the last
            raise DamagedError(f"{where}: {error if isinstance(error, ValueError) else repr(error)}") from error

    @classmethod
    def _from_text(cls, text: bytes) -> Manifest:
        content = json.loads(text.decode(), object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"it is not a {FORMAT}")
        _check_version(content)
        files = {}
        for row in content["files"]:
            if not SHARD_NAME.fullmatch(row["name"]):
                raise ValueError(f"{row['name']!r} is not the name of a shard file")
            _check_sha256(row["header_sha256"])
            if row["name"] in files:
                raise ValueError(f"{row['name']} stands twice among the files")
            if _whole(row["header_size"]) > LARGEST_HEADER:
                raise ValueError(f"{row['name']} has a header of {row['header_size']} bytes; none is larger than {LARGEST_HEADER}")
            files[row["name"]] = ShardFile(
                size=_whole(row["size"]), header_size=_whole(row["header_size"]), header_sha256=row["header_sha256"]
            )
        names = list(files)
        tensors = {}
        for row in content["tensors"]:
            entry = _entry(row, names)
            tensors[entry.key] = entry
        if len(tensors) != len(content["tensors"]):
            raise ValueError("two tensors have one name")
        if _whole(content["world_size"]) < 1:
            raise ValueError("it was saved by 0 ranks")
        found = cls(
            step=_whole(content["step"]),
            world_size=_whole(content["world_size"]),
            files=files,
            tensors=tensors,
            parameters=None if content["parameters"] is None else _parameters_from_json(content["parameters"]),
            extra=decode(content["extra"]),
            wrapper=_table(decode(content["wrapper"]), "wrapper"),
            aliases=_aliases_from_json(content.get("aliases", {}), tensors.values()),
            libraries={check_text(name): check_text(version) for name, version in content["libraries"].items()},
        )
        _check_names(found)
        _check_extents(found)
        for entry in tensors.values():  # after the extents, which bound how much memory this takes
            _check_tiling(entry)
        return found


def _in_a_thread(action: Callable[[], Manifest]) -> Manifest:
    found: list[Manifest | Exception] = []

    def run() -> None:
        try:
            found.append(action())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="sharded_optim parse", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise MismatchError("it cannot be read from so deep inside of a program, and there can be no more threads") from error
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


def _finite(number: str) -> float:
    found = float(number)
    if not math.isfinite(found):
        raise ValueError(f"it has the number {number}, which is not finite")
    return found


def _dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _extent(segment: Segment) -> tuple[int, int, int, int]:
    return segment.start, segment.run, segment.stride, segment.count


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a whole number >= 0")
    return value


def check_text(value: Any) -> str:
    """A name; raises ValueError for what is none, or has characters that no file can hold."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a name")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the name {value!r} has half of a character (a lone surrogate)") from error
    return value


def _table(value: Any, what: str) -> dict[str, Any]:
    if type(value) is not dict or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} is {value!r}, not an object")
    return value


def _check_sha256(value: Any) -> None:
    if not (isinstance(value, str) and SHA256.fullmatch(value)):
        raise ValueError(f"{value!r} is not a SHA-256")


def _check_version(content: dict[str, Any]) -> None:
    major, minor = map(_whole, content["version"])
    if major < 1:
        raise ValueError(f"it is of version {major}.{minor} of the format, which there never was")
    if major != VERSION[0]:
        raise MismatchError(f"it is of version {major}.{minor} of the format, and this library reads {VERSION[0]}.x; upgrade sharded-optim")
    if not isinstance(content["requires"], list):
        raise ValueError(f"what it requires is {content['requires']!r}, not a list")
    unknown = sorted(set(map(check_text, content["requires"])) - FEATURES)
    if unknown:
        raise MismatchError(f"it requires {', '.join(unknown)}, of which this library knows nothing; upgrade sharded-optim")


def _entry(row: dict[str, Any], files: list[str]) -> TensorEntry:
    shape = tuple(map(_whole, row["shape"]))
    dtype = dtype_named(row["dtype"])
    kind, name = check_text(row["kind"]), check_text(row["name"])
    if math.prod(filter(None, shape)) * dtype.itemsize > LARGEST_NUMBER:
        raise ValueError(f"{key_of(kind, name)!r} has shape {shape}")
    chunks = []
    for file, offset, size, start, run, stride, count, digest in row["chunks"]:
        segment = Segment(name=name, shape=shape, start=_whole(start), run=_whole(run), stride=_whole(stride), count=_whole(count))
        _check_sha256(digest)
        if segment.numel * dtype.itemsize != size or size == 0:
            raise ValueError(f"a chunk of {key_of(kind, name)!r} has {segment.numel} elements of {dtype} in {size} bytes")
        if size > CHUNK_BYTES:
            raise ValueError(f"a chunk of {key_of(kind, name)!r} has {size} bytes; none is larger than {CHUNK_BYTES}")
        chunks.append(Chunk(segment=segment, file=files[_whole(file)], offset=_whole(offset), size=_whole(size), sha256=digest))
    return TensorEntry(kind=kind, name=name, shape=shape, dtype=dtype, chunks=tuple(chunks))


def _check_tiling(entry: TensorEntry) -> None:
    problem = find_tiling_error([chunk.segment for chunk in entry.chunks] or [Segment.flat(entry.name, entry.shape, 0, 0)])
    if problem:
        raise ValueError(f"the chunks of {entry.key!r} (shape {entry.shape}) do not tile it: {problem}")


def _check_names(manifest: Manifest) -> None:
    """What an optimizer holds, it holds of its parameters."""
    if manifest.parameters is None:
        return
    for entry in manifest.tensors.values():
        if entry.kind != MODEL and entry.name not in manifest.parameters.group_of:
            raise ValueError(f"{entry.key!r} is of an optimizer, and {entry.name!r} is in no param group")


def _check_extents(manifest: Manifest) -> None:
    """Chunks fill the files, without gaps: what lies in none would be covered by no hash."""
    ends = {name: file.header_size for name, file in manifest.files.items()}
    for entry, chunk in manifest.chunks():
        if chunk.offset != ends[chunk.file]:
            raise ValueError(f"{chunk.file} has no chunk at {ends[chunk.file]}, the next is of {entry.key!r} at {chunk.offset}")
        ends[chunk.file] += chunk.size
    for name, file in manifest.files.items():
        if ends[name] != file.size:
            raise ValueError(f"{name} has {file.size} bytes, its chunks end at {ends[name]}")


def _aliases_from_json(content: Any, tensors: Iterable[TensorEntry]) -> dict[str, str]:
    names = {entry.name for entry in tensors}
    for alias, name in _table(content, "aliases").items():
        if check_text(alias) in names or name not in names:
            raise ValueError(f"{alias!r} is said to be another name of {name!r}")
    return content


def _parameters_to_json(parameters: Parameters) -> dict[str, Any]:
    members: list[list[str]] = [[] for _ in parameters.groups]
    for name, index in parameters.group_of.items():
        members[index].append(name)
    return {
        "optimizer": parameters.optimizer,
        "groups": [
            {"hyperparameters": encode(dict(group), f"param_groups[{index}]"), "params": names}
            for index, (group, names) in enumerate(zip(parameters.groups, members, strict=True))
        ],
        "steps": encode(dict(parameters.steps), "steps"),
    }


def _parameters_from_json(content: dict[str, Any]) -> Parameters:
    group_of: dict[str, int] = {}
    for index, group in enumerate(content["groups"]):
        for name in map(check_text, group["params"]):
            if name in group_of:
                raise ValueError(f"{name!r} is in two param groups, {group_of[name]} and {index}, or twice in one")
            group_of[name] = index
    return Parameters(
        optimizer=check_text(content["optimizer"]),
        groups=tuple(_table(decode(group["hyperparameters"]), "hyperparameters") for group in content["groups"]),
        group_of=group_of,
        steps=_table(decode(content["steps"]), "steps"),
    )
