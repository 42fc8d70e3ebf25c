"""`checkpoint verify` and `checkpoint prune`."""

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
    """Compare every byte with what was saved. By SHA-256; exit status 1: something is damaged."""
    damaged = False
    with errors.for_users():
        if every and step is not None:
            raise ValueError("--all and --step contradict each other; give one of the two")
        store = open_store(root)
        chosen = existing_step(store, step)
        for each in candidates(store) if every else [chosen]:  # one that has lost its marker is damaged
            damaged |= not _verified(root, each)
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


def prune(root: Root, keep: Annotated[int, typer.Option("--keep", help="how many remain")]) -> None:
    """Remove all but the newest. Of these one is read back before; what is damaged does not count, and stays if it is newer."""
    with errors.for_users():
        removed = checkpoint.prune(root, keep)
        remaining = checkpoint.steps(root)
    print(f"removed {_listed(removed)}; there remain {_listed(remaining)}")


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
