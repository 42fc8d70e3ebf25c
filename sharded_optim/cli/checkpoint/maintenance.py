"""The commands `checkpoint verify` and `checkpoint prune`."""

from __future__ import annotations

from typing import Annotated

import typer

from sharded_optim import checkpoint
from sharded_optim.checkpoint.errors import DamagedError
from sharded_optim.checkpoint.steps import candidates, existing_step
from sharded_optim.checkpoint.store import open_store
from sharded_optim.cli import errors
from sharded_optim.cli.checkpoint.arguments import Root, Step
from sharded_optim.cli.tables import counted, size_of

__all__ = ["prune", "verify"]


def verify(
    root: Root,
    step: Step = None,
    every: Annotated[bool, typer.Option("--all", help="verify all steps")] = False,
) -> None:
    """Compare every byte with the saved one, by SHA-256. Exit status 1: a checkpoint is damaged."""
    damaged = False
    with errors.for_users():
        if every and step is not None:
            raise ValueError("--all and --step contradict each other; give one of the two")
        store = open_store(root)
        chosen = existing_step(store, step)
        for number in candidates(store) if every else [chosen]:  # includes checkpoints that have lost their marker: these are damaged
            damaged |= not _verified(root, number)
    if damaged:
        raise typer.Exit(1)


def _verified(root: str, step: int) -> bool:
    try:
        checkpoint.verify(root, step)
    except DamagedError as error:
        print(f"step {step}: DAMAGED")
        for problem in error.problems:
            print(f"  {problem}")
        return False
    manifest = checkpoint.describe(root, step)
    size = f"{size_of(manifest.size)} in {counted(len(manifest.files), 'file')}"
    print(f"step {step}: verified, {size}, {counted(len(manifest.tensors), 'tensor')}")
    return True


def prune(root: Root, keep: Annotated[int, typer.Option("--keep", help="number of checkpoints to keep")]) -> None:
    """Remove all but the newest checkpoints, after one of these is read back. Damaged ones are not counted, and stay if they are newer."""
    with errors.for_users():
        removed = checkpoint.prune(root, keep)
        remaining = checkpoint.steps(root)
    print(f"removed {_joined(removed)}; remaining {_joined(remaining)}")


def _joined(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
