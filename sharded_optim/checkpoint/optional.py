"""Import the packages that only some formats need. Used by `export.py` and `imports/safetensors_files.py`."""

from __future__ import annotations

from typing import Any

from sharded_optim.checkpoint.errors import CheckpointError

__all__ = ["import_safetensors"]


def import_safetensors() -> Any:
    """Import the package, with its `torch`.

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
