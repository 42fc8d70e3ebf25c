"""The first promise: given the same gradients, every sharding gives the same parameters and state, bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from sharded_models import AwkwardModel, ShardedModel
from torch import Tensor
from toy_optimizer import ThresholdAdamW

import sharded_optim as so

STEPS = 20
OPTIMIZERS = {
    "Adam-l2": partial(so.Adam, lr=1e-2, weight_decay=0.1),
    "Adam-decoupled": partial(so.Adam, lr=1e-2, weight_decay=1e-3, decouple_lr=True, max_lr=2e-2),
    "AdamW": partial(so.AdamW, lr=1e-2),
    "AdamW-skip-loop": partial(so.AdamW, lr=1e-2, nonfinite="skip", foreach=False),
    "AdamW-no-kahan": partial(so.AdamW, lr=1e-2, kahan_sum=False),
    "AdamW-stochastic": partial(so.AdamW, lr=1e-2, stochastic_rounding=True, rounding_seed=7),
    "AdamW-kahan-stochastic": partial(so.AdamW, lr=1e-2, kahan_sum=True, stochastic_rounding=True),
    "DecoupledAdamW": partial(so.DecoupledAdamW, lr=1e-2, weight_decay=1e-3),
    "DecoupledAdamW-amsgrad": partial(so.DecoupledAdamW, lr=1e-2, amsgrad=True, stochastic_rounding=True),
    "DecoupledSGDW": partial(so.DecoupledSGDW, lr=1e-2, weight_decay=1e-3),
    "DecoupledSGDW-momentum": partial(so.DecoupledSGDW, lr=1e-2, momentum=0.9, dampening=0.5, kahan_sum=False),
    "DecoupledSGDW-nesterov": partial(so.DecoupledSGDW, lr=1e-2, momentum=0.9, nesterov=True, state_dtype=torch.bfloat16),
    "StableAdamW": partial(so.StableAdamW, lr=1e-2),
    "StableAdamW-corrected": partial(so.StableAdamW, lr=1e-2, betas=(0.8, 0.999), decay_form="corrected"),
    "StableAdamW-bf16-moments": partial(so.StableAdamW, lr=1e-2, state_dtype=torch.bfloat16),
    "StableAdamW-stochastic-moments": partial(so.StableAdamW, lr=1e-2, state_dtype="bf16_stochastic"),
    "StableAdamW-cpu": partial(so.StableAdamW, lr=1e-2, backend="cpu"),
    "AdamW-cpu-stochastic": partial(so.AdamW, lr=1e-2, stochastic_rounding=True, backend="cpu"),
    "StableAdamW-stochastic": partial(so.StableAdamW, lr=1e-2, decouple_lr=True, stochastic_rounding=True),
    "ThresholdAdamW": partial(ThresholdAdamW, lr=1e-2, threshold=0.3),
}
LAYOUTS = {2: ["ddp", "fsdp2", "fsdp1"], 3: ["fsdp2"], 4: ["fsdp2", "hsdp", "fsdp2_tp"]}
DTYPES = [torch.float32, torch.bfloat16]
# With a statistic of the whole tensor, and with noise that each element has of its own: what depends on where a shard begins.
ALWAYS = {"StableAdamW", "AdamW-stochastic", "StableAdamW-stochastic-moments"}

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")


def start_values(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.shape, generator=generator).to(dtype) for name, p in AwkwardModel().named_parameters()}


def spiky_grads(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of a step: some steps x100 to x1e4, and one parameter without a gradient on some."""
    generator = torch.Generator().manual_seed(1000 + step)
    spike = 10 ** float(torch.empty(()).uniform_(2, 4, generator=generator)) if torch.rand((), generator=generator) < 0.3 else 1.0
    grads = {name: torch.randn(p.shape, generator=generator) * spike for name, p in AwkwardModel().named_parameters()}
    if step % 3 == 1:
        del grads["down.bias"]
    return {name: grad.to(dtype) for name, grad in grads.items()}


def param_groups(params: dict[str, torch.nn.Parameter]) -> list[dict]:
    """Two groups with different lr; matrices and the rest."""
    named = list(params.items())
    matrices = {name for name, param in AwkwardModel().named_parameters() if param.ndim >= 2}
    return [
        {"params": [(name, p) for name, p in named if name in matrices]},
        {"params": [(name, p) for name, p in named if name not in matrices], "lr": 3e-3, "weight_decay": 0.0},
    ]


def unsharded(make, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    params = {name: torch.nn.Parameter(value.clone()) for name, value in start_values(dtype).items()}
    optimizer = make(param_groups(params))
    for step in range(STEPS):
        grads = spiky_grads(step, dtype)
        for name, param in params.items():
            param.grad = grads.get(name)
        optimizer.step()
    return {name: {"param": param.detach(), **optimizer.state[param]} for name, param in params.items()}


def labels_of(wrapper: str, world_size: int, dtype: torch.dtype, everything: bool) -> list[str]:
    """Unless everything is asked for, each optimizer has each dtype under one of the wrappers on 2 ranks, and under one of those on 4."""
    offset = LAYOUTS[world_size].index(wrapper) + DTYPES.index(dtype)
    third = {label for index, label in enumerate(OPTIMIZERS) if (index + offset) % 3 == 0}
    return [label for label in OPTIMIZERS if everything or label in third | ALWAYS]


def check_ranks(wrappers: list[str], folder: str, everything: bool) -> None:
    for wrapper in wrappers:
        for dtype in DTYPES:
            for label in labels_of(wrapper, dist.get_world_size(), dtype, everything):
                make = OPTIMIZERS[label]
                expected = torch.load(Path(folder) / f"{label}-{dtype}.pt")
                model = ShardedModel(wrapper, start_values(dtype))
                optimizer = make(param_groups(model.params), layout=model.layout)
                for step in range(STEPS):
                    model.set_grads(spiky_grads(step, dtype))
                    optimizer.step()
                for name, param in model.params.items():
                    where = f"{label} {dtype} {wrapper} {name}"
                    assert set(optimizer.state[param]) | {"param"} == set(expected[name]), where
                    for key, full in expected[name].items():
                        actual = model.local(param if key == "param" else optimizer.state[param][key])
                        part = full if key == "step" else model.slice_of(name, full)
                        assert actual.dtype == part.dtype, f"{where} {key}"
                        assert torch.equal(actual, part), f"{where} {key}: {actual} != {part}"


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_parameters_and_state_do_not_depend_on_the_sharding(world_size: int, everything: bool, tmp_path: Path) -> None:
    """20 spiky steps: DDP, FSDP2, HSDP, FSDP2+TP and FSDP1 equal one process bitwise, for fp32 and bf16 parameters."""
    for dtype in DTYPES:
        needed = {label for wrapper in LAYOUTS[world_size] for label in labels_of(wrapper, world_size, dtype, everything)}
        for label in needed:
            torch.save(unsharded(OPTIMIZERS[label], dtype), tmp_path / f"{label}-{dtype}.pt")
    ranks.run(check_ranks, world_size, LAYOUTS[world_size], str(tmp_path), everything)
