"""Write a manifest as JSON. Used by the rank that commits a checkpoint."""

from __future__ import annotations

import json
from typing import Any

from sharded_optim.checkpoint.dtypes import name_of
from sharded_optim.checkpoint.manifest import FORMAT, VERSION, Manifest, Parameters, TensorEntry
from sharded_optim.checkpoint.values import LATER_MARKS, encode, marks_in

__all__ = ["serialize"]


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
