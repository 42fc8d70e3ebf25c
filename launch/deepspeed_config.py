"""The DeepSpeed config of a job: a JSON file, whose optimizer and batch size become keys of the job's own config.

Each hyperparameter of a loaded config thus has one key, which overrides can change. The rest is passed to DeepSpeed, which need not be
installed to read a config.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.keys import find_section, read
from sharded_optim.deepspeed import PREFIX, is_own

__all__ = ["check", "include"]

KEYS_OF_THE_JOB = {  # DeepSpeed's keys for which the job has its own, and the remedy
    "optimizer": "use optimizer.name, optimizer.lr and so on",
    "scheduler": "the job has a schedule of its own; leave it out, and use warmup_steps and steps",
    "train_batch_size": "use batch_size",
    "train_micro_batch_size_per_gpu": "use train_batch_size in the JSON file or batch_size in the job, which do not depend on the number "
    "of processes",
}


def include(values: dict[str, Any], path: Path) -> None:
    """Merge the DeepSpeed config under the key `deepspeed`, the path of a JSON file or its content, into `values`.

    Its `optimizer` and `train_batch_size` become keys of the job, which the job's file may then leave out.

    Args:
        values: the content of the job's file, before overrides; changed in place.
        path: the path of the job's file.

    Raises:
        ConfigError: there is no such JSON file, or the two files have different values. The message names both.
    """
    given = values.get("deepspeed")
    if isinstance(given, str):
        name, content = given, read(Path(given), json.loads, f"deepspeed={given!r}")
    elif isinstance(given, dict):
        name, content = f"deepspeed of {path}", dict(given)
    else:  # None, or a type that the model of the config refuses
        return
    for key, their_key, value in _take(content, name):
        section, leaf = find_section(values, key, f"{their_key} of {name} cannot be added to {path}")
        if section.setdefault(leaf, value) != value:
            raise ConfigError(
                f"{key}={section[leaf]!r} in {path}, but {their_key}={value!r} in {name}; give it in one of the files, or the same in both"
            )
    values["deepspeed"] = content


def check(content: dict[str, Any]) -> dict[str, Any]:
    """Return a DeepSpeed config, after a check that `include` has left no key in it that belongs to the job.

    Raises:
        ValueError: the config has such a key, or gradient accumulation. The message says what to use.
    """
    for key, remedy in KEYS_OF_THE_JOB.items():
        if key in content:
            raise ValueError(f"{key}={content[key]!r} is not used here: {remedy}")
    accumulation = content.get("gradient_accumulation_steps", 1)
    if accumulation != 1:
        raise ValueError(f"gradient_accumulation_steps={accumulation!r}: the job has one batch in a step; leave it out")
    return content


def _take(content: dict[str, Any], name: str) -> Iterator[tuple[str, str, Any]]:
    """Remove optimizer and batch size from `content`; yield (dotted key of the job, dotted key of DeepSpeed, value) of their entries."""
    if "train_batch_size" in content:
        yield "batch_size", "train_batch_size", content.pop("train_batch_size")
    optimizer = content.pop("optimizer", None)
    if optimizer is None:
        return
    if not (isinstance(optimizer, dict) and isinstance(optimizer.get("type"), str) and isinstance(optimizer.get("params", {}), dict)):
        raise ConfigError(f'optimizer in {name} must be as {{"type": "StableAdamW", "params": {{"lr": 0.001}}}}, got {optimizer!r}')
    kind = optimizer["type"]
    if is_own(PREFIX + kind) and not is_own(kind):
        raise ConfigError(f"optimizer.type={kind!r} in {name} is DeepSpeed's own; use {PREFIX + kind!r} for the one of this library")
    yield "optimizer.name", "optimizer.type", kind.removeprefix(PREFIX)
    for key, value in optimizer.get("params", {}).items():
        yield f"optimizer.{key}", f"optimizer.params.{key}", value
