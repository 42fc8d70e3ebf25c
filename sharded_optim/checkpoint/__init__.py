"""Sharded checkpoints that cannot be torn, cannot lie, and open anywhere.

A checkpoint holds whole tensors under the names of the model's parameters, however they are sharded: it is saved under one wrapper on some
ranks, and loads under any other on any other number. It is committed or it does not exist, every byte is verified when it is loaded, and a
load changes everything or nothing.

    live/       from a wrapper's model and optimizer to pieces of named tensors (`held.py`), one file per wrapper
    plan.py     who writes which chunks
    saving.py, shard_file.py, staging.py      the commit protocol, and what writes the bytes, now or in the background
    loading.py, read.py                       what fits what, verification, and what reads the bytes
    manifest.py, values.py, dtypes.py         what is written down, in JSON
    store.py, local_store.py, url_store.py    where it is kept
    steps.py    which checkpoints there are
    whole.py, export.py, optional.py     one process reads all of it, and writes it for other programs
    imports/    other libraries' checkpoints, one file for each format
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch.distributed as dist

from sharded_optim.checkpoint import loading, saving, staging
from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, MismatchError, NoCheckpointError
from sharded_optim.checkpoint.exchange import refuse_differences, together
from sharded_optim.checkpoint.export import export_safetensors, export_torch
from sharded_optim.checkpoint.imports import import_from
from sharded_optim.checkpoint.staging import Saving
from sharded_optim.checkpoint.steps import describe, latest, prune, steps, verify
from sharded_optim.checkpoint.store import Store, open_store
from sharded_optim.sharding.ranks import own_process_group

__all__ = [
    "CheckpointError",
    "DamagedError",
    "MismatchError",
    "NoCheckpointError",
    "Saving",
    "async_save",
    "describe",
    "export_safetensors",
    "export_torch",
    "import_from",
    "latest",
    "load",
    "prune",
    "save",
    "steps",
    "verify",
]

Root = str | os.PathLike[str]


def save(
    root: Root,
    step: int,
    *,
    model: Any = None,
    optimizer: Any = None,
    extra: Any = None,
    keep: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Save a checkpoint, `root/step-<step>`. A collective: all ranks call it, and return when it is committed.

    Saved are the model's parameters and persistent buffers, and of the optimizer its state, masters, step counters and hyperparameters.

    Args:
        root: a folder, which need not exist, or a URL that fsspec knows, as s3://bucket/run. All ranks see the same.
        step: how far training is: a number >= 0 that is not committed yet under `root`.
        model: a module, under any wrapper or none, or a DeepSpeedEngine. Its parameters' names are those in the checkpoint.
        optimizer: of this library. Without `model` its parameters have the names that it was given, or their positions.
        extra: anything else: None, bool, int, float, str, bytes, tensors and NumPy's scalars and arrays up to 1 MiB, and lists, tuples,
            dicts, OrderedDicts, Counters and defaultdicts of these, such as the state_dict() of a scheduler. Types come back as they were;
            others are refused, and so are subclasses. The same on all ranks, or None on all but one.
        keep: how many checkpoints remain: older ones are removed after the commit; see `prune`. Where none of those that remain was read
            back, the ranks first read back the newest together, each its share; if that is damaged, a warning says so, and all stay.
        process_group: the ranks that save together; None: all.

    Raises:
        CheckpointError: on every rank: what went wrong on any. What was committed before is untouched.
    """
    draft = _begin(root, step, model, optimizer, extra, keep, process_group)
    saving.finish(draft, draft.content)


def async_save(
    root: Root,
    step: int,
    *,
    model: Any = None,
    optimizer: Any = None,
    extra: Any = None,
    keep: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Saving:
    """As `save`, but return as soon as everything is copied, and write in the background. A collective.

    One save is in flight at a time: this waits for the one before it, as `save` and `load` do. The copy is to a buffer that is kept for the
    next save: on the CPU, pinned where tensors are on a GPU. Before the process group is destroyed, call `wait()`.

    Args:
        root, step, model, optimizer, extra, keep, process_group: as of `save`.

    Returns:
        A handle: `wait()` returns when the checkpoint is committed, `done()` tells whether it has ended.

    Raises:
        CheckpointError: on every rank: of this save, as far as it has come; or of the one before it, if nobody has heard of that.
    """
    return staging.start(_begin(root, step, model, optimizer, extra, keep, process_group))


def load(
    root: Root,
    *,
    model: Any = None,
    optimizer: Any = None,
    step: int | None = None,
    strict: bool = True,
    lenient: str | Sequence[str] = "*",
    hyperparameters: Literal["checkpoint", "live"] = "checkpoint",
    process_group: dist.ProcessGroup | None = None,
) -> Any:
    """Load a checkpoint into a model and an optimizer, in place. A collective.

    It may have been saved under another wrapper and on another number of ranks. Each rank reads what it holds. All bytes are verified, by
    all ranks together, and everything that does not fit is found, before anything changes.

    Args:
        root, model, optimizer, process_group: as of `save`. Only what is given is loaded.
        step: None: the highest that verifies; those that are damaged are passed over with a warning.
        strict: False: what is missing in the checkpoint, or left over, stays as it is, and dtypes may differ; with a warning.
        lenient: the names, as one or several shell patterns, that `strict=False` is for: ("head.*",).
        hyperparameters: whose count: the checkpoint's, or those that the optimizer has. Differences are logged.

    Returns:
        The `extra` that was saved.

    Raises:
        NoCheckpointError: on every rank: there is no checkpoint under `root`.
        CheckpointError: on every rank: there is none of that step.
        DamagedError: what is stored is not what was saved; names files and tensors. With `step=None` only if no checkpoint verifies.
        MismatchError: everything that does not fit, in one message.
    """
    patterns = (lenient,) if isinstance(lenient, str) else tuple(lenient)
    choices = loading.Choices(strict=strict, lenient=patterns, hyperparameters=hyperparameters)
    group = _group(process_group)
    opened: list[Store] = []

    def look() -> dict[str, Any]:
        staging.settle()
        choices.check()
        opened.append(open_store(root))
        return {"step": step, "model": model is not None, "optimizer": optimizer is not None, **asdict(choices)}

    refuse_differences(together(f"opening {root}", look, group))

    def load_one(number: int) -> Any:
        return loading.load_step(opened[0], number, model, optimizer, choices, group)

    return loading.load_newest(opened[0], load_one, group) if step is None else load_one(step)


def _begin(
    root: Root, step: int, model: Any, optimizer: Any, extra: Any, keep: int | None, process_group: dist.ProcessGroup | None
) -> saving.Draft:
    def collect() -> saving.Content:
        staging.settle()
        return saving.Content.of(model, optimizer, extra)

    return saving.begin(root, step, collect, keep=keep, process_group=_group(process_group))


def _group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """On the CPU, and apart from all others, as it is used in the background."""
    return own_process_group(process_group, "gloo")
