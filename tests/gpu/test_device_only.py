"""A step leaves the host alone: it waits for nothing, keeps to the current stream, launches few kernels and takes no memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sharded_optim as so
from gpu.device import DEVICE, REHEARSAL, busy, is_busy, kernels_of, on_a_stream, synchronisation_is_an_error, synchronize
from gpu.runs import OPTIMIZERS, Run, assert_alike, on_both

WARM = 2  # steps, in which kernels are compiled and tables made
STORAGES = ("bf16_kahan",) if REHEARSAL else ("fp32", "bf16_kahan", "bf16_stochastic", "fp16_stochastic")
# Kernels of a step, of however many tensors in two param groups: what a step should cost, with some room for torch's own small ones.
MOST_KERNELS = {"AdamW": 4, "StableAdamW": 14}
MOST_BYTES = 4 * 2**20  # that a step takes beside its tensors: tables, not copies


def gradients(run: Run, steps: int) -> list[list[Tensor]]:
    """Of several steps: what makes them waits for the device."""
    return [run.gradients(step) for step in range(steps)]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("nonfinite", ["skip", "allow"])
def test_the_host_waits_for_nothing(optimizer: str, storage: str, nonfinite: Any) -> None:
    """While the learning rates of two param groups change at every step, and metrics are kept, which are right when they are asked for."""
    run, reference = on_both(optimizer, storage, nonfinite=nonfinite)
    grads = gradients(run, WARM + 3)
    for step, own in enumerate(grads):
        if step < WARM:
            run.give(list(own))
            run.optimizer.step()
            run.schedule.step()
        else:
            with synchronisation_is_an_error():
                run.fill(own)
                run.optimizer.step()
                run.schedule.step()
        reference.step(step)
    assert run.optimizer.metrics() == reference.optimizer.metrics()
    assert_alike(run, reference)


@pytest.mark.parametrize("optimizer", ["AdamW", "StableAdamW", "SGDW"])
def test_the_host_waits_for_nothing_where_gradients_lie_elsewhere_at_every_step(optimizer: str) -> None:
    """As after zero_grad(set_to_none=True): addresses are copied to the device anew. One parameter never has a gradient."""
    run, reference = on_both(optimizer, "bf16_kahan")
    kept = gradients(run, WARM + 4)
    for step, own in enumerate(kept):
        other: list[Tensor | None] = [*reference.gradients(step)]
        given: list[Tensor | None] = [*own]
        given[3] = other[3] = None
        reference.give(other)
        reference.optimizer.step()
        run.give(given)
        if step < WARM:
            run.optimizer.step()
            continue
        with synchronisation_is_an_error():
            run.optimizer.step()
    assert_alike(run, reference)


@pytest.mark.parametrize("optimizer", ["AdamW", "StableAdamW", "momentum"])
def test_the_host_waits_for_nothing_under_a_gradient_scaler(optimizer: str) -> None:
    """Its verdict and its scale are tensors on the device, a step that it stops included."""
    run, reference = on_both(optimizer, "fp16_kahan")
    grads = gradients(run, WARM + 3)
    grads[WARM + 1][5][0] = torch.inf
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1.0, growth_interval=1000)
    scaler.scale(torch.ones((), device=DEVICE))  # makes the tensor of the scale
    for step, own in enumerate(grads):
        run.give(list(own))
        if step < WARM:
            scaler.step(run.optimizer)
            scaler.update()
        else:
            with synchronisation_is_an_error():
                scaler.step(run.optimizer)
                scaler.update()
        if step != WARM + 1:
            reference.give(list(reference.gradients(step)))
            # The scaler halves its scale after the step that it stops.
            if step > WARM + 1:
                reference.optimizer.grad_scale = torch.tensor(0.5)
            reference.optimizer.step()
    assert_alike(run, reference)


@pytest.mark.parametrize(("optimizer", "nonfinite", "steps"), [("AdamW", "allow", 3), ("AdamW", "skip", 1), ("StableAdamW", "skip", 1)])
def test_steps_queue_behind_a_busy_device(optimizer: str, nonfinite: Any, steps: int) -> None:
    """Waiting by an event, which torch does not call a synchronisation, would be seen.

    A step that may be skipped waits for nothing of its own. As it begins, it looks at the verdict on the one before, so that all ranks
    raise in the same step: two of them do not queue.
    """
    run = Run(optimizer, "bf16_kahan", nonfinite=nonfinite)
    run.give(list(run.gradients(0)))
    for _ in range(1 + WARM):  # the memory that the host copies from, too, is there when it was asked for once
        run.optimizer.step()
        synchronize()
        busy()
        for _ in range(steps):
            run.schedule.step()
            run.optimizer.step()
        was_busy = is_busy()
        synchronize()
    assert was_busy


@pytest.mark.parametrize("optimizer", ["AdamW", "StableAdamW", "momentum"])
@pytest.mark.parametrize("storage", ["fp32", "bf16_kahan_stochastic"])
def test_a_step_keeps_to_the_current_stream(optimizer: str, storage: str) -> None:
    """Gradients are written late on a stream that is not the default one: what ran on another would have stepped by the old ones."""
    run, reference = on_both(optimizer, storage)
    grads = gradients(run, WARM + 3)
    run.give([torch.zeros_like(grad) for grad in grads[0]])
    with on_a_stream():
        for step, own in enumerate(grads):
            if step >= WARM:
                busy()
            run.fill(own)
            run.optimizer.step()
            run.schedule.step()
    synchronize()
    for step in range(len(grads)):
        reference.step(step)
    assert_alike(run, reference)


@pytest.mark.parametrize("optimizer", MOST_KERNELS)
def test_a_step_launches_few_kernels(optimizer: str) -> None:
    """However many tensors there are, of two param groups with learning rates of their own."""
    params = [nn.Parameter(torch.linspace(-1, 1, 64 + number).to(DEVICE)) for number in range(4 if REHEARSAL else 60)]
    own = OPTIMIZERS[optimizer]([{"params": params[::2]}, {"params": params[1::2], "lr": 3e-3}], lr=1e-3)
    for param in params:
        param.grad = torch.ones_like(param)

    def step() -> None:
        own.param_groups[0]["lr"] *= 0.5
        own.step()

    for _ in range(WARM + 1):
        step()
    kernels = kernels_of(step)
    if not kernels and not REHEARSAL:
        pytest.skip("the profiler has seen no kernel on this machine")
    assert len(kernels) <= MOST_KERNELS[optimizer], kernels
    for name in () if REHEARSAL else ("update_", "observe_") if optimizer == "StableAdamW" else ("update_",):
        assert any(name in kernel for kernel in kernels), kernels


@pytest.mark.parametrize("optimizer", ["AdamW", "StableAdamW"])
def test_a_step_takes_no_memory_that_grows_with_the_parameters(optimizer: str) -> None:
    """Neither while it runs nor from step to step."""
    if REHEARSAL:
        pytest.skip("torch counts the memory of GPUs only")
    params = [nn.Parameter(torch.ones(4_000_000, device=DEVICE, dtype=torch.bfloat16)) for _ in range(4)]
    own = OPTIMIZERS[optimizer](params, lr=1e-3)
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(WARM + 1):
        own.step()
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(20):
        own.step()
    synchronize()
    assert torch.cuda.max_memory_allocated() - before < MOST_BYTES
    assert torch.cuda.memory_allocated() - before < MOST_BYTES / 16


def test_a_backward_pass_and_a_step_overlap_with_what_comes_before() -> None:
    """A training loop that never asks for a value never makes the host wait, gradient clipping included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 65), nn.GELU(), nn.Linear(65, 7)).to(DEVICE)
    own = so.StableAdamW(model.parameters(), lr=1e-2)
    batches = [torch.randn(16, 33).to(DEVICE) for _ in range(6)]
    losses = []
    for number, batch in enumerate(batches):
        if number < WARM:
            losses.append(_trained(model, own, batch))
            continue
        with synchronisation_is_an_error():
            losses.append(_trained(model, own, batch))
    assert torch.stack(losses).isfinite().all()
    assert own.skipped_steps == 0


def _trained(model: nn.Module, optimizer: Any, batch: Tensor) -> Tensor:
    loss = model(batch).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
