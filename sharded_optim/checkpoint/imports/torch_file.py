"""Files of `torch.save`: a model's and an optimizer's state dict, Composer's checkpoints, and what other trainers make of these."""

from __future__ import annotations

from pathlib import Path

from sharded_optim.checkpoint.imports import safely
from sharded_optim.checkpoint.imports.assembly import content_of_tree
from sharded_optim.checkpoint.imports.optimizer_state import Choices
from sharded_optim.checkpoint.saving import Content

__all__ = ["content"]


def content(path: Path, choices: Choices) -> Content:
    """What a file holds. Tensors stay in the file until they are written."""
    return content_of_tree(safely.load(path), choices, str(path))
