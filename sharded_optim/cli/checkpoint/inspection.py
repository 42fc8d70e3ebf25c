"""List and show checkpoints: the commands `checkpoint ls` and `checkpoint show`. They read manifests only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from sharded_optim import checkpoint
from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, MismatchError, UnreadableError
from sharded_optim.checkpoint.manifest import Chunk, Manifest, Parameters
from sharded_optim.checkpoint.store import folder_of, open_store, steps_in
from sharded_optim.cli import errors
from sharded_optim.cli.checkpoint.arguments import Root, Step
from sharded_optim.cli.tables import counted, print_table, size_of, table

__all__ = ["ls", "show"]

LONGEST_VALUE = 100  # characters


def ls(root: Root) -> None:
    """List checkpoints. Reads no data; see verify."""
    with errors.for_users():
        store = open_store(root)
        existing = steps_in(store.folders())
        if not existing:
            raise CheckpointError(f"there is no checkpoint in {root}; give the folder that holds the step-... folders")
        committed = set(checkpoint.steps(root))
        rows = [_row(root, step) if step in committed else (str(step), *"----", "-", "not committed") for step in existing]
    grid = table(numbers=("step", "size", "tensors", "files", "ranks"), last=("optimizer", "state"))
    print_table(grid, rows)


def _row(root: str, step: int) -> tuple[str, ...]:
    try:
        manifest = checkpoint.describe(root, step)
    except UnreadableError:
        return (str(step), *"----", "-", "cannot be read")
    except DamagedError:
        return (str(step), *"----", "-", "damaged manifest")
    except MismatchError:
        return (str(step), *"----", "-", "of a later version")
    optimizer = "-" if manifest.parameters is None else manifest.parameters.optimizer
    counts = (len(manifest.tensors), len(manifest.files), manifest.world_size)
    return (str(step), size_of(manifest.size), *(f"{count:,}" for count in counts), optimizer, "committed")


def show(
    root: Root,
    step: Step = None,
    extents: Annotated[bool, typer.Option("--extents", help="list each chunk of each tensor too: elements, file and bytes")] = False,
) -> None:
    """Show the tensors, hyperparameters, step counters and extra of a checkpoint."""
    with errors.for_users():
        manifest = checkpoint.describe(root, step)
    libraries = ", ".join(f"{name} {version}" for name, version in manifest.libraries.items())
    size = f"{size_of(manifest.size)} in {counted(len(manifest.files), 'file')}"
    print(f"{root}/{folder_of(manifest.step)}: {size}, saved on {counted(manifest.world_size, 'rank')} by {libraries}\n")
    _print_tensors(manifest)
    if extents:
        _print_extents(manifest)
    if manifest.parameters is not None:
        _print_groups(manifest.parameters)
        _print_steps(manifest.parameters)
    for name, value in manifest.wrapper.items():
        print(f"state of {name}: {_short(value)}")
    _print_extra(manifest.extra)


def _print_tensors(manifest: Manifest) -> None:
    sizes = Counter(dict.fromkeys(sorted(manifest.kinds), 0))
    grid = table("kind", "name", "shape", "dtype", numbers=("size", "chunks"))
    rows = []
    for entry in manifest.tensors.values():
        sizes[entry.kind] += entry.size
        shape, dtype = "x".join(map(str, entry.shape)) or "()", str(entry.dtype).removeprefix("torch.")
        rows.append((entry.kind, entry.name, shape, dtype, size_of(entry.size), len(entry.chunks)))
    print_table(grid, rows)
    print("total: " + ", ".join(f"{kind} {size_of(size)}" for kind, size in sizes.items()) + "\n")


def _print_extents(manifest: Manifest) -> None:
    grid = table("tensor", "elements", numbers=("size",), last=("file", "bytes"))
    chunks = [(entry, chunk) for entry in manifest.tensors.values() for chunk in entry.chunks]
    rows = [
        (entry.key, _elements(chunk), size_of(chunk.size), chunk.file, f"[{chunk.offset}, {chunk.offset + chunk.size})")
        for entry, chunk in chunks
    ]
    print_table(grid, rows)


def _elements(chunk: Chunk) -> str:
    """Format the range of a chunk's elements in the flattened tensor."""
    segment = chunk.segment
    first = f"[{segment.start}, {segment.start + segment.run})"
    return first if segment.count == 1 else f"{first} and {segment.count - 1} more, every {segment.stride}"


def _print_groups(parameters: Parameters) -> None:
    sizes = Counter(parameters.group_of.values())
    keys = dict.fromkeys(key for group in parameters.groups for key in group)
    grid = table(parameters.optimizer, numbers=[f"param group {index}" for index in range(len(parameters.groups))])
    grid.add_row("parameters", *(f"{sizes[index]:,}" for index in range(len(parameters.groups))))
    print_table(grid, [(key, *(group.get(key, "-") for group in parameters.groups)) for key in keys])


def _print_steps(parameters: Parameters) -> None:
    counts = Counter(parameters.steps.values())
    texts = ", ".join(f"{step:g} ({counted(count, 'parameter')})" for step, count in sorted(counts.items()))
    missing = len(parameters.group_of.keys() - parameters.steps.keys())
    print(f"steps taken: {texts or 'none'}" + (f"; {missing:,} without state" if missing else ""))


def _print_extra(extra: Any) -> None:
    if isinstance(extra, Mapping):
        for key, value in extra.items():
            print(f"extra[{key!r}]: {_short(value)}")
    elif extra is not None:
        print(f"extra: {_short(extra)}")


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... ({len(text):,} characters)"
