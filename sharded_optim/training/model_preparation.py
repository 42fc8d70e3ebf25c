"""Prepare a model before its optimizer is built: param groups for weight decay, and low precision (as in optimi)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sharded_optim.sharding import used_wrappers

__all__ = ["param_groups_weight_decay", "to_low_precision"]


def param_groups_weight_decay(
    model: nn.Module, weight_decay: float = 1e-2, additional_layers: Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """Group a model's trainable parameters: no weight decay for biases, norms and named layers, weight decay for the rest.

    Args:
        model: ordinary or sharded; the number of dimensions is that of the whole tensor.
        weight_decay: the weight decay of the second group.
        additional_layers: a string, or several; a parameter whose name contains one of them does not decay.

    Returns:
        First the group without decay: parameters with less than two dimensions, named `*.bias`, or matching `additional_layers`. Then the
        group with decay. Each has the names of its parameters as `param_names`. An empty group is left out.

    Raises:
        ValueError: a wrapper (FSDP1) has flattened together parameters that belong to different groups.
    """
    exempt = (additional_layers,) if isinstance(additional_layers, str) else tuple(additional_layers or ())

    def decays(name: str, dimensions: int) -> bool:
        return dimensions > 1 and not name.endswith(".bias") and not any(part in name for part in exempt)

    flattened = {param: (each.name, tensors) for each in used_wrappers() for param, tensors in each.flattened(model).items()}
    decaying: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        wrapper, tensors = flattened.get(param, ("", [(name, param.shape)]))
        decay = [decays(tensor, len(shape)) for tensor, shape in tensors]
        if any(decay) != all(decay):
            yes, no = tensors[decay.index(True)][0], tensors[decay.index(False)][0]
            raise ValueError(
                f"{yes!r} decays and {no!r} does not, but {wrapper} has flattened them into one parameter, {name!r}; "
                f"wrap with use_orig_params=True, or wrap them in different units"
            )
        (decaying if any(decay) else others).append((name, param))
    return [
        {"params": [param for _, param in rows], "param_names": [name for name, _ in rows], "weight_decay": decay}
        for rows, decay in ((others, 0.0), (decaying, weight_decay))
        if rows
    ]


ModuleTypes = type[nn.Module] | Iterable[type[nn.Module]] | None
NamesOrTypes = str | type[nn.Module] | Iterable[str | type[nn.Module]] | None


def to_low_precision(
    model: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    fp32_modules: ModuleTypes = nn.Embedding,
    fp32_buffers: NamesOrTypes = ("rope", "rotary"),
) -> nn.Module:
    """Cast a model's floating-point parameters and buffers to `dtype`, except those that need float32. In place, before any wrapper.

    Args:
        model: its parameters stay the same objects, so that optimizers and tied weights stay valid.
        dtype: torch.bfloat16 or torch.float16. The optimizer option `kahan_sum` compensates the rounding of such parameters.
        device: where to move everything; None leaves it where it is.
        fp32_modules: modules of these types keep parameters and buffers in float32. A parameter that several modules share keeps float32
            if one of them is of these types.
        fp32_buffers: modules whose qualified name contains one of these strings (in any case), or of these types, keep their buffers in
            float32.

    Returns:
        `model`.

    Raises:
        ValueError: `dtype` is not floating-point.
        TypeError: an entry of `fp32_modules` or `fp32_buffers` has another type.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one, such as torch.bfloat16 or torch.float16, got {dtype}")
    types = _module_types(fp32_modules)
    names, buffer_types = _names_and_types(fp32_buffers)
    keeps_buffers = {
        module
        for qualified_name, module in model.named_modules(remove_duplicate=False)  # a shared module has several names
        if isinstance(module, types + buffer_types) or any(name in qualified_name.lower() for name in names)
    }
    params: dict[nn.Parameter, torch.dtype] = {}
    buffers: dict[tuple[torch.Tensor, torch.dtype | None], torch.Tensor] = {}  # cast buffers, so that a shared buffer stays shared
    for module in model.modules():
        for param in module.parameters(recurse=False):
            keeps = isinstance(module, types) or params.get(param) == torch.float32
            params[param] = torch.float32 if keeps else dtype
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            cast = (torch.float32 if module in keeps_buffers else dtype) if buffer.is_floating_point() else None
            key = (buffer, cast)
            if key not in buffers:
                buffers[key] = buffer.to(device=device, dtype=cast)
            setattr(module, name, buffers[key])
    for param, param_dtype in params.items():
        cast = param_dtype if param.is_floating_point() else None
        grad, param.grad = param.grad, None
        param.data = param.data.to(device=device, dtype=cast)
        param.grad = None if grad is None else grad.to(device=device, dtype=cast)
    return model


def _module_types(given: ModuleTypes) -> tuple[type[nn.Module], ...]:
    types = () if given is None else (given,) if isinstance(given, type) else tuple(given)
    for module_type in types:
        if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
            raise TypeError(f"fp32_modules must hold subclasses of torch.nn.Module, got {module_type!r}")
    return types


def _names_and_types(given: NamesOrTypes) -> tuple[tuple[str, ...], tuple[type[nn.Module], ...]]:
    found = () if given is None else (given,) if isinstance(given, str | type) else tuple(given)
    names = tuple(each.lower() for each in found if isinstance(each, str))
    types = tuple(each for each in found if isinstance(each, type) and issubclass(each, nn.Module))
    if len(names) + len(types) != len(found):
        raise TypeError(f"fp32_buffers must hold strings and subclasses of torch.nn.Module, got {given!r}")
    return names, types
