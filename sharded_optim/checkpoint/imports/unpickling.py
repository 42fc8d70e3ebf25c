"""Read pickled files safely: classes that they name are not imported, and classes that are not known to be harmless are refused.

Used by the modules of pickled formats.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["StandIn", "load", "load_stream"]


class StandIn:
    """A stand-in for an object of a class that is not imported, with the state that the object would have."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        """Accept any arguments."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """Return an attribute of the object; None if it has no such attribute."""
        return self.state.get(name) if isinstance(self.state, dict) else None


# Classes whose objects checkpoints contain besides tensors, and no import needs: `StandIn` replaces them.
REPLACED = (
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
    """Load a file of `torch.save`, with tensors on the CPU, memory-mapped if possible.

    Raises:
        ValueError: it holds an object that is not known to be harmless, or is not a file of `torch.save`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return load_stream(path, str(path), mmap=zipfile.is_zipfile(path))


def load_stream(source: Any, where: str, *, mmap: bool | None = None) -> Any:
    """Load from a stream, such as a part of a file, or from a path, like `load`; `where` names it in errors."""
    try:
        with torch.serialization.safe_globals([(StandIn, name) for name in REPLACED]):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # of any type, if the file is damaged
        refused = REFUSED.search(str(error))
        if refused is None:
            raise ValueError(f"{where} cannot be loaded as a file of torch.save: {(str(error) or repr(error)).splitlines()[0]}") from error
        name = next(filter(None, refused.groups()))
        raise ValueError(
            f"{where} holds a {name.rstrip('.')}, which might run code, and is not loaded; save it again with tensors, numbers, strings, "
            f"and lists, tuples and dicts of these alone"
        ) from error
