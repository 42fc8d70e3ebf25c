"""Manifests as JSON: `serialize` writes a manifest, and `parse` reads and checks it.

The checks are complete: versions, names, numbers, and whether the chunks tile the tensors and fill the files. The rank that commits a
checkpoint writes the manifest, `CheckpointReader` reads it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sharded_optim.checkpoint.dtypes import dtype_named, name_of
from sharded_optim.checkpoint.errors import DamagedError, MismatchError
from sharded_optim.checkpoint.manifest import (
    CHUNK_BYTES,
    FORMAT,
    MAX_HEADER_BYTES,
    MODEL,
    VERSION,
    Chunk,
    Manifest,
    Parameters,
    ShardFile,
    TensorEntry,
    check_name,
    key_of,
)
from sharded_optim.checkpoint.values import LATER_MARKS, decode, encode, marks_in
from sharded_optim.sharding.segment import Segment, find_tiling_error

__all__ = ["parse", "serialize"]

MAX_TENSOR_BYTES = 2**62  # of a tensor, not counting dimensions of size 0, so that no product of sizes overflows
SHARD_NAME = re.compile(r"shard-[0-9]{5}-of-[0-9]{5}\.safetensors")
SHA256 = re.compile(r"[0-9a-f]{64}")


# ------------------------------------------------------------------------------------------------------------------------ writing


def serialize(manifest: Manifest) -> bytes:
    """Write a manifest as JSON, with a line for each tensor and file so that people and line-based tools can read it."""
    file_numbers = {name: number for number, name in enumerate(manifest.files)}
    values = {
        "parameters": None if manifest.parameters is None else _parameters_to_json(manifest.parameters),
        "wrapper": encode(dict(manifest.wrapper), "wrapper"),
        "extra": encode(manifest.extra, "extra"),
    }
    fields = {
        "format": FORMAT,
        "version": list(VERSION),
        "requires": sorted(marks_in(values) & LATER_MARKS),
        "step": manifest.step,
        "world_size": manifest.world_size,
        "libraries": dict(manifest.libraries),
        **({"aliases": dict(manifest.aliases)} if manifest.aliases else {}),
        **values,
    }
    tables = {
        "files": [
            {"name": name, "size": file.size, "header_size": file.header_size, "header_sha256": file.header_sha256}
            for name, file in manifest.files.items()
        ],
        "tensors": [_tensor_to_json(entry, file_numbers) for entry in manifest.tensors.values()],
    }
    lines = [f"{json.dumps(key)}: {_dumps(value)}" for key, value in fields.items()]
    lines += [f"{json.dumps(key)}: [\n" + ",\n".join(map(_dumps, rows)) + "\n]" for key, rows in tables.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _tensor_to_json(entry: TensorEntry, file_numbers: dict[str, int]) -> dict[str, Any]:
    chunks = []
    for chunk in entry.chunks:
        segment = chunk.segment
        extent = (segment.start, segment.run, segment.stride, segment.count)
        chunks.append([file_numbers[chunk.file], chunk.offset, chunk.size, *extent, chunk.sha256])
    dtype = name_of(entry.dtype, entry.key)
    return {"kind": entry.kind, "name": entry.name, "shape": list(entry.shape), "dtype": dtype, "chunks": chunks}


def _parameters_to_json(parameters: Parameters) -> dict[str, Any]:
    return {
        "optimizer": parameters.optimizer,
        "groups": [
            {"hyperparameters": encode(dict(group), f"param_groups[{index}]"), "params": names}
            for index, (group, names) in enumerate(zip(parameters.groups, parameters.names_by_group(), strict=True))
        ],
        "steps": encode(dict(parameters.steps), "steps"),
    }


def _dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


# ------------------------------------------------------------------------------------------------------------------------ reading


def parse(text: bytes, where: str) -> Manifest:
    """Read and check the JSON of a manifest.

    Args:
        where: the file, for error messages.

    Raises:
        MismatchError: this version of the library cannot read the manifest, which may be intact.
        DamagedError: the manifest contradicts itself, or has impossible values.
    """
    try:
        try:
            return _parse(text)
        except RecursionError:  # the caller's own stack may be deep: try again in a thread, which has a new one
            return _parse_in_thread(text)
    except MismatchError as error:
        raise MismatchError(f"{where}: {error}") from error
    except RecursionError as error:
        raise DamagedError(f"{where}: it is nested too deeply") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RuntimeError) as error:  # torch raises RuntimeError
        raise DamagedError(f"{where}: {error if isinstance(error, ValueError) else repr(error)}") from error


def _parse_in_thread(text: bytes) -> Manifest:
    with ThreadPoolExecutor(1, thread_name_prefix="sharded_optim parse") as pool:
        try:
            parsed = pool.submit(_parse, text)
        except RuntimeError as error:
            raise MismatchError("it cannot be read from so deep inside a program, and no thread can be started") from error
        return parsed.result()


def _parse(text: bytes) -> Manifest:
    content = json.loads(text.decode(), object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is not a {FORMAT}")
    _check_version(content)
    files = {row["name"]: _file_from_json(row) for row in content["files"]}
    if len(files) != len(content["files"]):
        raise ValueError("two files have one name")
    tensors = {entry.key: entry for entry in (_tensor_from_json(row, list(files)) for row in content["tensors"])}
    if len(tensors) != len(content["tensors"]):
        raise ValueError("two tensors have one name")
    if _count(content["world_size"]) < 1:
        raise ValueError("it was saved by 0 ranks")
    manifest = Manifest(
        step=_count(content["step"]),
        world_size=content["world_size"],
        files=files,
        tensors=tensors,
        parameters=None if content["parameters"] is None else _parameters_from_json(content["parameters"]),
        extra=decode(content["extra"]),
        wrapper=_table(decode(content["wrapper"]), "wrapper"),
        aliases=_aliases_from_json(content.get("aliases", {}), tensors.values()),
        libraries={check_name(name): check_name(version) for name, version in content["libraries"].items()},
    )
    _check_parameter_names(manifest)
    _check_extents(manifest)
    for entry in tensors.values():  # after `_check_extents`, which bounds the memory that this takes
        _check_tiling(entry)
    return manifest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"an object has the key {repeated!r} twice")
    return table


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {number}, which is not finite")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a whole number >= 0")
    return value


def _table(value: Any, what: str) -> dict[str, Any]:
    if type(value) is not dict or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} is {value!r}, not an object")
    return value


def _digest(value: Any) -> str:
    if not (isinstance(value, str) and SHA256.fullmatch(value)):
        raise ValueError(f"{value!r} is not a SHA-256")
    return value


def _check_version(content: dict[str, Any]) -> None:
    major, minor = map(_count, content["version"])
    if major < 1:
        raise ValueError(f"it has version {major}.{minor} of the format, which never existed")
    if major != VERSION[0]:
        raise MismatchError(f"it has version {major}.{minor} of the format, and this library reads {VERSION[0]}.x; upgrade sharded-optim")
    if not isinstance(content["requires"], list):
        raise ValueError(f"the features it requires are {content['requires']!r}, not a list")
    unknown = sorted(set(map(check_name, content["requires"])) - LATER_MARKS)  # the only features that manifests require so far
    if unknown:
        raise MismatchError(f"it requires {', '.join(unknown)}, which this version of the library does not support; upgrade sharded-optim")


def _file_from_json(row: dict[str, Any]) -> ShardFile:
    if not SHARD_NAME.fullmatch(row["name"]):
        raise ValueError(f"{row['name']!r} is not the name of a shard file")
    if _count(row["header_size"]) > MAX_HEADER_BYTES:
        raise ValueError(f"{row['name']} has a header of {row['header_size']} bytes; the limit is {MAX_HEADER_BYTES}")
    return ShardFile(size=_count(row["size"]), header_size=row["header_size"], header_sha256=_digest(row["header_sha256"]))


def _tensor_from_json(row: dict[str, Any], files: list[str]) -> TensorEntry:
    shape = tuple(map(_count, row["shape"]))
    dtype = dtype_named(row["dtype"])
    kind, name = check_name(row["kind"]), check_name(row["name"])
    key = key_of(kind, name)
    if math.prod(filter(None, shape)) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise ValueError(f"{key!r} has shape {shape}")
    chunks = []
    for file, offset, size, start, run, stride, count, digest in row["chunks"]:
        segment = Segment(name=name, shape=shape, start=_count(start), run=_count(run), stride=_count(stride), count=_count(count))
        if segment.numel * dtype.itemsize != _count(size) or size == 0:
            raise ValueError(f"a chunk of {key!r} has {segment.numel} elements of {dtype} in {size} bytes")
        if size > CHUNK_BYTES:
            raise ValueError(f"a chunk of {key!r} has {size} bytes; the limit is {CHUNK_BYTES}")
        file, offset, digest = files[_count(file)], _count(offset), _digest(digest)
        chunks.append(Chunk(key=key, dtype=dtype, segment=segment, file=file, offset=offset, size=size, sha256=digest))
    return TensorEntry(kind=kind, name=name, shape=shape, dtype=dtype, chunks=tuple(chunks))


def _parameters_from_json(content: dict[str, Any]) -> Parameters:
    group_of: dict[str, int] = {}
    for index, group in enumerate(content["groups"]):
        for name in map(check_name, group["params"]):
            if name in group_of:
                raise ValueError(f"{name!r} is in two param groups, {group_of[name]} and {index}, or twice in one")
            group_of[name] = index
    return Parameters(
        optimizer=check_name(content["optimizer"]),
        groups=tuple(_table(decode(group["hyperparameters"]), "hyperparameters") for group in content["groups"]),
        group_of=group_of,
        steps=_table(decode(content["steps"]), "steps"),
    )


def _aliases_from_json(content: Any, tensors: Iterable[TensorEntry]) -> dict[str, str]:
    names = {entry.name for entry in tensors}
    for alias, name in _table(content, "aliases").items():
        if check_name(alias) in names or name not in names:
            raise ValueError(f"{alias!r} is listed as another name of {name!r}, but it has a tensor or the other has none")
    return content


def _check_tiling(entry: TensorEntry) -> None:
    problem = find_tiling_error([chunk.segment for chunk in entry.chunks] or [Segment.flat(entry.name, entry.shape, 0, 0)])
    if problem:
        raise ValueError(f"the chunks of {entry.key!r} (shape {entry.shape}) do not tile it: {problem}")


def _check_parameter_names(manifest: Manifest) -> None:
    """Raise ValueError unless every tensor of an optimizer belongs to a parameter of a param group."""
    if manifest.parameters is None:
        return
    for entry in manifest.tensors.values():
        if entry.kind != MODEL and entry.name not in manifest.parameters.group_of:
            raise ValueError(f"{entry.key!r} belongs to an optimizer, but {entry.name!r} is in no param group")


def _check_extents(manifest: Manifest) -> None:
    """Raise ValueError unless chunks fill their files without gaps: no hash would cover the bytes in a gap."""
    ends = {name: file.header_size for name, file in manifest.files.items()}
    for chunk in manifest.chunks:
        if chunk.offset != ends[chunk.file]:
            raise ValueError(f"{chunk.file} has no chunk at {ends[chunk.file]}, the next is of {chunk.key!r} at {chunk.offset}")
        ends[chunk.file] += chunk.size
    for name, file in manifest.files.items():
        if ends[name] != file.size:
            raise ValueError(f"{name} has {file.size} bytes, its chunks end at {ends[name]}")
