"""A checkpoint read by one process, tensor by tensor, each of them whole: what exports are made of."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from sharded_optim.checkpoint.held import MASTER, MODEL, Held
from sharded_optim.checkpoint.manifest import Manifest, TensorEntry, key_of
from sharded_optim.checkpoint.read import CheckpointReader, Wish
from sharded_optim.checkpoint.steps import existing_step, read_back
from sharded_optim.checkpoint.store import open_store
from sharded_optim.sharding.segment import Segment

__all__ = ["WholeCheckpoint"]


class WholeCheckpoint:
    """A committed checkpoint, verified when this is made.

    Args:
        root, step: which; None: the highest that is committed.

    Attributes:
        manifest: of it.

    Raises:
        CheckpointError: there is none.
        DamagedError: it is not what was saved.
    """

    def __init__(self, root: str | os.PathLike[str], step: int | None = None) -> None:
        store = open_store(root)
        self._reader = CheckpointReader(store, existing_step(store, step))
        read_back(self._reader)

    @property
    def manifest(self) -> Manifest:
        return self._reader.manifest

    def tensor(self, entry: TensorEntry) -> Tensor:
        """A whole tensor, in memory of its own on the CPU."""
        result = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        held = Held(kind=entry.kind, segment=Segment.whole(entry.name, entry.shape), local=result)
        self._reader.load([Wish(entry=entry, held=held)])
        return result

    def model(self, *, masters: bool) -> Mapping[str, TensorEntry]:
        """The model's parameters and buffers, by all of their names.

        Args:
            masters: the float32 values of parameters, where there are some, in the place of those that were rounded.
        """
        tensors = self.manifest.tensors
        found = {entry.name: entry for entry in tensors.values() if entry.kind == MODEL}
        chosen = {name: tensors.get(key_of(MASTER, name), entry) if masters else entry for name, entry in found.items()}
        return chosen | {alias: chosen[name] for alias, name in self.manifest.aliases.items() if name in chosen}
