"""Adapter of a DeepSpeedEngine: the model's parameters, partitioned in stage 3 and replicated otherwise, and its base optimizer.

Uses attributes of DeepSpeed that are not public, tried with 0.19.0 to 0.19.8: of parameters `ds_tensor`, `ds_shape`, `ds_numel`,
`ds_status`, `partition_numel` and `ds_process_group`; of the engine its counters; the fields of its loss scaler; of stage 3's optimizer
`fp32_partitioned_groups_flat` and `sub_group_to_group_id`.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch.distributed as dist

from sharded_optim.checkpoint.live.adapters import Adapter
from sharded_optim.checkpoint.live.model import LiveModel, named_tensors, plain_tensor
from sharded_optim.checkpoint.live.optimizer import LiveOptimizer, LiveParam, group_of
from sharded_optim.checkpoint.local_tensor import MASTER, MODEL, LocalTensor
from sharded_optim.sharding import deepspeed as sharding
from sharded_optim.sharding.segment import Segment
from sharded_optim.step.engine import Engine
from sharded_optim.step.param_groups import named_params

__all__ = ["ADAPTER", "check_state"]

NAME = "deepspeed"
COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # fields of a dynamic loss scaler


def _is_engine(model: Any) -> bool:
    """Return whether a model is a DeepSpeedEngine, without importing DeepSpeed."""
    module = sys.modules.get("deepspeed.runtime.engine")
    return module is not None and isinstance(model, module.DeepSpeedEngine)


def live_model(engine: Any) -> LiveModel | None:
    """Describe a DeepSpeedEngine's model; None for any other model, which `LiveModel.of` describes."""
    if not _is_engine(engine):
        return None
    names = sharding.parameter_names(engine)
    partitioned: list[Any] = [param for param in names if hasattr(param, "ds_id")]
    tensors = [_partition(param, name) if hasattr(param, "ds_id") else plain_tensor(param, name) for param, name in names.items()]
    _, aliases, buffers = named_tensors(engine.module, names)

    def before_load() -> None:
        gathered = [param for param in partitioned if param.ds_status.name == "AVAILABLE"]
        if gathered:  # free DeepSpeed's whole copies of small parameters, which loading does not update: it gathers them again
            gathered[0].partition(gathered)

    return LiveModel(
        tensors=tensors + buffers,
        names=names,
        aliases=aliases,
        order=list(names.values()),
        wrapper_state={NAME: _state(engine)},
        check_wrapper_state=check_state,
        restore_wrapper_state=lambda saved: _restore(engine, saved),
        masters=lambda: _masters(engine, names),
        before_load=before_load,
    )


def _partition(param: Any, name: str) -> LocalTensor:
    """Describe this rank's part of a parameter that stage 3 has partitioned into equal parts, with padding."""
    size, numel = param.partition_numel(), param.ds_numel
    start = min(dist.get_rank(param.ds_process_group) * size, numel)
    length = min(size, numel - start)
    return LocalTensor(kind=MODEL, segment=Segment.flat(name, param.ds_shape, start, length), local=param.ds_tensor.flatten()[:length])


def _masters(engine: Any, names: dict[Any, str]) -> list[LocalTensor]:
    """List the masters that DeepSpeed steps instead of the parameters; empty if it steps the parameters themselves."""
    optimizer = engine.basic_optimizer
    if optimizer is None or engine.optimizer is optimizer:
        return []
    if not isinstance(optimizer, Engine):
        raise ValueError(
            "DeepSpeed steps masters of the parameters, which would overwrite what is loaded, and its base optimizer, "
            f"{sharding.qualified_name(optimizer)}, does not describe them; use one of this library"
        )
    state = live_optimizer(optimizer, engine, LiveModel(names=names))
    assert state is not None
    return [tensor for param in state.params if param.is_master for tensor in param.tensors(MASTER, param.param)]


def _state(engine: Any) -> dict[str, Any]:
    """Return the engine's counters and the state of its loss scaler."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    counters = {counter: getattr(engine, counter) for counter in COUNTERS}
    return counters | {"loss_scaler": {field: getattr(scaler, field) for field in SCALER if hasattr(scaler, field)}}


def check_state(saved: Any) -> None:
    """Raise ValueError unless saved counters are whole numbers >= 0, and the values of the loss scaler finite."""
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


def _restore(engine: Any, saved: dict[str, Any]) -> None:
    for counter in COUNTERS:
        setattr(engine, counter, saved[counter])
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for field, value in saved["loss_scaler"].items():
        if hasattr(scaler, field):
            setattr(scaler, field, value)


def live_optimizer(optimizer: Any, engine: Any, live: LiveModel) -> LiveOptimizer | None:
    """Describe the base optimizer of a DeepSpeedEngine; None for any other optimizer, which `LiveOptimizer.of` describes.

    Raises:
        ValueError: the optimizer is not the engine's, or was not attached to it.
    """
    if not (_is_engine(engine) and isinstance(optimizer, Engine)):
        return None
    if engine.basic_optimizer is not optimizer:
        raise ValueError("the optimizer is not the one that the DeepSpeed engine steps; pass what so.deepspeed.initialize returned")
    if optimizer.layout is None:
        raise ValueError("the optimizer does not know DeepSpeed's partitions; call so.deepspeed.attach(engine) after initialize")
    wrapper: Any = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # stage 3, whose param groups are empty between steps
        flat = wrapper.fp32_partitioned_groups_flat
        indices = [(param, wrapper.sub_group_to_group_id[number]) for number, param in enumerate(flat)]
    else:
        indices = [(param, index) for index, group in enumerate(optimizer.param_groups) for param, _ in named_params(group, index)]
    params = [
        LiveParam(
            param=param,
            group=index,
            local=optimizer.describe_param(param, "a flat partition", optimizer.param_groups[index]),
            is_master=param not in live.names,
        )
        for param, index in indices
    ]
    return LiveOptimizer(engine=optimizer, params=params, groups=optimizer.param_groups, group_of=group_of(params), order=live.order)


ADAPTER = Adapter(model=live_model, optimizer=live_optimizer)
