"""Pickled files without the danger: classes that they name are not imported, and what is not known to be harmless is refused."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["Inert", "load", "load_stream"]


class Inert:
    """Stands for an object of a class that is not loaded: keeps what would have made it, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __new__(cls, *_: Any) -> Inert:
        found = super().__new__(cls)
        found.arguments, found.state = (), None
        return found

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str, default: Any = None) -> Any:
        """What the object's attribute would have been."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


# What checkpoints hold beside tensors, and nothing that is imported needs. An `Inert` takes the place of each.
STAND_INS = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "argparse.Namespace",  # the arguments of a training script
    "datetime.timedelta",  # Composer's clock
    "pathlib.PosixPath",
    # random states of NumPy, which Composer and many training scripts keep
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
)
REFUSED = re.compile(r"GLOBAL (\S+) was not|GLOBAL (\S+) whose module|[Uu]nsupported class (\S+)")


def load(path: Path) -> Any:
    """A file of `torch.save`, with tensors on the CPU, where possible mapped, not read.

    Raises:
        ValueError: it holds an object that is not known to be harmless, or is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return _load(path, str(path), mmap=zipfile.is_zipfile(path))


def load_stream(stream: BinaryIO, where: str) -> Any:
    """As `load`, from a part of a file."""
    return _load(stream, where, mmap=None)


def _load(source: Any, where: str, *, mmap: bool | None) -> Any:
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in STAND_INS]):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # of any type, where the file is damaged
        found = REFUSED.search(str(error))
        if found is None:
            raise ValueError(f"{where} cannot be loaded as a file of torch.save: {(str(error) or repr(error)).splitlines()[0]}") from error
        name = next(filter(None, found.groups()))
        raise ValueError(
            f"{where} holds a {name.rstrip('.')}, which might run code, and is not loaded; save it again without: tensors, numbers, texts, "
            f"and lists, tuples and dicts of these"
        ) from error
