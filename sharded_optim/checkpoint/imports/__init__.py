"""Checkpoints of other libraries, made into ours. One file for each format, all of which say what they find as `saving.Content`.

safely.py             what may be in a pickled file
optimizer_state.py    optimizer state in our terms
assembly.py           whole tensors of a model, and of an optimizer that numbers or names its parameters
torch_file.py, dcp.py, deepspeed_rigid.py, deepspeed_universal.py, safetensors_files.py     the formats
deepspeed_files.py    what both of DeepSpeed's have in common
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from sharded_optim.checkpoint import saving
from sharded_optim.checkpoint.errors import CheckpointError
from sharded_optim.checkpoint.imports import dcp, deepspeed_rigid, deepspeed_universal, safetensors_files, torch_file
from sharded_optim.checkpoint.imports.optimizer_state import Choices

__all__ = ["FORMATS", "import_from"]

FORMATS: dict[str, Callable[[Path, Choices], saving.Content]] = {
    "dcp": dcp.content,
    "deepspeed": deepspeed_rigid.content,
    "universal": deepspeed_universal.content,
    "torch": torch_file.content,
    "safetensors": safetensors_files.content,
}
PICKLED = FORMATS.keys() - {"safetensors"}


def import_from(
    source: str | os.PathLike[str],
    root: str | os.PathLike[str],
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
    """Make a checkpoint of what another library has saved. By one process.

    The state of this library's optimizers, of torch's Adam, AdamW and SGD, of optimi's and of Composer's is translated; see
    `foreign_state.py`.

    Args:
        source: a folder of torch.distributed.checkpoint or of DeepSpeed, or the folder above that with a file `latest`; a torch file; or
            a model of safetensors files.
        root, step: as of `checkpoint.save`.
        source_format: "dcp", "deepspeed", "universal", "torch", "safetensors", or "auto": what the source looks like.
        unpickle: whether pickled files are read, which all but safetensors are. Only classes that are known to be harmless are loaded, by
            torch's weights-only unpickler or one like it, but that is code that reads what somebody else may have crafted.
        optimizer: the class of this library that is going to continue; None: the nearest.
        decay_form: what `weight_decay` means where the source does not tell: "coupled" (the default), "l2", or "decoupled".
        model_key, optimizer_key: where the state dicts are, as in "a.b"; None: under one of the usual names.
        param_names: of the parameters in the order in which the optimizer's state numbers them; None: the names that it has itself, or
            the model's, if that is certain.

    Raises:
        CheckpointError: it could not be saved.
        ValueError: what is there is not what it should be, or not known; says what. Nothing was saved.
    """
    path = Path(source)
    name = _format_of(path) if source_format == "auto" else source_format
    if name not in FORMATS:
        raise ValueError(f"the format is auto, or one of {', '.join(FORMATS)}, got {source_format!r}")
    if name in PICKLED and not unpickle:
        raise CheckpointError(
            f"{path} is read as {name}, whose files are pickled, and a pickle can run code that somebody else has put there; if you trust "
            f"where it comes from, say so with --unpickle (unpickle=True): only harmless classes are loaded even then"
        )
    choices = Choices(
        optimizer=optimizer,
        decay_form=decay_form,
        model_key=model_key,
        optimizer_key=optimizer_key,
        param_names=None if param_names is None else tuple(param_names),
    )
    content = FORMATS[name](path, choices)
    draft = saving.begin(root, step, lambda: content)
    saving.finish(draft, draft.content)


def _format_of(path: Path) -> str:
    if path.is_file():
        return "safetensors" if safetensors_files.looks_like(path) else "torch"
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; give a folder of DCP or DeepSpeed, or a file of torch's")
    if (path / ".metadata").is_file():
        return "dcp"
    if (path / deepspeed_universal.LATEST).is_file() and (path / deepspeed_rigid.LATEST).is_file():
        raise ValueError(
            f"{path} has a `{deepspeed_universal.LATEST}` and a `{deepspeed_rigid.LATEST}`, of which either may be the older; say which "
            f"with --format universal or deepspeed (source_format=), or give the folder that one of them names"
        )
    if deepspeed_universal.looks_like(path):
        return "universal"
    if deepspeed_rigid.looks_like(path):
        return "deepspeed"
    if safetensors_files.looks_like(path):
        return "safetensors"
    raise ValueError(
        f"{path} has no .metadata as of DCP, no zero/ or *_model_states.pt as of DeepSpeed, no file `latest` that names a folder with "
        f"them, and no *.safetensors; give the folder that has"
    )
