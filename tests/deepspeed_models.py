"""Engines of DeepSpeed on gloo ranks, on a model with given gradients, and what they hold as whole tensors.

Whole tensors are put together from what DeepSpeed's own flat buffers say, not from the layout under test. Its `safe_get_full_fp32_param` is
used for stage 3 alone: it is wrong with `round_robin_gradients`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.given_gradients import Model, Outcome, Shapes, gradients

NEEDS_DEEPSPEED = (
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed (the extra `deepspeed`)"),
    pytest.mark.timeout(400),  # the first test may have to wait for DeepSpeed's extension
)
AWKWARD: Shapes = (((7, 3), (7,)), ((1,),), ((5,),), ((33, 17), (33,)), ((3, 5, 2),), ((64, 41), (64,)))


def run(check: Callable[..., None], world_size: int, *args: Any, timeout: float = 100.0) -> None:
    """`ranks.run`, in the environment that DeepSpeed wants."""
    from launch.deepspeed_extension import build

    build()
    ranks.run(_check, world_size, check, args, timeout=timeout)


def _check(check: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="weight_decay")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # fast it is not
    check(*args)


def config_of(stage: int, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    """A DeepSpeed config; options of ZeRO, or of the whole where `top` says so."""
    top = options.pop("top", {})
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage, **options}}
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    if dtype == torch.float16:  # scaled by a power of two, gradients stay exact
        config["fp16"] = {"enabled": True, "initial_scale_power": 2}
    return config | top


def train(engine: Any, first: int, last: int, shapes: Shapes = AWKWARD, micro_batches: int = 1) -> None:
    """Steps `first` to `last`, both included, counted from 1."""
    for step in range(first, last + 1):
        for _ in range(micro_batches):
            engine.backward(engine(gradients(step, shapes, rank=dist.get_rank(), world_size=dist.get_world_size())))
            engine.step()


def gathered(engine: Any, part_of: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """Of every parameter of stages 1 and 2 the whole tensor whose parts lie like the masters'. A collective.

    Args:
        part_of: what this rank has of it, given its flat partition of masters; None where there is nothing to gather.
    """
    wrapper = engine.optimizer
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        columns = (wrapper.single_partition_of_fp32_groups, wrapper.bit16_groups_flat, wrapper.bit16_groups)
    else:
        columns = (wrapper.fp32_groups_flat_partition, wrapper.bf16_groups_flat, wrapper.bf16_groups)
    found = {}
    for master, flat, params, process_group in zip(*columns, wrapper.real_dp_process_group, strict=True):
        part = part_of(master)
        if part is None:
            continue
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(process_group))]
        dist.all_gather(parts, part, group=process_group)
        for param in params:
            start = (param.data_ptr() - flat.data_ptr()) // flat.element_size()
            found[engine.param_names[param]] = torch.cat(parts)[start : start + param.numel()].view(param.shape)
    return found


def whole(engine: Any, key: str | None = None, having: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The master weights, or that entry of the state, of every parameter that should have it: in its shape. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    wrapper, state, names = engine.optimizer, engine.basic_optimizer.state, engine.param_names
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        read = safe_get_full_fp32_param if key is None else partial(safe_get_full_optimizer_state, optim_state_key=key)
        return {name: read(param).detach().view(param.ds_shape) for param, name in names.items() if param.requires_grad and having(name)}
    if hasattr(wrapper, "real_dp_process_group"):
        return gathered(engine, lambda master: master.detach() if key is None else state[master].get(key))
    if hasattr(wrapper, "fp32_groups"):
        columns = map(chain.from_iterable, (wrapper.fp16_groups, wrapper.fp32_groups))
        masters = {names[param]: master for param, master in zip(*columns, strict=True)}
    else:
        masters = {name: param for param, name in names.items()}
    found = {name: master.detach() if key is None else state[master].get(key) for name, master in masters.items()}
    return {name: value.clone() for name, value in found.items() if value is not None}


def assert_equal(engine: Any, expected: Outcome, where: str) -> None:
    """Parameters, state and step counters are those of the unsharded optimizer, bit for bit. A collective."""
    for name, value in whole(engine).items():
        assert torch.equal(value, expected.params[name]), f"{where}: {name}, by {(value - expected.params[name]).abs().max()}"
    for key in sorted({key for state in expected.state.values() for key in state} - {"step"}):
        found = whole(engine, key, lambda name: key in expected.state[name])  # noqa: B023
        assert found.keys() == {name for name, state in expected.state.items() if key in state}, f"{where}: {key} of {sorted(found)}"
        for name, value in found.items():
            assert torch.equal(value, expected.state[name][key]), f"{where}: {key} of {name}"
    steps = {float(state["step"]) for state in engine.basic_optimizer.state.values()}
    assert steps == {float(next(iter(expected.state.values()))["step"])}, f"{where}: {steps}"


def model(shapes: Shapes = AWKWARD) -> Model:
    return Model(shapes)
