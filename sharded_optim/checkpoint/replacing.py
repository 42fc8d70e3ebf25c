"""A save of a step that exists already: refused if the checkpoint is intact, otherwise the step's folder is cleared.

Training that fell back to an older checkpoint reaches the damaged step again, and must be able to save it. Used by `saving.py`.
"""

from __future__ import annotations

import warnings

import torch.distributed as dist

from sharded_optim.checkpoint.collectives import all_or_nothing, rank_and_world_size
from sharded_optim.checkpoint.errors import CheckpointError, DamagedError, MismatchError, UnreadableError
from sharded_optim.checkpoint.integrity import verify_together
from sharded_optim.checkpoint.store import COMMITTED, Store, folder_of

__all__ = ["clear_step", "step_exists"]


def step_exists(store: Store, step: int) -> bool:
    """Return whether a step has a folder; on an object store, where drafts have the same name, whether it has the marker."""
    folder = folder_of(step)
    return folder in store.folders() and (store.renames or COMMITTED in store.files(folder))


def clear_step(store: Store, step: int, process_group: dist.ProcessGroup | None) -> None:
    """Remove a damaged checkpoint, and rename one that cannot be read, which may be intact. A collective.

    Raises:
        CheckpointError: it is intact, or cannot be renamed.
    """
    folder = folder_of(step)
    where = f"{store.root}/{folder}"
    is_first = rank_and_world_size(process_group)[0] == 0
    try:
        verify_together(store, step, process_group)
    except DamagedError as error:
        damage = error
    except MismatchError as error:
        raise MismatchError(f"step {step} exists already, and only damaged checkpoints are replaced: {error}") from error
    else:
        raise CheckpointError(
            f"step {step} is committed already, and a committed checkpoint is never overwritten; save to another root, or remove {where}"
        )

    def clear() -> None:  # warns on all ranks: where warnings are errors, one rank would raise alone
        if not isinstance(damage, UnreadableError):
            warnings.warn(f"replacing a checkpoint that is damaged: {damage}", UserWarning, stacklevel=2)
            if is_first:
                store.remove(folder)
            return
        what = f"step {step} exists already, and cannot be read to see whether it is intact"
        try:
            name = store.set_aside(folder) if is_first else f"{folder}.unreadable-*"
        except OSError as error:
            raise CheckpointError(f"{what}; nor can it be renamed ({error}); save to another root: {damage}") from error
        warnings.warn(f"{what}; it is now called {name}, and nothing removes it: {damage}", UserWarning, stacklevel=2)

    all_or_nothing(f"clearing {where}", clear, process_group)
