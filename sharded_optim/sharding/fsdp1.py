"""FullyShardedDataParallel (FSDP1): units of parameters that are flattened together and cut into equal ranges.

With `use_orig_params=True` an optimizer gets, for each parameter, a 1-D view of its elements in this rank's range, which is empty on most
ranks; with False, the flat parameter of each unit. FSDP1 records which elements these are in private attributes, tried with torch 2.11 and
2.13 and guarded by a test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import clean_tensor_name

from sharded_optim.sharding.ddp import objects_of
from sharded_optim.sharding.flat import FlatLayout, FlatTensor
from sharded_optim.sharding.layout import Piece
from sharded_optim.sharding.segment import Segment
from sharded_optim.sharding.wrappers import FlatModel, Tensors, Wrapper

__all__ = ["WRAPPER", "check_state_is_alike", "check_whole_state_on_cpu", "layout_of"]

UNKNOWN_PARAM = (
    "is not one of the FullyShardedDataParallel model that layout= was made from; build the optimizer from model.parameters() after "
    "wrapping. Parameters that were flattened together with use_orig_params=False are one parameter of one group: for groups that cut "
    "through a unit, wrap with use_orig_params=True"
)


def layout_of(model: nn.Module) -> FlatLayout:
    """Return the layout of a model; see `sharded_optim.fsdp1_layout`."""
    flat: dict[Tensor, FlatTensor] = {}
    for prefix, handle in _handles(model):
        flat_param = handle.flat_param
        segments = list(_segments(prefix, flat_param))
        if flat_param._params is None:
            rows = zip(segments, flat_param._shard_param_infos, strict=True)
            pieces = [Piece(segment=segment, offset=info.offset_in_shard or 0) for segment, info in rows]
            flat[flat_param] = FlatTensor.holding(flat_param._sharded_size.numel(), pieces)
        else:
            for param, segment in zip(flat_param._params, segments, strict=True):
                flat[param] = FlatTensor.holding(segment.numel, [Piece(segment=segment)])
    if not flat:
        raise ValueError(
            "the model has no parameters that FullyShardedDataParallel has flattened; wrap it first, and leave layout out under other "
            "wrappers"
        )
    whole: dict[Tensor, str] = {param: clean_tensor_name(name) for name, param in model.named_parameters() if param not in flat}
    return FlatLayout(flat=flat, whole=whole, unknown_param_error=UNKNOWN_PARAM)


def _flattened(model: nn.Module) -> dict[Tensor, Tensors]:
    """Return names and shapes of the tensors in each of the model's flattened parameters, also of tensors without elements on this rank.

    Empty if FSDP1 has flattened nothing.
    """
    found: dict[Tensor, Tensors] = {}
    for prefix, handle in _handles(model):
        flat_param = handle.flat_param
        tensors = [(prefix + name, tuple(shape)) for name, shape in zip(flat_param._fqns, flat_param._shapes, strict=True)]
        if flat_param._params is None:
            found[flat_param] = tensors
        else:
            found |= {param: [tensor] for param, tensor in zip(flat_param._params, tensors, strict=True)}
    return found


def _aliases(model: nn.Module) -> dict[str, str]:
    """Return the further names of tensors that modules share; see `FlatModel.aliases`."""
    found: dict[str, str] = {}
    for prefix, handle in _handles(model):
        for info in handle.flat_param._shared_param_infos:
            name, first = f"{info.module_name}.{info.param_name}", f"{info.prim_module_name}.{info.prim_param_name}"
            found[prefix + clean_tensor_name(name).removeprefix(".")] = prefix + clean_tensor_name(first).removeprefix(".")
    return found


def check_whole_state_on_cpu(model: nn.Module, keys: Sequence[str]) -> None:
    """Raise ValueError if torch would return, for every key of whole optimizer state, the values of the last key.

    With `use_orig_params=True` torch 2.13 gathers one key after the other into the same memory, and takes the result from there with
    `.cpu()`, which does not copy on a CPU. On other devices, and with `use_orig_params=False`, whole state is right.
    """
    for prefix, handle in _gathered_handles(model):
        if len(keys) > 1 and handle.device.type == "cpu":
            raise ValueError(
                f"whole optimizer state of {prefix + handle.flat_param._fqns[0]!r} and others under FullyShardedDataParallel with "
                f"use_orig_params=True would be wrong: torch gives {' and '.join(map(repr, keys[:-1]))} the values of {keys[-1]!r} when it "
                f"offloads whole state that is on a CPU. It need not offload it: ask get_optimizer_state_dict with cpu_offload=False, or "
                f"FullyShardedDataParallel.optim_state_dict with FullOptimStateDictConfig(offload_to_cpu=False); sharded state is right too"
            )


def check_state_is_alike(model: nn.Module, keys: Mapping[Tensor, Sequence[str]]) -> None:
    """Raise ValueError if the parameters of a unit have different state, which torch cannot gather: it assumes the same keys for all.

    Args:
        keys: the keys of each parameter's state.
    """
    for prefix, handle in _gathered_handles(model):
        known = [
            (name, keys[param]) for name, param in zip(handle.flat_param._fqns, handle.flat_param._params, strict=True) if param in keys
        ]
        others = [(name, of_param) for name, of_param in known if of_param != known[0][1]]
        if others:
            (first, of_first), (other, of_other) = known[0], others[0]
            raise ValueError(
                f"torch cannot gather the optimizer's state of a unit of FullyShardedDataParallel whose parameters have different state: "
                f"{prefix + first!r} has {' and '.join(of_first)}, {prefix + other!r} {' and '.join(of_other)}. Save with so.checkpoint; "
                f"or wrap so that what one algorithm steps is in units of its own; or shard the model with fully_shard (FSDP2)"
            )


def _gathered_handles(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the `_handles` of units whose state torch gathers parameter by parameter: sharded ones with use_orig_params=True."""
    for prefix, handle in _handles(model):
        if handle.uses_sharded_strategy and handle.world_size > 1 and handle.flat_param._params is not None:
            yield prefix, handle


def _handles(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield each unit's name prefix, and FSDP1's handle of the unit."""
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            name = clean_tensor_name(f"{name}.")
            yield name.removeprefix("."), module._handle


def _segments(prefix: str, flat_param: Any) -> Iterator[Segment]:
    """Yield, for each tensor of a unit, the segment in this rank's range; it may be empty."""
    columns = (flat_param._fqns, flat_param._shapes, flat_param._contiguities, flat_param._param_extensions, flat_param._shard_param_infos)
    for name, shape, contiguous, extension, info in zip(*columns, strict=True):
        if not contiguous:
            raise ValueError(
                f"parameter {prefix + name!r} of shape {tuple(shape)} was not contiguous, and FullyShardedDataParallel has flattened it in "
                f"the order of its memory; make it contiguous before wrapping: param.data = param.data.contiguous()"
            )
        if extension is not None:
            raise ValueError(
                f"parameter {prefix + name!r} is sharded by tensor parallelism inside FullyShardedDataParallel, which is not supported; "
                f"wrap with fully_shard (FSDP2)"
            )
        start, numel = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (0, 0)
        yield Segment.flat(prefix + name, shape, start, numel)


def _content(model: nn.Module, names: Mapping[Tensor, str]) -> FlatModel | None:
    """Describe a model that FSDP1 has flattened; None for any other. See `Wrapper.content`."""
    flattened = _flattened(model)
    if not flattened:
        return None
    order = [name for tensors in flattened.values() for name, _ in tensors]
    return FlatModel(layout=layout_of(model), order=order, aliases=_aliases(model))


def _layout_holding(params: Sequence[Tensor]) -> FlatLayout | None:
    """Return the layout of the outermost FullyShardedDataParallel module that has all of these parameters.

    None if no outermost module has all of them, as when only parts of a model are wrapped: a part does not know its name in the model.
    """
    modules = objects_of(FullyShardedDataParallel)
    inner = {id(each) for module in modules for each in module.modules() if each is not module}
    wanted = set(map(id, params))
    for module in modules:
        if id(module) not in inner and wanted <= set(map(id, module.parameters())):
            return layout_of(module)
    return None


def _is_flattened(tensor: Tensor) -> bool:
    return getattr(tensor, "_fsdp_flattened", False)  # torch's mark


def _refuse(param: Tensor, name: str) -> NoReturn:
    raise ValueError(
        f"parameter {name!r} is sharded by FullyShardedDataParallel, and no one module of it holds all parameters of this optimizer: build "
        f"the optimizer with layout=so.fsdp1_layout(model), where model is what contains all wrapped parts. Where a framework has wrapped "
        f"the optimizer (Accelerate, Lightning), write so.unwrap_optimizer(optimizer).layout = so.fsdp1_layout(model) once the model is "
        f"wrapped. Or wrap it with fully_shard (FSDP2)"
    )


def _refuse_units(model: nn.Module) -> tuple[()]:
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "gradient release does not work with FullyShardedDataParallel (FSDP1), whose hooks see gradients before they are sharded; "
            "use fully_shard (FSDP2)"
        )
    return ()


WRAPPER = Wrapper(
    name="FullyShardedDataParallel",
    claims=_is_flattened,
    describe=_refuse,
    layout_holding=_layout_holding,
    flattened=_flattened,
    content=_content,
    units=_refuse_units,
)
