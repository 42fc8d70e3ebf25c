"""What a DeepSpeedEngine holds: the model's parameters, replicated or, in stage 3, partitioned; and what its base optimizer steps.

Attributes of DeepSpeed's that are no public interface, tried with 0.19.0 to 0.19.8: a parameter's `ds_tensor`, `ds_shape`, `ds_numel`,
`ds_status`, `partition_numel` and `ds_process_group`, the engine's counters, the fields of its loss scaler, and of stage 3's wrapper
`fp32_partitioned_groups_flat` and `sub_group_to_group_id`.
"""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist

from sharded_optim.checkpoint.held import MASTER, MODEL, Held
from sharded_optim.checkpoint.live.model import LiveModel, aliases_of, buffers_of, held_of
from sharded_optim.checkpoint.live.optimizer import LiveOptimizer, Member, group_of
from sharded_optim.sharding import deepspeed as sharding
from sharded_optim.sharding.segment import Segment
from sharded_optim.step.engine import Engine
from sharded_optim.step.param_groups import named_params

__all__ = ["live_model", "live_optimizer"]

NAME = "deepspeed"
COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of dynamic loss scaling


def live_model(engine: Any) -> LiveModel:
    """As `live.live_model`."""
    names = sharding.parameter_names(engine)
    partitioned: list[Any] = [param for param in names if hasattr(param, "ds_id")]
    held = [_partition(param, name) if hasattr(param, "ds_id") else held_of(param, name) for param, name in names.items()]
    buffers = buffers_of(engine.module)
    held += [held_of(buffer, name, is_buffer=True) for name, buffer in buffers.items()]
    aliases = aliases_of(engine.module, names, buffers)

    def prepare() -> None:
        gathered = [param for param in partitioned if param.ds_status.name == "AVAILABLE"]
        if gathered:  # whole copies, which DeepSpeed keeps of small ones, and makes anew
            gathered[0].partition(gathered)

    def resume(saved: dict[str, Any]) -> None:
        for counter in COUNTERS:
            setattr(engine, counter, saved[counter])
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        for field, value in saved["loss_scaler"].items():
            if hasattr(scaler, field):
                setattr(scaler, field, value)

    def masters() -> list[Held]:
        optimizer = engine.basic_optimizer
        if optimizer is None or engine.optimizer is optimizer:
            return []
        if not isinstance(optimizer, Engine):
            raise ValueError(
                "DeepSpeed steps masters of the parameters, which would undo what is loaded, and its base optimizer, "
                f"{sharding.qualified_name(optimizer)}, does not tell which they are; use one of this library"
            )
        members = live_optimizer(engine, optimizer, LiveModel(names=names)).members
        return [held for member in members if member.is_master for held in member.held(MASTER, member.param)]

    scaler = getattr(engine.optimizer, "loss_scaler", None)
    told = {counter: getattr(engine, counter) for counter in COUNTERS}
    told["loss_scaler"] = {field: getattr(scaler, field) for field in SCALER if hasattr(scaler, field)}
    order = list(names.values())
    return LiveModel(
        held=held,
        names=names,
        aliases=aliases,
        order=order,
        wrapper={NAME: told},
        masters=masters,
        prepare=prepare,
        check=check,
        resume=resume,
    )


def check(saved: Any) -> None:
    """Raise ValueError unless counters are counts, and the numbers of the loss scaler finite."""
    for counter in COUNTERS:
        count = saved.get(counter) if isinstance(saved, dict) else None
        if type(count) is not int or count < 0:
            raise ValueError(f"DeepSpeed's {counter} is {count!r}; it must be a whole number >= 0")
    scaler = saved.get("loss_scaler")
    if not isinstance(scaler, dict):
        raise ValueError(f"the state of DeepSpeed's loss scaler is {scaler!r}")
    for name, value in scaler.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name} of DeepSpeed's loss scaler is {value!r}; it must be a finite number")


def _partition(param: Any, name: str) -> Held:
    """What this rank has of a parameter that stage 3 has partitioned: equal parts, with padding."""
    size, numel = param.partition_numel(), param.ds_numel
    start = min(dist.get_rank(param.ds_process_group) * size, numel)
    length = min(size, numel - start)
    return Held(kind=MODEL, segment=Segment.flat(name, param.ds_shape, start, length), local=param.ds_tensor.flatten()[:length])


def live_optimizer(engine: Any, optimizer: Engine, model: LiveModel) -> LiveOptimizer:
    """As `live.live_optimizer`.

    Raises:
        ValueError: the optimizer is not the engine's, or was not attached to it.
    """
    if engine.basic_optimizer is not optimizer:
        raise ValueError("the optimizer is not the one that the DeepSpeed engine steps; pass what so.deepspeed.initialize returned")
    if optimizer.layout is None:
        raise ValueError("the optimizer does not know DeepSpeed's partitions; call so.deepspeed.attach(engine) after initialize")
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # stage 3, whose param groups are empty between steps
        indices = [wrapper.sub_group_to_group_id[number] for number in range(len(wrapper.fp32_partitioned_groups_flat))]
        params = list(zip(wrapper.fp32_partitioned_groups_flat, indices, strict=True))
    else:
        params = [(param, index) for index, group in enumerate(optimizer.param_groups) for param, _ in named_params(group, index)]
    members = [
        Member(
            param=param,
            group=index,
            local=optimizer.describe_param(param, "a flat partition", optimizer.param_groups[index]),
            is_master=param not in model.names,
        )
        for param, index in params
    ]
    return LiveOptimizer(engine=optimizer, members=members, groups=optimizer.param_groups, group_of=group_of(members), order=model.order)
