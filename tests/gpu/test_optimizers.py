"""Whole optimizers on the GPU give, step after step, the bits of the same optimizers on the CPU, where the eager backend runs."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from operand_cases import assert_same
from torch import Tensor, nn

import sharded_optim as so
from gpu.device import BACKEND, DEVICE, REHEARSAL, synchronize
from gpu.runs import CPU, OPTIMIZERS, STORAGES, Run, assert_alike, on_both
from sharded_optim.backends import choose
from sharded_optim.checkpoint import background
from sharded_optim.tools.doctor import backends, environment
from sharded_optim.tools.doctor.rank_info import RankInfo

STEPS = 5 if REHEARSAL else 12
CELLS = [(optimizer, storage) for optimizer in OPTIMIZERS for storage in STORAGES]
CELLS = [cell for number, cell in enumerate(CELLS) if number % 9 == 0] if REHEARSAL else CELLS  # which a rehearsal has time for


def test_a_gpu_takes_the_triton_backend_by_itself() -> None:
    """And says why it took no other."""
    names = (BACKEND,) if REHEARSAL else ("cpu", "triton", "eager")
    backend, declined = choose(names, DEVICE, frozenset({torch.float32, torch.bfloat16}))
    assert backend.name == "triton"
    assert len(declined) == len(names[: names.index("triton")])


def test_the_doctor_finds_everything_in_order() -> None:
    """It steps a small optimizer by each backend, and computes on the device."""
    findings = [*backends.examine(DEVICE), *environment.examine(RankInfo())]
    assert not [each for each in findings if each.status == "problem"]
    assert next(each for each in findings if each.name == "triton").status == "ok"
    assert REHEARSAL or next(each for each in findings if each.name == "device").status == "ok"


@pytest.mark.parametrize(("optimizer", "storage"), CELLS)
def test_a_run_gives_the_bits_of_a_run_on_the_cpu(optimizer: str, storage: str) -> None:
    """Two param groups, a learning rate that changes at every step, a step that is not finite, a missing gradient, memory that moves."""
    run, reference = on_both(optimizer, storage, nonfinite="skip")
    for step in range(STEPS):
        for each in (run, reference):
            grads: list[Tensor | None] = list(each.gradients(step))
            if step == 2:
                grads[3] = None
            if step == 3:
                grads[5][-1] = math.nan
            if step == 4:
                each.params[1].data = each.params[1].data.clone()
            each.give(grads)
            each.optimizer.step()
            each.schedule.step()
        assert run.optimizer.skipped_steps == reference.optimizer.skipped_steps == (step >= 3)
        report = run.optimizer.metrics()
        assert report.keys() == reference.optimizer.metrics().keys()
        for name, value in reference.optimizer.metrics().items():
            assert report[name] == value or math.isnan(value), name
    assert_alike(run, reference)


@pytest.mark.parametrize("optimizer", ["StableAdamW", "AdamW", "amsgrad", "momentum"])
@pytest.mark.parametrize("options", [{"foreach": False}, {"lr": "tensor"}, {"nonfinite": "allow"}, {"nonfinite": "raise"}], ids=str)
def test_options_that_change_how_a_step_runs_do_not_change_its_bits(optimizer: str, options: dict[str, Any]) -> None:
    """A tensor as learning rate lies on the device, and is written there by the schedule."""
    own = [
        Run(optimizer, "bf16_kahan", device, backend, **options | ({"lr": torch.tensor(1e-2, device=device)} if "lr" in options else {}))
        for device, backend in ((DEVICE, BACKEND), (CPU, "eager"))
    ]
    for step in range(4):
        for each in own:
            each.step(step)
    assert_alike(*own)


def test_a_step_that_is_not_finite_raises_where_it_is_asked_for() -> None:
    run, reference = on_both("AdamW", nonfinite="raise")
    for each in (run, reference):
        each.step(0)
        grads = each.gradients(1)
        grads[5][0] = math.inf
        each.give(list(grads))
        with pytest.raises(FloatingPointError, match="gradient not finite"):
            each.optimizer.step()
    assert_alike(run, reference)


def test_too_many_skipped_steps_in_a_row_stop_the_run_one_step_later() -> None:
    """On an accelerator the next step raises, as a step does not wait for its own verdict."""
    run = Run("StableAdamW", max_skipped_steps=2)
    run.step(0)
    grads = run.gradients(1)
    grads[5][0] = math.nan
    run.give(list(grads))
    for _ in range(1 if REHEARSAL else 2):
        run.optimizer.step()
        synchronize()
    with pytest.raises(FloatingPointError, match="steps in a row were skipped"):
        run.optimizer.step()


def test_late_steps_are_corrected_alike() -> None:
    """Bias correction is computed in float64 on the device, by the bits of the step counter."""
    run, reference = on_both("StableAdamW")
    for each in (run, reference):
        each.step(0)
        for number, param in enumerate(each.params):
            if "step" in each.optimizer.state[param]:
                each.optimizer.state[param]["step"].fill_([1, 999, 12_345, 2**20 - 1, 2**24 - 2][number % 5])
        each.step(1)
    assert_alike(run, reference)


# ------------------------------------------------------------------------------------------------------------ around an optimizer


@pytest.mark.parametrize("optimizer", ["AdamW", "StableAdamW", "momentum"])
@pytest.mark.parametrize("storage", ["fp16", "fp16_kahan", "fp32"])
def test_a_gradient_scaler_steps_alike(optimizer: str, storage: str) -> None:
    """It begins with a scale that is too large for float16, grows, and meets a gradient that is not finite."""
    run, reference = on_both(optimizer, storage)
    scalers = [torch.amp.GradScaler(each.device.type, init_scale=2.0**8, growth_interval=2) for each in (run, reference)]
    for step in range(STEPS):
        for each, scaler in zip((run, reference), scalers, strict=True):
            scale = scaler.scale(torch.ones((), device=each.device))
            grads = [grad * scale.to(grad.dtype) for grad in each.gradients(step)]
            if step == 3:
                grads[5][1] = math.inf
            each.give(list(grads))
            scaler.step(each.optimizer)
            scaler.update()
            each.schedule.step()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert_alike(run, reference)


@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan"])
def test_clipped_gradients_are_stepped_alike(storage: str) -> None:
    """The norm is torch's, and on a GPU it is summed in another order: the reference is given the gradients that were clipped there."""
    run, reference = on_both("StableAdamW", storage)
    for step in range(3):
        run.give(list(run.gradients(step)))
        norm = torch.nn.utils.clip_grad_norm_(run.params, 1.0)
        assert norm.isfinite()
        reference.give([param.grad.cpu() for param in run.params])
        for each in (run, reference):
            each.optimizer.step()
    assert_alike(run, reference)


class Exact(nn.Module):
    """Its gradients are what it is given, exactly, on any device: (p * g).sum() has the gradient 1 * g."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(), (5,), (7, 3), (33, 5)]
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)

    def forward(self, grads: list[Tensor]) -> Tensor:
        return torch.stack([(weight * grad).float().sum() for weight, grad in zip(self.weights, grads, strict=True)]).sum()


@pytest.mark.parametrize("optimizer", [so.AdamW, so.StableAdamW])
def test_gradient_release_steps_inside_backward(optimizer: Any) -> None:
    found = []
    for device, backend in ((DEVICE, BACKEND), (CPU, "eager")):
        model = Exact(torch.bfloat16).to(device)
        own = optimizer(model.parameters(), lr=1e-2, gradient_release=True, backend=backend)
        so.prepare_for_gradient_release(model, own)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            grads = [torch.randn(weight.shape, generator=generator).to(device, weight.dtype) for weight in model.weights]
            own.optimizer_accumulation = step == 1
            model(grads).backward()
            own.step()
            own.zero_grad()
            assert all(weight.grad is None for weight in model.weights)
        so.remove_gradient_release(model)
        found.append([value for weight in model.weights for value in (weight.detach(), *own.state[weight].values())])
    for actual, expected in zip(*found, strict=True):
        assert_same(actual, expected, "parameter or state")


def test_one_optimizer_steps_parameters_of_the_gpu_and_of_the_cpu() -> None:
    """As where some are offloaded: their statistics are in one agreement."""

    def run(devices: list[torch.device]) -> list[Tensor]:
        params = [nn.Parameter(torch.linspace(-1, 1, numel).to(device)) for numel, device in zip((5, 300), devices, strict=True)]
        optimizer = so.StableAdamW(params, lr=1e-2)
        for step in range(4):
            for param in params:
                param.grad = (torch.linspace(-1, 2, param.numel()) * (10.0**step)).to(param.device)
            optimizer.step()
        assert optimizer.skipped_steps == 0
        return [param.detach().cpu() for param in params]

    for placed in ([DEVICE, CPU], [CPU, DEVICE]):
        for actual, expected in zip(run(placed), run([CPU, CPU]), strict=True):
            assert torch.equal(actual, expected)


def test_what_the_monitor_is_told_is_what_it_is_told_on_a_cpu() -> None:
    """Norms are sums of float64 values, in an order that torch chooses."""
    run, reference = on_both("AdamW", "bf16_kahan")
    told = []
    for each in (run, reference):
        each.step(0)
        each.step(1)
        metrics: dict[str, Any] = {}
        for index, param in enumerate(each.params):
            each.optimizer.report_per_parameter_metrics(param, f"w{index}", metrics)
        each.optimizer.pre_reduce_metrics(metrics)
        each.optimizer.dist_reduce_metrics(metrics)
        told.append({name: value.item() for name, value in metrics.items()})
    assert told[0] == pytest.approx(told[1], rel=1e-9, abs=1e-12, nan_ok=True)


# --------------------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("optimizer", ["StableAdamW", "amsgrad", "momentum"])
@pytest.mark.parametrize("storage", ["bf16_kahan"] if REHEARSAL else ["fp32", "bf16_kahan", "bf16_stochastic", "fp32-bf16_state"])
def test_a_state_dict_moves_from_the_gpu_to_the_cpu_and_back(optimizer: str, storage: str) -> None:
    """Through torch.save, as it would go from one machine to another; both go on with the same bits."""
    run, reference = on_both(optimizer, storage)
    for step in range(2):
        run.step(step)
    for source, target in ((run, reference), (reference, run)):
        saved = io.BytesIO()
        torch.save({"optimizer": source.optimizer.state_dict(), "schedule": source.schedule.state_dict()}, saved)
        saved.seek(0)
        loaded = torch.load(saved, map_location=target.device)
        for param, other in zip(target.params, source.params, strict=True):
            param.data.copy_(other.data)
        target.optimizer.load_state_dict(loaded["optimizer"])
        target.schedule.load_state_dict(loaded["schedule"])
        for step in range(2, 4):
            for each in (run, reference):
                each.step(step)
        assert_alike(run, reference)


def test_a_copy_of_an_optimizer_goes_on_alike() -> None:
    run, reference = on_both("StableAdamW", "bf16_kahan")
    for each in (run, reference):
        each.step(0)
        each.params, each.optimizer = copy.deepcopy((each.params, each.optimizer))
        each.give(list(each.gradients(1)))
        each.optimizer.step()
    assert_alike(run, reference)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_of_a_gpu_loads_on_a_cpu_and_back(asynchronous: bool, tmp_path: Path) -> None:
    """It has the values of the moment at which it was begun, as they were copied to pinned memory."""
    models = {device: Exact(torch.bfloat16).to(device) for device in (DEVICE, CPU)} if not REHEARSAL else {}
    gpu = models.get(DEVICE, Exact(torch.bfloat16))
    cpu = models.get(CPU, Exact(torch.bfloat16))
    optimizers = [so.StableAdamW(model.parameters(), lr=1e-2, backend=name) for model, name in ((gpu, BACKEND), (cpu, "eager"))]

    def step(model: Exact, optimizer: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in model.weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight)
        optimizer.step()

    def values(model: Exact, optimizer: Any) -> list[Tensor]:
        return [value.detach().cpu().clone() for weight in model.weights for value in (weight, *optimizer.state[weight].values())]

    step(gpu, optimizers[0], 1)
    expected = values(gpu, optimizers[0])
    if asynchronous:
        saving = so.checkpoint.async_save(tmp_path, 1, model=gpu, optimizer=optimizers[0])
        assert background._buffer.is_pinned() != REHEARSAL
        step(gpu, optimizers[0], 2)  # while it is written
        saving.wait()
    else:
        so.checkpoint.save(tmp_path, 1, model=gpu, optimizer=optimizers[0])
    for model, optimizer in ((cpu, optimizers[1]), (gpu, optimizers[0])):
        so.checkpoint.load(tmp_path, model=model, optimizer=optimizer)
        for actual, value in zip(values(model, optimizer), expected, strict=True):
            assert_same(actual, value, "what was loaded")
    for seed in (3, 4):
        for model, optimizer in ((cpu, optimizers[1]), (gpu, optimizers[0])):
            step(model, optimizer, seed)
    for actual, value in zip(values(gpu, optimizers[0]), values(cpu, optimizers[1]), strict=True):
        assert_same(actual, value, "after two more steps")
