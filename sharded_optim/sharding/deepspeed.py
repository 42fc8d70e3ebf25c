"""DeepSpeed: it gives optimizers flat partitions of fp32 master weights, one per param group, in stage 3 one per sub-group; in stage 0 the
parameters, or an fp32 copy of each.

Attributes of DeepSpeed's optimizer wrappers record which elements of which tensors a partition holds; each wrapper has a function here that
reads them. They are not a public interface, so the values of the partitions are compared with the model's parameters. `_hp_mapping` and
`_param_slice_mappings` are not used, because they are wrong with `round_robin_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_optim.sharding import plain
from sharded_optim.sharding.flat import FlatLayout, FlatTensor, piece_in_range
from sharded_optim.sharding.layout import LocalParam, Piece
from sharded_optim.sharding.segment import Segment
from sharded_optim.sharding.wrappers import Tensors, Wrapper

__all__ = ["EXPERTS", "OPTIMIZER_WRAPPERS", "WRAPPER", "layout_of", "parameter_names", "qualified_name"]

UNKNOWN_PARAM = (
    "is not one that DeepSpeed had given the optimizer when so.deepspeed.attach(engine) was called; DeepSpeed takes no parameters later, "
    "so give all of them to initialize, or call attach again if it has replaced them"
)
EXPERTS = ".deepspeed_experts."  # in a parameter's name, before the index of an expert among those of this rank

Names = dict[Tensor, str]  # names of the model's parameters
Flat = tuple[Tensor, FlatTensor]


def layout_of(engine: Any) -> FlatLayout:
    """Return the layout of a DeepSpeedEngine's model on this rank.

    Raises:
        ValueError: the partitions do not have the values of their parameters.
        KeyError, AttributeError: this version of DeepSpeed has other attributes or wrappers.
    """
    names = parameter_names(engine)
    read = _stage_0 if engine.optimizer is engine.basic_optimizer else OPTIMIZER_WRAPPERS[qualified_name(engine.optimizer)]
    whole, flat = read(engine.optimizer, names)
    return FlatLayout(flat=dict(flat), whole=whole, unknown_param_error=UNKNOWN_PARAM, steps_by_group=True)


def qualified_name(value: object) -> str:
    """Return the module and name of the type of an object."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _stage_0(wrapper: Any, names: Names) -> tuple[Names, Iterator[Flat]]:
    """Read the layout of stage 0, where the base optimizer steps the model's parameters themselves."""
    return {param: names[param] for group in wrapper.param_groups for param in group["params"]}, iter(())


def _stage_0_bf16(wrapper: Any, names: Names) -> tuple[Names, Iterator[Flat]]:
    """Read the layout of FP16_UnfusedOptimizer, which has an fp32 copy of each parameter."""
    pairs = [pair for groups in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True) for pair in zip(*groups, strict=True)]
    for param, copy in pairs:
        _check_values(names[param], copy, param)
    return {copy: names[param] for param, copy in pairs}, iter(())


def _stages_1_and_2(wrapper: Any, names: Names) -> tuple[Names, Iterator[Flat]]:
    """Read the layout of DeepSpeedZeroOptimizer: one partition per param group."""
    columns = (wrapper.bit16_groups, wrapper.bit16_groups_flat, wrapper.single_partition_of_fp32_groups, wrapper.real_dp_process_group)
    return {}, (_partition(names, *row) for row in zip(*columns, strict=True))


def _stage_1_bf16(wrapper: Any, names: Names) -> tuple[Names, Iterator[Flat]]:
    """Read the layout of BF16_Optimizer: one partition per param group."""
    columns = (wrapper.bf16_groups, wrapper.bf16_groups_flat, wrapper.fp32_groups_flat_partition, wrapper.real_dp_process_group)
    return {}, (_partition(names, *row) for row in zip(*columns, strict=True))


def _partition(names: Names, params: list[Tensor], flat: Tensor, master: Tensor, group: dist.ProcessGroup) -> Flat:
    """Describe `master`, this rank's partition of a group. The group's parameters are views of `flat`, which is cut into equal partitions.

    Order and padding in `flat` depend on `round_robin_gradients` and `parameter_alignment`, so positions are read from addresses.
    """
    size = master.numel()
    if size * dist.get_world_size(group) != flat.numel():
        raise ValueError(f"DeepSpeed's partition has {size} elements, of {flat.numel()} over {dist.get_world_size(group)} ranks")
    start = dist.get_rank(group) * size
    partition = flat[start : start + size]
    pieces = []
    for param in sorted(params, key=Tensor.data_ptr):
        offset = (param.data_ptr() - flat.data_ptr()) // flat.element_size() if param.numel() else 0
        if not 0 <= offset <= flat.numel() - param.numel() or not param.is_contiguous():
            raise ValueError(f"parameter {names[param]!r} does not lie in the flat tensor of DeepSpeed's optimizer wrapper")
        piece = piece_in_range(names[param], param.shape, offset, start, size)
        _check_values(names[param], piece.of(master), piece.of(partition))
        pieces.append(piece)
    return master, FlatTensor.holding(size, pieces)


def _stage_3(wrapper: Any, names: Names) -> tuple[Names, Iterator[Flat]]:
    """Read the layout of DeepSpeedZeroOptimizer_Stage3: each parameter is padded and cut into equal parts; a sub-group is this rank's parts
    of its parameters, end to end.
    """
    return {}, (
        _sub_group(names, params, master) for params, master in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True)
    )


def _sub_group(names: Names, params: list[Any], master: Tensor) -> Flat:
    pieces = []
    offset = 0
    for param in params:
        size, numel = param.partition_numel(), param.ds_numel
        start = min(dist.get_rank(param.ds_process_group) * size, numel)
        length = min(size, numel - start)
        piece = Piece(segment=Segment.flat(names[param], param.ds_shape, start, length), offset=offset)
        _check_values(names[param], piece.of(master), param.ds_tensor.flatten()[:length])
        pieces.append(piece)
        offset += size
    if offset != master.numel():
        raise ValueError(f"DeepSpeed's sub-group has {master.numel()} elements, its parameters {offset}")
    return master, FlatTensor.holding(offset, pieces)


def _check_values(name: str, master: Tensor, param: Tensor) -> None:
    if not torch.equal(master.detach().to(param.device, param.dtype), param.detach()):
        raise ValueError(f"the master weights that DeepSpeed's optimizer wrapper says are those of {name!r} have other values than it")


# By the qualified class name of DeepSpeed's optimizer wrapper: exact, as subclasses may have another layout.
OPTIMIZER_WRAPPERS: dict[str, Callable[[Any, Names], tuple[Names, Iterator[Flat]]]] = {
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": _stage_0_bf16,
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": _stages_1_and_2,
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": _stage_1_bf16,
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": _stage_3,
}


# -------------------------------------------------------------------------------------------------------------------------- names


class _Names(dict[Tensor, str]):
    def __missing__(self, param: Tensor) -> str:
        raise ValueError(f"a parameter of shape {tuple(param.shape)} is not the model's; DeepSpeed steps those of its model alone")


def parameter_names(engine: Any) -> Names:
    """Return the model's parameter names, with experts numbered over all ranks. DeepSpeed numbers them from 0 on each rank."""
    names = _Names()
    for param, name in engine.param_names.items():
        owner, mark, rest = name.partition(EXPERTS)
        names[param] = _expert_name(engine.module.get_submodule(owner), owner, rest, param) if mark else name
    return names


def _expert_name(experts: Any, owner: str, rest: str, param: Any) -> str:
    from deepspeed.utils import groups

    number, _, rest = rest.partition(".")
    rank = dist.get_rank(groups._get_expert_parallel_group(param.group_name))
    return f"{owner}{EXPERTS}{rank * len(experts.deepspeed_experts) + int(number)}.{rest}"


# ------------------------------------------------------------------------------------------------------------------------- module


def _is_partitioned(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_shape")  # set by stage 3 (deepspeed.zero.Init or the engine) on parameters only; masters too have a ds_id


def _describe_partitioned(param: Any, name: str) -> LocalParam:
    """Describe a partitioned parameter as an empty piece of its tensor; the engine will replace it by masters in the optimizer."""
    nothing = Piece(segment=Segment.flat(name, param.ds_shape, 0, 0))
    return replace(plain.describe(param, name), pieces=(nothing,))


def _partitioned(model: nn.Module) -> dict[Tensor, Tensors]:
    """Return name and whole shape of each parameter that stage 3 has partitioned: between uses the parameter itself is an empty tensor."""
    named: Iterator[tuple[str, Any]] = model.named_parameters()
    return {param: [(name, tuple(param.ds_shape))] for name, param in named if _is_partitioned(param)}


def _refuse_partitioned(module: nn.Module, names: Mapping[Tensor, str]) -> None:
    for param, name in names.items():
        if _is_partitioned(param):
            raise ValueError(f"{name!r} is partitioned by DeepSpeed; pass the engine as model=, not its module")


WRAPPER = Wrapper(
    name="DeepSpeed's ZeRO stage 3",
    claims=_is_partitioned,
    describe=_describe_partitioned,
    flattened=_partitioned,
    content=_refuse_partitioned,
)
