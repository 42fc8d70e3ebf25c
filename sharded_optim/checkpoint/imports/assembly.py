"""What a source holds, as whole tensors of named parameters: from state dicts of a model and of an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_optim.checkpoint.held import MASTER, MODEL, Held
from sharded_optim.checkpoint.imports.optimizer_state import Choices, translated
from sharded_optim.checkpoint.manifest import Parameters
from sharded_optim.checkpoint.saving import Content
from sharded_optim.checkpoint.values import encode
from sharded_optim.sharding.names import without_wrappers
from sharded_optim.sharding.segment import Segment

__all__ = ["assemble", "content_of_tree", "encodable", "tiled", "whole"]

MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module")
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim", "optimizer_states")
STATE, GROUPS = "state.", "param_groups."  # of a state dict on one level of keys

Tree = Mapping[Any, Any]


def whole(kind: str, name: str, tensor: Tensor) -> Held:
    """All of a tensor, copied only where it is not contiguous: it would be copied anew for each chunk."""
    return Held(kind=kind, segment=Segment.whole(name, tensor.shape), local=tensor.contiguous())


def tiled(stored: Sequence[tuple[Any, Any]], shape: tuple[int, ...], where: str) -> Tensor:
    """A whole tensor, of boxes and what they hold.

    Args:
        stored: where each begins, and its tensor.

    Raises:
        ValueError: they do not tile it.
    """
    if not stored or not all(isinstance(chunk, Tensor) for _, chunk in stored):
        raise ValueError(f"{where} has no chunks, or chunks that are no tensors")
    first = stored[0][1]
    if len(stored) == 1 and tuple(first.shape) == shape:
        return first
    whole = torch.empty(shape, dtype=first.dtype, device="cpu")
    count = torch.zeros(shape, dtype=torch.uint8, device="cpu")
    for offsets, chunk in stored:
        begins = tuple(offsets) if offsets is not None else ()
        box = tuple(slice(begin, begin + size) for begin, size in zip(begins, chunk.shape, strict=False))
        if len(begins) != len(shape) or whole[box].shape != chunk.shape or chunk.dtype != whole.dtype:
            raise ValueError(f"{where}: a chunk of shape {tuple(chunk.shape)} at {begins} does not fit into {shape}")
        whole[box] = chunk
        count[box] += 1
    if not bool((count == 1).all()):
        raise ValueError(f"{where}: its chunks do not tile it: elements are stored {int(count.min())} to {int(count.max())} times")
    return whole


def encodable(values: Mapping[Any, Any], where: str) -> dict[Any, Any] | None:
    """What of a dict a checkpoint can hold as extra; says what not. None, where that is nothing."""
    found, dropped = {}, []
    for key, value in values.items():
        try:
            encode(value, where)
        except ValueError:
            dropped.append(str(key))
        else:
            found[key] = value
    if dropped:
        warnings.warn(f"{where} holds {', '.join(dropped)}, which a checkpoint cannot hold as extra; left out", UserWarning, stacklevel=3)
    return found or None


def content_of_tree(tree: Any, choices: Choices, where: str) -> Content:
    """Of nested dicts that hold state dicts under one of the usual keys, or are one.

    Raises:
        ValueError: it is not known what is what.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where} holds a {type(tree).__name__}; an import needs a dict with state dicts")
    rest = dict(tree)
    inner = tree.get("state")
    of_composer = False
    if isinstance(inner, Mapping) and "model" in inner and "optimizers" in inner:  # Composer's
        rest = {key: value for key, value in rest.items() if key != "state"} | dict(inner)
        model, optimizer = rest.pop("model"), _only(rest.pop("optimizers"), f"optimizers of {where}")
        of_composer = str(next(iter(inner["optimizers"]), "")).startswith("Decoupled")
    else:
        optimizer, optimizer_at = _found(tree, choices.optimizer_key, OPTIMIZER_KEYS, where)
        model, model_at = _found(tree, choices.model_key, MODEL_KEYS, where)
        rest = {key: value for key, value in tree.items() if key not in (optimizer_at, model_at)}
        if isinstance(optimizer, list):  # PyTorch Lightning's
            optimizer = _only(dict(enumerate(optimizer)), f"optimizer_states of {where}")
        if model is None and optimizer is None:
            if rest.keys() >= {"state", "param_groups"}:
                optimizer, rest = rest, {}
            elif rest and all(isinstance(value, Tensor) for value in rest.values()):
                model, rest = rest, {}
        elif model is None and isinstance(optimizer, Mapping):  # torchtitan's model is beside the optimizer
            tensors = {key: value for key, value in rest.items() if isinstance(value, Tensor)}
            called = {key for group in _nested(optimizer, where)["param_groups"] for key in group["params"]}
            if called and called <= tensors.keys():
                model, rest = tensors, {key: value for key, value in rest.items() if key not in tensors}
    if model is None and optimizer is None:
        raise ValueError(
            f"{where} has the keys {', '.join(map(str, tree))}, none of which is known to be the model's ({', '.join(MODEL_KEYS)}) or the "
            f"optimizer's ({', '.join(OPTIMIZER_KEYS)}); say which with --model-key and --optimizer-key (model_key=, optimizer_key=)"
        )
    return assemble(model or {}, optimizer, choices, where, extra=encodable(rest, where), of_composer=of_composer)


def _found(tree: Tree, key: str | None, usual: Iterable[str], where: str) -> tuple[Any, str | None]:
    """A state dict in the tree, and the first key on the way to it; twice None, where there is none."""
    if key is None:
        name = next((name for name in usual if isinstance(tree.get(name), Mapping | list)), None)
        return (None, None) if name is None else (tree[name], name)
    found: Any = tree
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise ValueError(f"{where} has no key {key!r}; it has {', '.join(map(str, tree))}")
        found = found[part]
    return found, key.split(".")[0]


def _only(values: Mapping[Any, Any], what: str) -> Any:
    if len(values) != 1:
        raise ValueError(f"there are {len(values)} {what}; a checkpoint holds one: {', '.join(map(str, values)) or 'none'}")
    return next(iter(values.values()))


def assemble(
    model: Mapping[str, Any],
    optimizer: Tree | None,
    choices: Choices,
    where: str,
    *,
    masters: Iterable[Tensor] = (),
    extra: Any = None,
    of_composer: bool = False,
) -> Content:
    """Of a model and its optimizer.

    Args:
        model: its state dict.
        optimizer: its state dict, on one level of keys or nested.
        where: it comes from, for error messages.
        masters: float32 values of the parameters, in the order in which the optimizer numbers them.
        of_composer: see `translated`.
    """
    tensors, names, aliases = _model(model, where)
    held = [whole(MODEL, name, tensor) for name, tensor in tensors.items()]
    if optimizer is None:
        return Content(held=held, extra=extra, aliases=aliases)
    nested = _nested(optimizer, where)
    found = translated(nested, choices, of_composer=of_composer)
    name_of = _names(nested, tensors, names, choices, where)
    for name, master in zip(name_of.values(), masters, strict=False):
        held.append(whole(MASTER, name, master))
    for key, state in found.state.items():
        name = name_of[key]
        for kind, tensor in state.items():
            if name in tensors and tensor.shape != tensors[name].shape:
                raise ValueError(f"{where}: {kind} of {name!r} has shape {tuple(tensor.shape)}, the parameter {tuple(tensors[name].shape)}")
            held.append(whole(kind, name, tensor))
    group_of = {name_of[key]: index for index, group in enumerate(nested["param_groups"]) for key in group["params"]}
    steps = {name_of[key]: step for key, step in found.steps.items()}
    parameters = Parameters(optimizer=found.optimizer, groups=found.groups, group_of=group_of, steps=steps)
    return Content(held=held, parameters=parameters, extra=extra, aliases=aliases)


def _model(model: Mapping[str, Any], where: str) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Tensors by the names that they have without wrappers, tied ones once.

    Returns:
        The tensors; the name that each of the source's names stands for; and further names of tied ones, with the one that they have here.
    """
    strange = [str(name) for name, value in model.items() if not isinstance(value, Tensor)]
    if strange:
        warnings.warn(f"{where}: {', '.join(strange)} of the model are no tensors; left out", UserWarning, stacklevel=2)
    is_wrapped = bool(model) and all(str(name).startswith("module.") for name in model)
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    aliases: dict[str, str] = {}
    first: dict[Hashable, str] = {}
    for name, tensor in model.items():
        if not isinstance(tensor, Tensor):
            continue
        clean = without_wrappers(str(name), is_in_ddp=is_wrapped)
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        names[str(name)] = first.setdefault(place, clean) if tensor.numel() else clean
        if names[str(name)] == clean:
            tensors[clean] = tensor.detach()
        else:
            aliases[clean] = names[str(name)]
    return tensors, names, aliases


def _nested(optimizer: Tree, where: str) -> Tree:
    """A state dict as torch.optim makes it, by whatever the parameters are called."""
    if "param_groups" in optimizer and isinstance(optimizer.get("state", {}), Mapping):
        groups = optimizer["param_groups"]
        state = dict(optimizer.get("state", {}))
        called = {key for group in groups for key in group["params"]}
        # DCP makes texts of numbers that are keys
        state = {int(key) if isinstance(key, str) and key not in called and key.isdigit() else key: value for key, value in state.items()}
        return {"state": state, "param_groups": list(groups)}
    if optimizer and all(str(key).startswith((STATE, GROUPS)) for key in optimizer):
        return _unflattened(optimizer)
    shown = ", ".join(map(str, list(optimizer)[:5]))
    raise ValueError(f"{where} has an optimizer's state dict with the keys {shown}, ...; expected are state and param_groups")


def _unflattened(optimizer: Tree) -> Tree:
    """Of `flatten_optimizer_state_dict`, which keeps the hyperparameters of each parameter, not the groups."""
    state: dict[str, dict[str, Any]] = {}
    values: dict[str, dict[str, Any]] = {}
    for key, value in optimizer.items():
        name, _, entry = str(key).rpartition(".")
        table = state if name.startswith(STATE) else values
        table.setdefault(name.removeprefix(STATE).removeprefix(GROUPS) if table is values else name.removeprefix(STATE), {})[entry] = value
    groups: dict[str, dict[str, Any]] = {}
    for name, hyperparameters in values.items():
        group = groups.setdefault(repr(sorted(hyperparameters.items())), {**hyperparameters, "params": []})
        group["params"].append(name)
    return {"state": state, "param_groups": list(groups.values())}


def _names(optimizer: Tree, tensors: Mapping[str, Tensor], names: Mapping[str, str], choices: Choices, where: str) -> dict[Hashable, str]:
    """What the optimizer's keys stand for.

    Raises:
        ValueError: that is not certain, or the model has no such parameter.
    """
    groups = optimizer["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    if choices.param_names is not None:
        told = list(choices.param_names)
        if len(told) != len(keys):
            raise ValueError(f"{len(told)} parameter names were given, and the optimizer's state of {where} has {len(keys)} parameters")
    elif all(isinstance(key, str) for key in keys):
        told = keys
    elif all(len(group.get("param_names") or ()) == len(group["params"]) for group in groups):
        told = [name for group in groups for name in group["param_names"]]
    else:
        told = _names_in_order(optimizer, keys, tensors, where)
    is_wrapped = bool(told) and all(name.startswith("module.") for name in told)
    found = {key: names.get(name, without_wrappers(name, is_in_ddp=is_wrapped)) for key, name in zip(keys, told, strict=True)}
    missing = [name for name in found.values() if tensors and name not in tensors]
    if missing:
        raise ValueError(f"{where}: the optimizer has a parameter {missing[0]!r}, and the model has not ({len(missing)} such)")
    if len(set(found.values())) != len(found):
        raise ValueError(f"{where}: two parameters of the optimizer have one name")
    return found


def _names_in_order(optimizer: Tree, keys: list[Any], tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """The model's, where one param group has all of its tensors in their order: else two tensors of one shape might change places."""
    way_out = (
        "give the names, in the order of the optimizer's parameters, with --names (param_names=), or save the state of an optimizer that "
        "was built with named_parameters()"
    )
    if len(optimizer["param_groups"]) > 1:
        raise ValueError(f"{where} numbers the parameters of {len(optimizer['param_groups'])} param groups without names; {way_out}")
    if len(keys) != len(tensors):
        raise ValueError(
            f"{where} numbers {len(keys)} parameters of the optimizer without names, and its model has {len(tensors)} tensors; {way_out}"
        )
    for key, (name, tensor) in zip(keys, tensors.items(), strict=True):
        for kind, value in optimizer["state"].get(key, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != tensor.shape:
                raise ValueError(
                    f"{where} numbers parameters without names, and not in the model's order: {kind} of number {key} has shape "
                    f"{tuple(value.shape)}, {name!r} {tuple(tensor.shape)}; {way_out}"
                )
    return list(tensors)
