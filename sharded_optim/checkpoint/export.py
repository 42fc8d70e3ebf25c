"""Export checkpoints for other programs: a folder of safetensors files as Hugging Face libraries read it, or one file of torch's.

An export is written beside its destination, and renamed when everything is on the disk. Nothing is overwritten.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_optim.checkpoint.errors import CheckpointError
from sharded_optim.checkpoint.integrity import verify_all
from sharded_optim.checkpoint.local_store import AnyPath, sync
from sharded_optim.checkpoint.local_tensor import MASTER, MODEL, LocalTensor
from sharded_optim.checkpoint.manifest import Manifest, Parameters, TensorEntry, key_of
from sharded_optim.checkpoint.reader import CheckpointReader, LoadRequest
from sharded_optim.checkpoint.steps import existing_step
from sharded_optim.checkpoint.store import open_store
from sharded_optim.sharding.segment import Segment
from sharded_optim.step.state import STEP

__all__ = ["export_safetensors", "export_torch", "import_safetensors"]

Model = Mapping[str, TensorEntry]

FILE_BYTES = 5 * 10**9  # bytes of tensors in a file, the default of Hugging Face libraries


def export_safetensors(root: AnyPath, destination: AnyPath, *, step: int | None = None, masters: bool = False) -> list[str]:
    """Write a checkpoint's model as Hugging Face libraries do: `model.safetensors`, or several files of 5 GB with an index.

    Tensors have their names in the model; a tied tensor is written under all of its names, so that
    `model.load_state_dict(load_file(..))` accepts the files. `safetensors.torch.load_model` expects one name per tensor: pass strict=False.
    Checkpoints, and so exports, have no tokenizer or config.json. One file at a time is in memory.

    Args:
        root: the folder or URL with the checkpoints; see `save`.
        destination: a folder that does not exist.
        step: the step to export; None: the highest that is committed.
        masters: write float32 masters in place of rounded parameters, where the checkpoint has masters.

    Returns:
        The names of the files.

    Raises:
        CheckpointError: there is no such checkpoint, or it holds no model.
        DamagedError: its bytes differ from the saved ones.
        FileExistsError: the destination exists.
    """
    safetensors = import_safetensors()
    _refuse_existing(Path(destination))
    reader = _open(root, step)
    model = _model(reader.manifest, masters)
    if not model:
        raise CheckpointError(f"step {reader.step} was saved without a model; there is nothing to write for {MODEL!r}")
    files = _split(model)
    with _draft_of(Path(destination)) as draft:
        draft.mkdir()
        for file, names in files.items():
            (draft / file).touch()
            mode = stat.S_IMODE((draft / file).stat().st_mode)
            tied = {name: model[name].name for name in names if name != model[name].name}
            tensors = {name: _tensor(reader, model[name]) for name in names}
            safetensors.torch.save_file(tensors, draft / file, metadata=tied | {"format": "pt"})
            (draft / file).chmod(mode)  # safetensors makes its files readable by their owner only
            sync(draft / file)
        written = list(files)
        if len(files) > 1:
            written.append("model.safetensors.index.json")
            (draft / written[-1]).write_text(_index(model, files))
            sync(draft / written[-1])
        sync(draft)
    return written


def export_torch(root: AnyPath, destination: AnyPath, *, step: int | None = None, masters: bool = False) -> None:
    """Write a checkpoint as one file for `torch.load(..., weights_only=True)`: {"model": .., "optimizer": .., "extra": .., "step": ..}.

    "model" is for `model.load_state_dict`, "optimizer" for `load_state_dict` of an optimizer of this library with the same param groups;
    either is None if the checkpoint lacks it. The optimizer's parameters are numbered group by group; each group lists their names as
    "param_names". Under FSDP1 with use_orig_params=False an optimizer's parameters have no order: compare these names with those of the
    groups that you load the state into. Everything is in memory at once.

    Args:
        root, step, masters: see `export_safetensors`.
        destination: a file that does not exist.

    Raises:
        CheckpointError, DamagedError, FileExistsError: see `export_safetensors`.
    """
    _refuse_existing(Path(destination))
    reader = _open(root, step)
    model = _model(reader.manifest, masters)
    tensors = {key: _tensor(reader, entry) for key, entry in {entry.key: entry for entry in model.values()}.items()}
    parameters = reader.manifest.parameters
    content = {
        "model": {name: tensors[entry.key] for name, entry in model.items()} or None,
        "optimizer": None if parameters is None else _optimizer(reader, parameters),
        "extra": reader.manifest.extra,
        "step": reader.step,
    }
    with _draft_of(Path(destination)) as draft:
        torch.save(content, draft)
        sync(draft)


# ------------------------------------------------------------------------------------------------------------------------- tensors


def _open(root: AnyPath, step: int | None) -> CheckpointReader:
    """Open and verify the checkpoint of a step; None: the highest that is committed."""
    store = open_store(root)
    reader = CheckpointReader(store, existing_step(store, step))
    verify_all(reader)
    return reader


def _tensor(reader: CheckpointReader, entry: TensorEntry) -> Tensor:
    """Read a whole tensor to new CPU memory."""
    result = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    target = LocalTensor(kind=entry.kind, segment=Segment.whole(entry.name, entry.shape), local=result)
    reader.load([LoadRequest(target=target, entries=[entry])])
    return result


def _model(manifest: Manifest, masters: bool) -> Model:
    """Return the model's tensors, by all of their names; with `masters`, masters in place of rounded parameters."""
    entries = {entry.name: entry for entry in manifest.tensors.values() if entry.kind == MODEL}
    if masters:
        entries = {name: manifest.tensors.get(key_of(MASTER, name), entry) for name, entry in entries.items()}
    return entries | {alias: entries[name] for alias, name in manifest.aliases.items() if name in entries}


def _optimizer(reader: CheckpointReader, parameters: Parameters) -> dict[str, Any]:
    """Build a state dict like torch.optim's, with parameters numbered group by group."""
    names_by_group = parameters.names_by_group()
    numbers = {name: number for number, name in enumerate(name for names in names_by_group for name in names)}
    groups = [
        {**values, "param_names": names, "params": [numbers[name] for name in names]}
        for values, names in zip(parameters.groups, names_by_group, strict=True)
    ]
    state: dict[int, dict[str, Any]] = {
        numbers[name]: {STEP: torch.tensor(float(step), dtype=torch.float32, device="cpu")} for name, step in parameters.steps.items()
    }
    for entry in reader.manifest.tensors.values():
        if entry.kind not in (MODEL, MASTER):
            state[numbers[entry.name]][entry.kind] = _tensor(reader, entry)
    return {"state": dict(sorted(state.items())), "param_groups": groups}


# --------------------------------------------------------------------------------------------------------------------------- files


def _split(model: Model) -> dict[str, list[str]]:
    """Distribute a model's tensors over files of at most FILE_BYTES. Returns the names of the tensors of each file."""
    files: list[list[str]] = [[]]
    size = 0
    for name, entry in model.items():
        if files[-1] and size + entry.size > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += entry.size
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{number:05d}-of-{len(files):05d}.safetensors": names for number, names in enumerate(files, 1)}


def _index(model: Model, files: Mapping[str, Sequence[str]]) -> str:
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": sum(entry.size for entry in model.values())}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _refuse_existing(destination: Path) -> None:
    if os.path.lexists(destination):
        raise FileExistsError(errno.EEXIST, "exists, and an export overwrites nothing; give a new name", str(destination))


@contextmanager
def _draft_of(destination: Path) -> Iterator[Path]:
    """Yield a temporary path beside the destination; rename it to the destination after the block, remove it if the block fails."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    draft = destination.parent / f".{destination.name}.{secrets.token_hex(4)}"
    try:
        yield draft
        _refuse_existing(destination)
        os.rename(draft, destination)
    except BaseException:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
        raise
    sync(destination.parent)


def import_safetensors() -> Any:
    """Return the package safetensors, with its module `torch`.

    Raises:
        CheckpointError: the package is not installed.
    """
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise CheckpointError("safetensors files need the package safetensors, which is not installed; pip install safetensors") from error
    return safetensors
