"""Sharded checkpoints that are committed atomically, verified when they are loaded, and independent of the sharding.

A checkpoint holds whole tensors under the names of the model's parameters: it is saved under one wrapper on some ranks, and loads under any
other on any number of ranks. It is committed or does not exist, every byte is verified when it is loaded, and a load changes everything or
nothing. The public API, `so.checkpoint`, is defined here; the work is done by:

    live/            describes models and optimizers under every wrapper as `LocalTensor`s (local_tensor.py)
    saving.py        saves: content.py (a rank's part), write_plan.py (which rank writes which chunks), shard_file.py, commit.py,
                     background.py (async_save)
    loading.py       loads: matching.py (which stored tensor a live one is loaded from), reader.py, chunk_reading.py
    steps.py         lists and verifies checkpoints; integrity.py (records which were verified), removal.py (removes old and damaged ones)
    manifest.py      the content of a checkpoint; manifest_json.py, values.py, dtypes.py (its JSON)
    store.py         storage: local_store.py, url_store.py
    export.py        writes files for other programs; imports/ reads files of other libraries, a module per format
    collectives.py   how ranks communicate; errors.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch.distributed as dist

from sharded_optim.checkpoint import background, loading, saving
from sharded_optim.checkpoint.background import Saving
from sharded_optim.checkpoint.collectives import all_or_nothing, refuse_differences
from sharded_optim.checkpoint.content import Content
from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, MismatchError, NoCheckpointError
from sharded_optim.checkpoint.export import export_safetensors, export_torch
from sharded_optim.checkpoint.imports import import_from
from sharded_optim.checkpoint.removal import prune
from sharded_optim.checkpoint.steps import describe, latest, steps, verify
from sharded_optim.checkpoint.store import AnyPath, Store, open_store
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


def save(
    root: AnyPath,
    step: int,
    *,
    model: Any = None,
    optimizer: Any = None,
    extra: Any = None,
    keep: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Save a checkpoint, `root/step-<step>`. A collective: all ranks call it, and return when it is committed.

    A checkpoint holds the model's parameters and persistent buffers and the optimizer's state, masters, step counters and hyperparameters.

    Args:
        root: a folder, which need not exist, or a URL that fsspec supports, such as s3://bucket/run. The same on all ranks.
        step: the number of training steps so far, >= 0. There must be no intact checkpoint of this step under `root`.
        model: a module, under any wrapper or none, or a DeepSpeedEngine. The checkpoint uses the names of its parameters.
        optimizer: an optimizer of this library. Without `model`, parameters have the names with which it was built, or their positions.
        extra: further values: None, bool, int, float, str, bytes, tensors and NumPy's scalars and arrays up to 1 MiB, and lists, tuples,
            dicts, OrderedDicts, Counters and defaultdicts of these, such as the state_dict() of a scheduler. Types are restored exactly;
            other types and subclasses are refused. Each rank passes the same value, or None.
        keep: the number of checkpoints to keep: older ones are removed after the commit; see `prune`. If no checkpoint that stays was
            read back before, the ranks first read back the newest, each a share; if it is damaged, they warn, and remove nothing.
        process_group: the ranks that save together; None: all ranks.

    Raises:
        CheckpointError: on every rank, with the errors of all ranks. Checkpoints of other steps are unchanged.
    """
    pending = saving.begin(root, step, lambda: _collect(model, optimizer, extra), keep=keep, process_group=_gloo_group(process_group))
    saving.finish(pending, pending.content)


def async_save(
    root: AnyPath,
    step: int,
    *,
    model: Any = None,
    optimizer: Any = None,
    extra: Any = None,
    keep: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Saving:
    """Save like `save`, but return as soon as all tensors are copied, and write in the background. A collective.

    Only one save is in flight: `async_save`, `save` and `load` wait for the previous one. The copy is in a CPU buffer that the next save
    reuses, pinned if tensors are on a GPU. Call `wait()` before the process group is destroyed.

    Args:
        root, step, model, optimizer, extra, keep, process_group: see `save`.

    Returns:
        A handle: `wait()` blocks until the checkpoint is committed, `done()` returns whether the save has ended.

    Raises:
        CheckpointError: on every rank: errors of this save before `async_save` returns, or errors of the previous save not raised yet.
    """
    pending = saving.begin(root, step, lambda: _collect(model, optimizer, extra), keep=keep, process_group=_gloo_group(process_group))
    return background.start(pending)


def load(
    root: AnyPath,
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

    The checkpoint may have been saved under another wrapper and on another number of ranks. Each rank reads the elements that it
    holds. Before anything changes, the ranks together verify all bytes, and compare the checkpoint with the model and the optimizer.

    Args:
        root, model, optimizer, process_group: see `save`. With model=None or optimizer=None that part is not loaded.
        step: the step to load; None: the highest that verifies; damaged checkpoints are skipped with a warning.
        strict: False: mismatches are warnings: tensors missing on either side or of another shape stay unchanged; dtypes may differ.
        lenient: the names that `strict=False` applies to, as one or several shell patterns, such as ("head.*",).
        hyperparameters: whether the optimizer takes those of the checkpoint or keeps its own ("live"). Differences are logged.

    Returns:
        The `extra` that was saved.

    Raises:
        NoCheckpointError: on every rank: there is no checkpoint under `root`.
        CheckpointError: on every rank: there is no checkpoint of that step.
        DamagedError: stored bytes differ from the saved ones; names files and tensors. With `step=None`, only if no checkpoint verifies.
        MismatchError: the checkpoint does not fit the model or the optimizer; names the mismatches.
    """
    patterns = (lenient,) if isinstance(lenient, str) else tuple(lenient)
    options = loading.LoadOptions(strict=strict, lenient=patterns, hyperparameters=hyperparameters)
    arguments = {"step": step, "model": model is not None, "optimizer": optimizer is not None, **asdict(options)}
    group = _gloo_group(process_group)

    def open_root() -> Store:
        background.wait_for_save_in_flight()
        options.check()
        return open_store(root)

    store, all_arguments = all_or_nothing(f"opening {root}", open_root, group, share=lambda _: arguments)
    refuse_differences(all_arguments)

    if step is None:
        return loading.load_newest(store, model, optimizer, options, group)
    return loading.load_step(store, step, model, optimizer, options, group)


def _collect(model: Any, optimizer: Any, extra: Any) -> Content:
    background.wait_for_save_in_flight()
    return Content.of(model, optimizer, extra)


def _gloo_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return a gloo process group for checkpoints alone, as a save in the background communicates during steps; None if alone."""
    return own_process_group(process_group, "gloo")
