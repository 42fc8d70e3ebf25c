"""Packages that only some formats need."""

from __future__ import annotations

from typing import Any

from sharded_optim.checkpoint.errors import CheckpointError

__all__ = ["safetensors"]


def safetensors() -> Any:
    """The package, with its `torch`.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise CheckpointError(
            "files of safetensors need the package safetensors, which is not installed; pip install safetensors"
        ) from error
    return safetensors
