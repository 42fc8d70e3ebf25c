"""Files of `torch.save`: the state dicts of a model and an optimizer in nested dicts, as Composer and other trainers save them.

`dcp.py` uses `content_of` for the nested dicts in its folders.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sharded_optim.checkpoint.content import Content
from sharded_optim.checkpoint.imports import unpickling
from sharded_optim.checkpoint.imports.assembly import StateDict, assemble, unflatten
from sharded_optim.checkpoint.imports.optimizer_state import ImportOptions
from sharded_optim.checkpoint.values import encode

__all__ = ["content_of", "encodable", "read"]

MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module")
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim", "optimizer_states")


def read(path: Path, options: ImportOptions) -> Content:
    """Read a file. Tensors stay in the mapped file until they are saved."""
    return content_of(unpickling.load(path), options, str(path))


def content_of(tree: Any, options: ImportOptions, where: str) -> Content:
    """Find the model's and the optimizer's state dict in nested dicts, under the keys that trainers use; or take a single state dict.

    Raises:
        ValueError: the state dicts of the model and the optimizer cannot be identified.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where} holds a {type(tree).__name__}; an import needs a dict with state dicts")
    inner = tree.get("state")
    if isinstance(inner, Mapping) and "model" in inner and "optimizers" in inner:  # Composer
        rest = {key: value for key, value in tree.items() if key != "state"} | dict(inner)
        model, optimizer = rest.pop("model"), _single(rest.pop("optimizers"), f"optimizers of {where}")
        from_composer = str(next(iter(inner["optimizers"]), "")).startswith("Decoupled")
    else:
        model, optimizer, rest = _by_key(tree, options, where)
        from_composer = False
    if model is None and optimizer is None:
        raise ValueError(
            f"{where} has the keys {', '.join(map(str, tree))}, none of which is known to be the model's ({', '.join(MODEL_KEYS)}) or the "
            f"optimizer's ({', '.join(OPTIMIZER_KEYS)}); name them with --model-key and --optimizer-key (model_key=, optimizer_key=)"
        )
    return assemble(model or {}, optimizer, options, where, extra=encodable(rest, where), from_composer=from_composer)


def _by_key(tree: StateDict, options: ImportOptions, where: str) -> tuple[Any, Any, dict[Any, Any]]:
    """Return the state dicts of the model and the optimizer, each None if there is none, and the other entries."""
    optimizer, optimizer_key = _get(tree, options.optimizer_key, OPTIMIZER_KEYS, where)
    model, model_key = _get(tree, options.model_key, MODEL_KEYS, where)
    rest = {key: value for key, value in tree.items() if key not in (optimizer_key, model_key)}
    if isinstance(optimizer, list):  # PyTorch Lightning
        optimizer = _single(dict(enumerate(optimizer)), f"optimizer_states of {where}")
    if model is None and optimizer is None:
        if rest.keys() >= {"state", "param_groups"}:
            return None, rest, {}
        if rest and all(isinstance(value, Tensor) for value in rest.values()):
            return rest, None, {}
    elif model is None and isinstance(optimizer, Mapping):  # torchtitan saves the model's tensors beside the optimizer
        tensors = {key: value for key, value in rest.items() if isinstance(value, Tensor)}
        names = {key for group in unflatten(optimizer, where)["param_groups"] for key in group["params"]}
        if names and names <= tensors.keys():
            return tensors, optimizer, {key: value for key, value in rest.items() if key not in tensors}
    return model, optimizer, rest


def _get(tree: StateDict, path: str | None, usual: Iterable[str], where: str) -> tuple[Any, str | None]:
    """Find a state dict in the tree; return it and the first key of its path, or (None, None) if there is none."""
    if path is None:
        key = next((key for key in usual if isinstance(tree.get(key), Mapping | list)), None)
        return (None, None) if key is None else (tree[key], key)
    value: Any = tree
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"{where} has no key {path!r}; it has {', '.join(map(str, tree))}")
        value = value[key]
    return value, path.split(".")[0]


def _single(values: Mapping[Any, Any], what: str) -> Any:
    if len(values) != 1:
        raise ValueError(f"there are {len(values)} {what}; a checkpoint holds one: {', '.join(map(str, values)) or 'none'}")
    return next(iter(values.values()))


def encodable(values: Mapping[Any, Any], where: str) -> dict[Any, Any] | None:
    """Return the entries that a checkpoint can hold as extra, or None if there are none; warn of the others."""
    kept, dropped = {}, []
    for key, value in values.items():
        try:
            encode(value, where)
        except ValueError:
            dropped.append(str(key))
        else:
            kept[key] = value
    if dropped:
        warnings.warn(f"{where} holds {', '.join(dropped)}, which a checkpoint cannot hold as extra; left out", UserWarning, stacklevel=3)
    return kept or None
