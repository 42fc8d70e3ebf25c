"""Import the checkpoints of other libraries: for each format a module that returns a `Content` to save.

unpickling.py         loads pickled files, and decides which classes they may contain
optimizer_state.py    translates the state of other optimizers
assembly.py           matches an optimizer's state with the model's parameters; joins tensors that are stored in chunks
state_dicts.py, dcp.py, deepspeed_zero.py, deepspeed_universal.py, safetensors_files.py    the formats: torch files, DCP, DeepSpeed, ...
deepspeed_files.py    the common parts of DeepSpeed's two formats
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sharded_optim.checkpoint import saving
from sharded_optim.checkpoint.content import Content
from sharded_optim.checkpoint.errors import CheckpointError
from sharded_optim.checkpoint.imports import dcp, deepspeed_universal, deepspeed_zero, safetensors_files, state_dicts
from sharded_optim.checkpoint.imports.optimizer_state import ImportOptions
from sharded_optim.checkpoint.store import AnyPath

__all__ = ["FORMATS", "import_from"]

FORMATS: dict[str, Callable[[Path, ImportOptions], Content]] = {
    "dcp": dcp.read,
    "deepspeed": deepspeed_zero.read,
    "universal": deepspeed_universal.read,
    "torch": state_dicts.read,
    "safetensors": safetensors_files.read,
}
PICKLED = FORMATS.keys() - {"safetensors"}


def import_from(
    source: AnyPath,
    root: AnyPath,
    step: int,
    *,
    source_format: str = "auto",
    unpickle: bool = False,
    optimizer: str | None = None,
    decay_form: str | None = None,
    model_key: str | None = None,
    optimizer_key: str | None = None,
    param_names: Sequence[str] | None = None,
) -> None:
    """Convert a checkpoint of another library to a checkpoint of this library, in one process.

    The state of this library's optimizers, of torch's Adam, AdamW and SGD, of optimi's and of Composer's is translated; see
    `step/foreign_state.py`.

    Args:
        source: a folder of torch.distributed.checkpoint; a folder of DeepSpeed, or its parent with a file `latest`; a file of torch.save;
            or safetensors files with a model.
        root, step: see `checkpoint.save`.
        source_format: "dcp", "deepspeed", "universal", "torch", "safetensors", or "auto": detect it.
        unpickle: whether to read pickled files, as all formats but safetensors have. torch's weights-only unpickler, or one like it, loads
            only classes that are known to be harmless; still, an attacker may have crafted the bytes that it parses.
        optimizer: the class of this library that continues training; None: the nearest.
        decay_form: the meaning of `weight_decay` if the source does not specify it: "coupled" (the default), "l2", or "decoupled".
        model_key, optimizer_key: the keys of the state dicts, such as "a.b"; None: one of the usual keys.
        param_names: names of the parameters, in the order in which the optimizer's state numbers them; None: the names in the state, or
            the model's if the order is certain.

    Raises:
        CheckpointError: the checkpoint could not be saved, or is pickled and `unpickle` is False.
        ValueError: the source is not as expected, or ambiguous. Nothing was saved.
    """
    path = Path(source)
    name = _format_of(path) if source_format == "auto" else source_format
    if name not in FORMATS:
        raise ValueError(f"the format is auto, or one of {', '.join(FORMATS)}, got {source_format!r}")
    if name in PICKLED and not unpickle:
        raise CheckpointError(
            f"{path} is read as {name}, whose files are pickled, and a pickle can run code that somebody else has put there; if you trust "
            f"its source, pass --unpickle (unpickle=True): even then only harmless classes are loaded"
        )
    options = ImportOptions(
        optimizer=optimizer, decay_form=decay_form, model_key=model_key, optimizer_key=optimizer_key, param_names=param_names
    )
    content = FORMATS[name](path, options)
    pending = saving.begin(root, step, lambda: content)
    saving.finish(pending, pending.content)


def _format_of(path: Path) -> str:
    if path.is_file():
        return "safetensors" if safetensors_files.matches(path) else "torch"
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; give a folder of DCP or DeepSpeed, or a torch file")
    if (path / ".metadata").is_file():
        return "dcp"
    if (path / deepspeed_universal.LATEST).is_file() and (path / deepspeed_zero.LATEST).is_file():
        raise ValueError(
            f"{path} has a `{deepspeed_universal.LATEST}` and a `{deepspeed_zero.LATEST}`, of which either may be the older; choose one "
            f"with --format universal or deepspeed (source_format=), or give the folder that it names"
        )
    for name, module in (("universal", deepspeed_universal), ("deepspeed", deepspeed_zero), ("safetensors", safetensors_files)):
        if module.matches(path):
            return name
    raise ValueError(
        f"{path} has no .metadata as of DCP, no zero/ or *_model_states.pt as of DeepSpeed, no file `latest` that names a folder with "
        f"them, and no *.safetensors; give the folder that has"
    )
