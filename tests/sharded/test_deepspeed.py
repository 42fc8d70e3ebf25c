"""Under DeepSpeed, ZeRO stages 0 to 3: the bits of an unsharded optimizer that is given the same gradients."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed_models
import pytest
import ranks
import torch
import torch.distributed as dist
from collectives import collectives_of
from deepspeed_models import AWKWARD, NEEDS_DEEPSPEED, assert_equal, config_of, model, train, whole
from torch import Tensor, nn

import sharded_optim as so
from benchmarks.given_gradients import gradients, one_group, two_groups, unsharded
from sharded_optim.optimizers import OPTIMIZERS

pytestmark = [*NEEDS_DEEPSPEED, pytest.mark.filterwarnings("ignore:weight_decay")]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
STEPS = 10
STABLE = partial(so.StableAdamW, lr=1e-2, weight_decay=0.1)
ADAMW = partial(so.AdamW, lr=1e-2, weight_decay=0.1)
MUON = partial(so.Muon, lr=2e-2)
BF16_OPTIMIZER = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
CELLS: list[tuple[int, torch.dtype, dict[str, Any]]] = [
    (0, FP32, {}),
    (0, BF16, {}),
    *((stage, dtype, {}) for stage in (1, 2, 3) for dtype in (FP32, BF16, FP16)),
    (1, BF16, {"top": BF16_OPTIMIZER}),
    *((stage, BF16, {"round_robin_gradients": True}) for stage in (1, 2)),
    *((stage, FP32, {"round_robin_gradients": True, "parameter_alignment": True}) for stage in (1, 2)),
    *((stage, BF16, {"offload_optimizer": {"device": "cpu"}}) for stage in (1, 2, 3)),
    *((3, dtype, {"sub_group_size": 300}) for dtype in (FP32, BF16)),
    (3, BF16, {"sub_group_size": 300, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
]


@contextmanager
def engine_of(config: dict[str, Any], make: partial[Any] = STABLE, groups: Any = one_group, **options: Any) -> Iterator[Any]:
    own = model()
    engine, *_ = so.deepspeed.initialize(model=own, optimizer=make(groups(own)), config=config, **options)
    yield engine
    engine.destroy()


# ------------------------------------------------------------------------------------------------------------------------ the bits


def check_bits() -> None:
    expected = {make: unsharded(make, STEPS, AWKWARD, groups=two_groups) for make in (STABLE, ADAMW)}
    for stage, dtype, options in CELLS:
        if dist.get_world_size() > 2 and (stage == 0 or (dtype != FP32 and "top" not in options)):
            continue  # more ranks cut elsewhere, which does not depend on the dtype but for BF16_Optimizer
        for make, outcome in expected.items():
            if make is STABLE or (dist.get_world_size() == 2 and not options):
                with engine_of(config_of(stage, dtype, **options), make, two_groups) as engine:
                    train(engine, 1, STEPS)
                    assert_equal(engine, outcome, f"stage {stage} {dtype} {options} {make.func.__name__}")


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_stage_dtype_and_option_gives_the_bits_of_the_unsharded_optimizer(world_size: int) -> None:
    """Parameters, moments and step counters after 10 spiky steps, with two param groups, also where a stage steps several times."""
    deepspeed_models.run(check_bits, world_size)


OTHERS = [
    partial(so.Adam, lr=1e-2, weight_decay=0.1),
    partial(so.DecoupledAdamW, lr=1e-2, weight_decay=1e-3, amsgrad=True),
    partial(so.DecoupledSGDW, lr=1e-2, momentum=0.9, nesterov=True),
    partial(so.StableAdamW, lr=1e-2, state_dtype=torch.bfloat16, betas=(0.9, 0.95)),
    partial(so.StableAdamW, lr=1e-2, backend="eager", foreach=False),
    partial(so.AdamW, lr=1e-2, nonfinite="skip"),
]


def check_other_optimizers() -> None:
    for make in OTHERS:
        outcome = unsharded(make, STEPS, AWKWARD)
        for stage in (1, 3):
            with engine_of(config_of(stage), make) as engine:
                train(engine, 1, STEPS)
                assert all(torch.equal(value, outcome.params[name]) for name, value in whole(engine).items()), (stage, make)
    # Half the gradient in each of two micro-batches.
    outcome = unsharded(STABLE, 5, AWKWARD)
    for stage in (0, 1, 2, 3):
        with engine_of(config_of(stage, top={"gradient_accumulation_steps": 2})) as engine:
            train(engine, 1, 5, micro_batches=2)
            assert_equal(engine, outcome, f"gradient accumulation, stage {stage}")
    # Parameters that were partitioned as they were made.
    config = config_of(3, BF16)
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=config):
        own = model()
    engine, *_ = so.deepspeed.initialize(model=own, optimizer=STABLE(own.named_parameters()), config=config)
    train(engine, 1, 5)
    assert_equal(engine, outcome, "zero.Init")
    names = {name.removeprefix("rms/") for name in engine.basic_optimizer.metrics() if name.startswith("rms/")}
    assert names == {name for name, _ in own.named_parameters()}
    engine.destroy()


def check_muon() -> None:
    """With the groups of `muon_param_groups`, which knows the shapes of partitioned parameters too."""
    import deepspeed

    groups = so.muon_param_groups
    outcome = unsharded(MUON, STEPS, AWKWARD, groups=groups)
    for stage, dtype, options in CELLS:
        with engine_of(config_of(stage, dtype, **options), MUON, groups) as engine:
            train(engine, 1, STEPS)
            assert_equal(engine, outcome, f"Muon, stage {stage} {dtype} {options}")
    outcome = unsharded(MUON, 5, AWKWARD, groups=groups)
    for stage in (0, 1, 2, 3):
        with engine_of(config_of(stage, top={"gradient_accumulation_steps": 2}), MUON, groups) as engine:
            train(engine, 1, 5, micro_batches=2)
            assert_equal(engine, outcome, f"Muon, gradient accumulation, stage {stage}")
    config = config_of(3, BF16)
    with deepspeed.zero.Init(config_dict_or_path=config):
        own = model()
    for made, ordinary in ((groups(own), groups(model())), *[map(so.param_groups_weight_decay, (own, model()))]):
        assert list(map(names_in, made)) == list(map(names_in, ordinary))
    engine, *_ = so.deepspeed.initialize(model=own, optimizer=MUON(groups(own)), config=config)
    train(engine, 1, 5)
    assert_equal(engine, outcome, "Muon, zero.Init")
    engine.destroy()


def names_in(group: dict[str, Any]) -> list[str]:
    return group.get("param_names") or [name for name, _ in group["params"]]


class Various(nn.Module):
    """Tied weights, frozen parameters and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.second = nn.Linear(7, 5, bias=False)
        self.tied = nn.Linear(7, 5, bias=False)
        self.tied.weight = self.second.weight
        self.unused = nn.Parameter(torch.ones(9))

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.first(features)
        return (self.tied(self.frozen(hidden)) + self.second(hidden)).square().mean()


def check_various() -> None:
    outcomes = []
    for stage in (0, 1, 2, 3):
        torch.manual_seed(0)
        own = Various()
        optimizer = STABLE([(name, param) for name, param in own.named_parameters() if name != "unused" or stage])
        engine, *_ = so.deepspeed.initialize(model=own, optimizer=optimizer, config=config_of(stage))
        for step in range(4):
            engine.backward(engine(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))))
            engine.step()
        values = whole(engine) if stage else {name: param.detach().clone() for name, param in own.named_parameters()}
        outcomes.append({name: values[name] for name in ("first.weight", "first.bias", "second.weight")})
        found = {name for name in optimizer.metrics() if name.startswith("rms/")}
        # A partition has zeros for the gradient that is missing.
        assert found == {f"rms/{name}" for name in (*outcomes[0], *(["unused"] if stage else []))}
        copied = pickle.loads(pickle.dumps(optimizer))
        copied.param_groups = [{**group, "params": [nn.Parameter(torch.ones(3))]} for group in copied.param_groups]
        with pytest.raises(ValueError, match="copied or unpickled, which drops its layout"):
            copied.step()
        engine.destroy()
    for outcome in outcomes[1:]:
        for name, value in outcome.items():
            torch.testing.assert_close(value, outcomes[0][name], rtol=1e-6, atol=1e-7)


def check_clipping_and_scaling() -> None:
    grads = [gradients(step, AWKWARD) for step in range(1, STEPS + 1)]
    own = model()
    optimizer = STABLE(one_group(own))
    for each in grads:
        for param, grad in zip(own.parameters(), each, strict=True):
            param.grad = grad.clone()
        nn.utils.clip_grad_norm_(own.parameters(), 1.5)
        optimizer.step()
    for stage in (0, 1, 2, 3):
        with engine_of(config_of(stage, top={"gradient_clipping": 1.5})) as engine:
            train(engine, 1, STEPS)
            for (name, param), value in zip(own.named_parameters(), whole(engine).values(), strict=True):
                torch.testing.assert_close(value, param.detach(), rtol=2e-5, atol=2e-6, msg=f"stage {stage} {name}")
    # A step whose gradients overflow is skipped by DeepSpeed, with everything as it was.
    outcome = unsharded(STABLE, 3, AWKWARD)
    for stage in (1, 2, 3):
        with engine_of(config_of(stage, FP16)) as engine:
            train(engine, 1, 2)
            spoiled = [grad * 3e4 if dist.get_rank() == 1 else grad for grad in gradients(3, AWKWARD)]
            engine.backward(engine(spoiled))
            engine.step()
            train(engine, 3, 3)
            assert_equal(engine, outcome, f"overflow, stage {stage}")
    # Where DeepSpeed does not look, a group whose gradients are not finite stays as it was, on every rank.
    outcome = unsharded(STABLE, 2, AWKWARD, groups=two_groups)
    unchecked = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    for stage in (1, 2):
        with engine_of(config_of(stage, top=unchecked), STABLE, two_groups) as engine:
            train(engine, 1, 2)
            steps = count_steps(engine)
            before = whole(engine)
            spoiled = [
                grad * (float("nan") if dist.get_rank() == 1 and name.endswith("bias") else 1.0)
                for name, grad in zip(engine.param_names.values(), gradients(3, AWKWARD), strict=True)
            ]
            engine.backward(engine(spoiled))
            engine.step()
            assert len(steps) == 2, "DeepSpeed has not skipped the step itself"
            after = whole(engine)
            for name in after:
                kept = name.endswith("bias")
                assert torch.equal(after[name], before[name]) == kept, (stage, name)
                assert not kept or torch.equal(after[name], outcome.params[name]), (stage, name)
            assert engine.basic_optimizer.skipped_steps == 1


def count_steps(engine: Any) -> list[None]:
    """Grows with each call of the base optimizer's step."""
    calls: list[None] = []
    engine.basic_optimizer.register_step_pre_hook(lambda *_: calls.append(None))
    return calls


# ----------------------------------------------------------------------------------------------------------------------------- MoE


class Experts(nn.Module):
    """A dense layer before and after one of four experts, which two ranks share."""

    def __init__(self) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        torch.manual_seed(0)
        self.inner = nn.Linear(6, 8)
        self.experts = MoE(8, nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8)), num_experts=4, ep_size=2, k=1)
        self.outer = nn.Linear(8, 3)

    def forward(self, features: Tensor) -> Tensor:
        hidden, auxiliary_loss, _ = self.experts(self.inner(features))
        return self.outer(hidden).square().mean() + 0.01 * auxiliary_loss


def check_experts() -> None:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    for stage, kind in ((1, "given"), (2, "in the config"), (2, "muon")):
        own = Experts()
        for number, (name, param) in enumerate(own.named_parameters()):  # other experts on the other rank of the expert group
            torch.manual_seed(number + (100 * (dist.get_rank() % 2) if "deepspeed_experts" in name else 0))
            nn.init.normal_(param, std=0.3)
        if kind == "muon":
            made = so.muon_param_groups(own, to_muon=lambda _, param: param.ndim > 1)
            named_groups = [{**group, "params": [param for _, param in group["params"]], "name": group["algorithm"]} for group in made]
            groups = split_params_into_different_moe_groups_for_optimizer(named_groups)
            engine, *_ = so.deepspeed.initialize(model=own, optimizer=MUON(groups), config=config_of(stage))
        elif kind == "given":
            groups = split_params_into_different_moe_groups_for_optimizer({"params": list(own.parameters()), "name": "parameters"})
            engine, *_ = so.deepspeed.initialize(model=own, optimizer=STABLE(groups), config=config_of(stage))
        else:
            named = {"type": "StableAdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
            engine, *_ = so.deepspeed.initialize(model=own, config=config_of(stage, top={"optimizer": named}))
        optimizer = engine.basic_optimizer
        twins = {name: nn.Parameter(value) for name, value in whole(engine).items()}
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        if kind == "muon":
            matrices = [(name, param) for name, param in twins.items() if param.ndim > 1]
            rest = [(name, param) for name, param in twins.items() if param.ndim < 2]
            rest_group = {"params": rest, "algorithm": "adamw", "weight_decay": 0.0}
            reference = MUON([{"params": matrices}, rest_group], process_group=alone)
        else:
            reference = so.StableAdamW(list(twins.items()), lr=1e-2, weight_decay=0.1, process_group=alone)
        grads = record_gradients(engine)
        for step in range(6):
            torch.manual_seed(10 * step + dist.get_rank())
            engine.backward(engine(torch.randn(12, 6) * (50.0 if step == 3 else 1.0)))
            grads.clear()
            engine.step()
            for name, param in twins.items():
                param.grad = grads[name]
            reference.step()
            for name, value in whole(engine).items():
                assert torch.equal(value, twins[name].detach()), f"stage {stage}, {kind}, step {step} {name}"
        if kind == "muon":
            engine.destroy()
            continue
        tensors = {name for name in optimizer.metrics() if name.startswith("rms/") and "deepspeed_experts" in name}
        assert len(tensors) == 4 * 4, f"four experts of four tensors, each with an RMS of its own: {sorted(tensors)}"
        engine.destroy()


def record_gradients(engine: Any) -> dict[str, Tensor]:
    """What is returned gets the whole gradients of each step."""
    found: dict[str, Tensor] = {}

    def record(optimizer: Any, args: Any, kwargs: Any) -> None:
        stepped = {param for group in optimizer.param_groups for param in group["params"]}
        found.update(deepspeed_models.gathered(engine, lambda master: master.grad.clone() if master in stepped else None))

    engine.basic_optimizer.register_step_pre_hook(record)
    return found


def test_experts_have_statistics_of_their_own() -> None:
    """MoE: ranks hold other experts under equal names, over which their data-parallel groups are cut; the dense layers are everybody's.

    And matrices of their own, under Muon.
    """
    deepspeed_models.run(check_experts, 4)


# ---------------------------------------------------------------------------------------------------------------------- collectives


def check_collectives() -> None:
    for stage, groups, options, calls in (
        (0, two_groups, {}, 1),
        (1, two_groups, {}, 2),
        (1, two_groups, {"top": BF16_OPTIMIZER}, 1),
        (2, two_groups, {}, 2),
        (3, one_group, {}, 1),
        (3, one_group, {"sub_group_size": 300}, 3),
    ):
        for make, per_call in ((STABLE, ["gloo:all_reduce"]), (ADAMW, [])):
            with engine_of(config_of(stage, **options), make, groups) as engine:
                train(engine, 1, 1)  # the first step also exchanges the layout
                found = count_collectives(engine)
                train(engine, 2, 2)
                assert found == [per_call] * calls, f"stage {stage} {options} {make.func.__name__}: {found}"


def count_collectives(engine: Any) -> list[list[str]]:
    """What each call of the base optimizer's step communicates from now on."""
    found: list[list[str]] = []
    step = engine.basic_optimizer.step
    engine.basic_optimizer.step = lambda: found.append(collectives_of(step))
    return found


# ------------------------------------------------------------------------------------------------------------ configs and refusals


def check_names() -> None:
    """A name without a prefix is DeepSpeed's or torch's where they have an optimizer of that name."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    assert set(DEEPSPEED_OPTIMIZERS) == so.deepspeed.DEEPSPEED_OPTIMIZERS
    own = {name: so.deepspeed.is_own(name) for name in OPTIMIZERS}
    assert {name for name, is_own in own.items() if is_own} == {"DecoupledAdamW", "DecoupledSGDW", "StableAdamW"}
    assert all(so.deepspeed.is_own(f"sharded_optim.{name}") for name in OPTIMIZERS)
    for name in ("Muon", "Lamb", "SGD", "sharded_optim.Lamb", "sharded_optim", "", None, ["AdamW"]):
        assert not so.deepspeed.is_own(name)


def check_configs() -> None:
    outcome = unsharded(partial(so.StableAdamW, lr=1e-2, weight_decay=0.1), 3, AWKWARD)
    for name in ("StableAdamW", "sharded_optim.StableAdamW"):
        config = config_of(2, top={"optimizer": {"type": name, "params": {"lr": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.99]}}})
        before = repr(config)
        engine, optimizer, loader, schedule = so.deepspeed.initialize(model=model(), config=config)
        assert repr(config) == before, "the caller's config is left as it is"
        assert optimizer is engine.optimizer
        assert loader is schedule is None
        train(engine, 1, 3)
        assert_equal(engine, outcome, name)
        engine.destroy()
    own = model()
    config = config_of(2, top={"optimizer": {"type": "sharded_optim.Muon", "params": {"lr": 2e-2}}})
    engine, *_ = so.deepspeed.initialize(model=own, model_parameters=so.muon_param_groups(own), config=config)
    train(engine, 1, 3)
    assert_equal(engine, unsharded(MUON, 3, AWKWARD, groups=so.muon_param_groups), "Muon in the config")
    engine.destroy()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:  # as arguments have it, with a scheduler, and param groups beside it
        named = {"optimizer": {"type": "sharded_optim.AdamW", "params": {"lr": 1e-2}}}
        scheduler = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 2}}}
        json.dump(config_of(2, top=named | scheduler), file)
        file.flush()
        arguments = argparse.Namespace(deepspeed_config=file.name, local_rank=dist.get_rank())
        own = model()
        engine, *_, schedule = so.deepspeed.initialize(arguments, own, model_parameters=two_groups(own))
        assert arguments.deepspeed_config == file.name
        train(engine, 1, 3)
        assert schedule.get_last_lr() == [1e-2, 1e-2]
        assert [group["weight_decay"] for group in engine.basic_optimizer.param_groups] == [1e-2, 0.0]
        engine.destroy()
    own = model()
    config = config_of(2, top={"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}})
    with pytest.raises(ValueError, match=r"all ranks: the base optimizer is torch\.optim\.adamw\.AdamW; pass one of sharded_optim"):
        so.deepspeed.initialize(model=own, config=config)
    engine, optimizer, *_ = so.deepspeed.initialize(model=own, config=config_of(3))  # to infer
    assert engine.basic_optimizer is None
    engine.destroy()
    own = model()
    with pytest.warns(UserWarning, match=r"gradient_clipping is not in the DeepSpeed config.*norm of 1\.0"):
        so.deepspeed.initialize(model=own, optimizer=STABLE, config={"train_micro_batch_size_per_gpu": 1})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="gradient_clipping")
        so.deepspeed.initialize(model=own, optimizer=STABLE, config=config_of(0))


def check_refusals() -> None:
    import deepspeed

    needed = {"zero_allow_untested_optimizer": True}
    for stage in (1, 2, 3):  # DeepSpeed's own initialize, and nothing attached
        for make in (STABLE, ADAMW):
            own = model()
            engine, *_ = deepspeed.initialize(model=own, optimizer=make(one_group(own)), config=config_of(stage) | needed)
            with pytest.raises(ValueError, match=r"so\.deepspeed\.attach\(engine\)"):
                train(engine, 1, 1)
            so.deepspeed.attach(engine)
            engine.optimizer.zero_grad()
            engine.destroy()
    own = model()
    with pytest.raises(ValueError, match=r"fp16 without ZeRO divides gradients by a loss scale"):
        so.deepspeed.initialize(model=own, optimizer=STABLE(one_group(own)), config=config_of(0, FP16))
    with pytest.raises(ValueError, match=r"gradient_release=True, and DeepSpeed steps after backward"):
        so.deepspeed.initialize(model=own, optimizer=partial(STABLE, gradient_release=True), config=config_of(1))

    tagged = model()
    next(tagged.parameters()).use_muon = True  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"'layers\.0\.weight' is tagged use_muon.*orthogonalizes gradients too.*'sharded_optim\.Muon'"):
        so.deepspeed.initialize(model=tagged, optimizer=MUON(so.muon_param_groups(tagged)), config=config_of(2))

    stranger = nn.Parameter(torch.ones(2))
    for stage in (0, 1):
        with pytest.raises(ValueError, match=r"a parameter of shape \(2,\) that is not in the model.*make it a parameter of the model"):
            so.deepspeed.initialize(model=own, optimizer=STABLE([*own.parameters(), stranger]), config=config_of(stage))
    with (
        engine_of(config_of(1)) as engine,
        pytest.raises(ValueError, match=r"DeepSpeed takes no parameters later, so give all of them to initialize"),
    ):
        engine.basic_optimizer.add_param_group({"params": [stranger]})
    # An optimizer that has stepped before does not take DeepSpeed's step with zero gradients either.
    own = model()
    optimizer = STABLE(one_group(own))
    for param in own.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = [param.detach().bfloat16() for param in own.parameters()]
    engine, *_ = so.deepspeed.initialize(model=own, optimizer=optimizer, config=config_of(0, BF16))
    assert all(map(torch.equal, before, own.parameters()))
    assert all(optimizer.state[param]["step"] == 0 for group in optimizer.param_groups for param in group["params"])
    engine.destroy()

    with engine_of(config_of(3, offload_optimizer={"device": "cpu"})) as engine:
        zero = engine._config.zero_config
        refusals: list[tuple[object, str, Any, str]] = [
            (zero, "zenflow", object(), r"ZenFlow steps parts of the model.*leave zero_optimization\.zenflow out"),
            (zero.offload_optimizer, "super_offload", True, r"SuperOffload.*leave offload_optimizer\.super_offload out"),
            (zero.offload_optimizer, "device", "nvme", r"zero_optimization\.offload_optimizer to NVMe.*offload to 'cpu'"),
            (zero.offload_optimizer, "ratio", 0.5, r"offload_optimizer\.ratio=0\.5.*leave it at 1"),
            (engine, "mp_world_size", 2, r"tensor parallelism.*use FSDP2"),
            (engine, "pipeline_parallelism", True, r"PipelineEngine is not supported"),
            (engine, "torch_autocast_enabled", lambda: True, r"torch_autocast in float16.*use bfloat16"),
            (next(iter(engine.param_names)), "allreduce", False, r"'layers\.0\.weight' is a different tensor on each rank.*deepspeed\.moe"),
            (engine, "optimizer", object(), r"optimizer wrapper builtins\.object is not supported"),
            (deepspeed, "__version__", "0.17.6", r"DeepSpeed 0\.17\.6 .*install deepspeed>=0\.19,<0\.20"),
            (deepspeed, "__version__", "0.20.0", r"DeepSpeed 0\.20\.0 .*install deepspeed>=0\.19,<0\.20"),
        ]
        engine.torch_autocast_dtype = lambda: torch.float16
        for target, name, value, message in refusals:
            if dist.get_rank() == 1:  # one rank's problem is everybody's error
                with pytest.MonkeyPatch.context() as patch:
                    patch.setitem(vars(target), name, value)  # past validation
                    refused(engine, rf"rank 1: .*{message}")
            else:
                refused(engine, rf"rank 1: .*{message}")
        so.deepspeed.attach(engine)


def refused(engine: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        so.deepspeed.attach(engine)


# ------------------------------------------------------------------------------------------------------------- private attributes


def check_private_attributes() -> None:
    relied_on = {
        1: "bit16_groups bit16_groups_flat single_partition_of_fp32_groups real_dp_process_group",
        3: "fp16_groups fp32_partitioned_groups_flat",
        "bf16": "bf16_groups bf16_groups_flat fp32_groups_flat_partition real_dp_process_group",
    }
    for stage, attributes in relied_on.items():
        config = config_of(1, top=BF16_OPTIMIZER) if stage == "bf16" else config_of(stage)
        with engine_of(config) as engine:
            for name in attributes.split():
                assert hasattr(engine.optimizer, name), f"DeepSpeed has moved {name} of {type(engine.optimizer).__name__}"
                value = engine.optimizer.__dict__.pop(name)
                refused(engine, rf"{name}.*\(DeepSpeed [\d.]+, supported are >=0\.19,<0\.20\)")
                setattr(engine.optimizer, name, value)
    with engine_of(config_of(1)) as engine:
        flat = engine.optimizer.single_partition_of_fp32_groups[0]
        with torch.no_grad():
            flat += 1.0
        refused(engine, "have other values than it")
        engine.optimizer.bit16_groups_flat = [flat.clone() for flat in engine.optimizer.bit16_groups_flat]
        refused(engine, "does not lie in the flat tensor of DeepSpeed's optimizer wrapper")


# --------------------------------------------------------------------------------------------------------------------------- spawns


def check_all(checks: list[Callable[[], None]]) -> None:
    """Starting ranks that import DeepSpeed takes longer than most checks."""
    for check in checks:
        check()


@pytest.mark.parametrize(
    ("world_size", "checks"),
    [(2, [check_other_optimizers, check_muon, check_clipping_and_scaling, check_various, check_collectives]), (1, [check_various])],
)
def test_options_of_training(world_size: int, checks: list[Any]) -> None:
    """Other optimizers, Muon, gradient accumulation, zero.Init, clipping, loss scaling, skipped steps, tied, frozen and unused
    parameters; and a step is one all-reduce for each param group or sub-group.
    """
    deepspeed_models.run(check_all, world_size, checks)


def test_configs_refusals_and_private_attributes() -> None:
    """The optimizer named in a config; what would be silently wrong is refused on all ranks; a private attribute that moves, by name."""
    deepspeed_models.run(check_all, 2, [check_names, check_configs, check_refusals, check_private_attributes])


# ----------------------------------------------------------------------------------------------------------------- a build's lock


def check_stale_lock(folder: str) -> None:
    """Of a build that was killed: on one rank's machine, or where no process group is there yet."""
    own = model()
    lock = Path(folder, "deepspeed_shm_comm", "lock")
    os.environ["TORCH_EXTENSIONS_DIR"] = folder if dist.get_rank() == 0 else f"{folder}-other"
    for others in (Path(folder), Path(f"{folder}-other")):
        (others / "deepspeed_shm_comm").mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        lock.touch()
    import deepspeed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(so.deepspeed, "BUILD_SECONDS", 2.0)
        if dist.get_rank() == 1:  # which need not compile it
            patch.setattr(deepspeed, "init_distributed", lambda: None)
        with pytest.raises(ValueError, match=rf"rank 0: DeepSpeed's extension was not compiled within 2 s; .* remove {lock}$"):
            so.deepspeed.initialize(model=own, optimizer=STABLE(one_group(own)), config=config_of(2))


def test_a_lock_that_a_killed_build_has_left_is_named_on_all_ranks(tmp_path) -> None:
    ranks.close()  # ranks that have loaded the extension need no lock
    ranks.run(deepspeed_models._check, 2, check_stale_lock, (str(tmp_path / "extensions"),), timeout=60.0)


ALONE = """
import os, sys
import torch, deepspeed
import sharded_optim as so
so.deepspeed.BUILD_SECONDS = 2.0
model = torch.nn.Linear(3, 3)
optimizer = so.AdamW(model.parameters(), lr=1e-3)
so.deepspeed.initialize(model=model, optimizer=optimizer, config={"train_batch_size": 1, "zero_optimization": {"stage": 1}})
"""


def test_a_lock_that_a_killed_build_has_left_is_named_also_where_deepspeed_starts_the_process_group(tmp_path) -> None:
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    variables = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    alone = os.environ | variables | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE], env=alone, capture_output=True, text=True, timeout=60, check=False)
    assert f"ValueError: DeepSpeed's extension was not compiled within 2 s; if nothing else is compiling it, remove {lock}" in done.stderr
