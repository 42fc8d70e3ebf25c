"""Build a `Content` from whole tensors: match an optimizer's state with the model's parameters, and join stored chunks.

Used by the modules of the formats.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_optim.checkpoint.content import Content
from sharded_optim.checkpoint.imports.optimizer_state import ImportOptions, translate
from sharded_optim.checkpoint.local_tensor import MASTER, MODEL, LocalTensor
from sharded_optim.sharding.names import without_wrappers
from sharded_optim.sharding.segment import Segment

__all__ = ["StateDict", "assemble", "join_chunks", "unflatten", "whole"]

StateDict = Mapping[Any, Any]

STATE, GROUPS = "state.", "param_groups."  # prefixes of keys in a flattened state dict


def whole(kind: str, name: str, tensor: Tensor) -> LocalTensor:
    """Describe a whole tensor. One that is not contiguous is copied here, as it would be copied again for each use."""
    return LocalTensor(kind=kind, segment=Segment.whole(name, tensor.shape), local=tensor.contiguous())


def join_chunks(chunks: Sequence[tuple[Any, Any]], shape: tuple[int, ...], where: str) -> Tensor:
    """Join the stored chunks of a tensor.

    Args:
        chunks: the offsets and the tensor of each chunk.

    Raises:
        ValueError: the chunks do not tile the tensor.
    """
    if not chunks or not all(isinstance(chunk, Tensor) for _, chunk in chunks):
        raise ValueError(f"{where} has no chunks, or chunks that are not tensors")
    first = chunks[0][1]
    if len(chunks) == 1 and tuple(first.shape) == shape:
        return first
    result = torch.empty(shape, dtype=first.dtype, device="cpu")
    count = torch.zeros(shape, dtype=torch.uint8, device="cpu")
    for offsets, chunk in chunks:
        begins = tuple(offsets) if offsets is not None else ()
        box = tuple(slice(begin, begin + size) for begin, size in zip(begins, chunk.shape, strict=False))
        if len(begins) != len(shape) or result[box].shape != chunk.shape or chunk.dtype != result.dtype:
            raise ValueError(f"{where}: a chunk of shape {tuple(chunk.shape)} at {begins} does not fit into {shape}")
        result[box] = chunk
        count[box] += 1
    if not bool((count == 1).all()):
        raise ValueError(f"{where}: its chunks do not tile it: elements are stored {int(count.min())} to {int(count.max())} times")
    return result


def assemble(
    model: Mapping[str, Any],
    optimizer: StateDict | None,
    options: ImportOptions,
    where: str,
    *,
    masters: Iterable[Tensor] = (),
    extra: Any = None,
    from_composer: bool = False,
) -> Content:
    """Build the content of a model and its optimizer.

    Args:
        model: the model's state dict.
        optimizer: the optimizer's state dict, flattened or not; None: there is no optimizer.
        where: the source, for error messages.
        masters: float32 values of the parameters, in the order in which the optimizer numbers them.
        from_composer: see `translate`.
    """
    tensors, names, aliases = _model(model, where)
    local = [whole(MODEL, name, tensor) for name, tensor in tensors.items()]
    if optimizer is None:
        return Content(tensors=local, extra=extra, aliases=aliases)
    state_dict = unflatten(optimizer, where)
    translated = translate(state_dict, options, from_composer=from_composer)
    name_of = _param_names(state_dict, tensors, names, options, where)
    local += [whole(MASTER, name, master) for name, master in zip(name_of.values(), masters, strict=False)]
    for key, state in translated.state.items():
        name = name_of[key]
        for kind, tensor in state.items():
            if name in tensors and tensor.shape != tensors[name].shape:
                raise ValueError(f"{where}: {kind} of {name!r} has shape {tuple(tensor.shape)}, the parameter {tuple(tensors[name].shape)}")
            local.append(whole(kind, name, tensor))
    names_by_group = [[name_of[key] for key in group["params"]] for group in state_dict["param_groups"]]
    parameters = translated.parameters(names_by_group, {name_of[key]: step for key, step in translated.steps.items()})
    return Content(tensors=local, parameters=parameters, extra=extra, aliases=aliases)


def _model(model: Mapping[str, Any], where: str) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Collect a model's tensors by their names without wrappers, tied tensors once.

    Returns:
        The tensors by name; the source's names -> these names; further names of tied tensors -> these names.
    """
    others = [str(name) for name, value in model.items() if not isinstance(value, Tensor)]
    if others:
        warnings.warn(f"{where}: {', '.join(others)} of the model are not tensors; left out", UserWarning, stacklevel=2)
    is_in_ddp = bool(model) and all(str(name).startswith("module.") for name in model)
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    aliases: dict[str, str] = {}
    first: dict[Hashable, str] = {}
    for name, tensor in model.items():
        if not isinstance(tensor, Tensor):
            continue
        clean = without_wrappers(str(name), is_in_ddp=is_in_ddp)
        memory = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        names[str(name)] = first.setdefault(memory, clean) if tensor.numel() else clean
        if names[str(name)] == clean:
            tensors[clean] = tensor.detach()
        else:
            aliases[clean] = names[str(name)]
    return tensors, names, aliases


# ------------------------------------------------------------------------------------------------------- an optimizer's state dict


def unflatten(optimizer: StateDict, where: str) -> StateDict:
    """Return an optimizer's state dict in the form of torch.optim; keys of parameters may be of any hashable type."""
    if "param_groups" in optimizer and isinstance(optimizer.get("state", {}), Mapping):
        groups = optimizer["param_groups"]
        state = dict(optimizer.get("state", {}))
        params = {key for group in groups for key in group["params"]}
        # DCP turns integer keys into strings.
        state = {int(key) if isinstance(key, str) and key not in params and key.isdigit() else key: value for key, value in state.items()}
        return {"state": state, "param_groups": list(groups)}
    if not optimizer or not all(str(key).startswith((STATE, GROUPS)) for key in optimizer):
        shown = ", ".join(map(str, list(optimizer)[:5]))
        raise ValueError(f"{where} has an optimizer's state dict with the keys {shown}, ...; expected are state and param_groups")
    tables: dict[str, dict[str, dict[str, Any]]] = {STATE: {}, GROUPS: {}}  # by parameter, from torch's `flatten_optimizer_state_dict`
    for key, value in optimizer.items():
        name, _, entry = str(key).rpartition(".")
        prefix = STATE if name.startswith(STATE) else GROUPS
        tables[prefix].setdefault(name.removeprefix(prefix), {})[entry] = value
    by_values: dict[str, dict[str, Any]] = {}  # groups by their hyperparameters
    for name, hyperparameters in tables[GROUPS].items():
        group = by_values.setdefault(repr(sorted(hyperparameters.items())), {**hyperparameters, "params": []})
        group["params"].append(name)
    return {"state": tables[STATE], "param_groups": list(by_values.values())}


def _param_names(
    optimizer: StateDict, tensors: Mapping[str, Tensor], names: Mapping[str, str], options: ImportOptions, where: str
) -> dict[Hashable, str]:
    """Return the names of the parameters, by their keys in the optimizer's state dict.

    Raises:
        ValueError: they are ambiguous, or the model has no such parameter.
    """
    groups = optimizer["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    if options.param_names is not None:
        own = list(options.param_names)
        if len(own) != len(keys):
            raise ValueError(f"{len(own)} parameter names were given, and the optimizer's state of {where} has {len(keys)} parameters")
    elif all(isinstance(key, str) for key in keys):
        own = keys
    elif all(len(group.get("param_names") or ()) == len(group["params"]) for group in groups):
        own = [name for group in groups for name in group["param_names"]]
    else:
        own = _names_in_order(optimizer, keys, tensors, where)
    is_in_ddp = bool(own) and all(name.startswith("module.") for name in own)
    name_of = {key: names.get(name, without_wrappers(name, is_in_ddp=is_in_ddp)) for key, name in zip(keys, own, strict=True)}
    missing = [name for name in name_of.values() if tensors and name not in tensors]
    if missing:
        raise ValueError(f"{where}: the optimizer has a parameter {missing[0]!r}, and the model has not ({len(missing)} such)")
    if len(set(name_of.values())) != len(name_of):
        raise ValueError(f"{where}: two parameters of the optimizer have one name")
    return name_of


def _names_in_order(optimizer: StateDict, keys: list[Any], tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """Return the model's names for an optimizer's numbered parameters.

    Raises:
        ValueError: it is not certain that they are all of the model's tensors in order: two of one shape might be swapped.
    """
    remedy = (
        "give the names, in the order of the optimizer's parameters, with --names (param_names=), or save the state of an optimizer that "
        "was built with named_parameters()"
    )
    if len(optimizer["param_groups"]) > 1:
        raise ValueError(f"{where} numbers the parameters of {len(optimizer['param_groups'])} param groups without names; {remedy}")
    if len(keys) != len(tensors):
        raise ValueError(
            f"{where} numbers {len(keys)} parameters of the optimizer without names, and its model has {len(tensors)} tensors; {remedy}"
        )
    for key, (name, tensor) in zip(keys, tensors.items(), strict=True):
        for kind, value in optimizer["state"].get(key, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != tensor.shape:
                raise ValueError(
                    f"{where} numbers parameters without names, and not in the model's order: {kind} of number {key} has shape "
                    f"{tuple(value.shape)}, {name!r} {tuple(tensor.shape)}; {remedy}"
                )
    return list(tensors)
