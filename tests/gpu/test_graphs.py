"""A whole `optimizer.step()` in a CUDA graph: each replay is a step, with the bits of one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operand_cases import GROUP, Case, assert_same
from torch import Tensor

from gpu.device import BACKEND, DEVICE, REHEARSAL, capture, on_a_stream, synchronisation_is_an_error, synchronize
from gpu.runs import CPU, Run, assert_alike
from sharded_optim.backends import choose, eager
from sharded_optim.optimizers.adam import ADAM

WARM = 3  # steps on a stream of their own, as torch asks for before a capture
REPLAYS = 4
AFTER = 2
CELLS = [
    ("AdamW", "fp32", {}),
    ("StableAdamW", "fp32", {}),
    ("AdamW", "bf16_kahan", {}),
    ("StableAdamW", "bf16_kahan", {}),
    ("StableAdamW", "bf16_stochastic", {}),
    ("AdamW", "fp32", {"foreach": False}),
    ("StableAdamW", "fp32", {"foreach": False}),
    ("AdamW", "fp32", {"nonfinite": "skip"}),
    ("amsgrad", "fp32", {}),
    ("DecoupledAdamW", "bf16", {}),
    ("momentum", "bf16_kahan", {}),
    ("SGDW", "fp32", {}),
]


def named(value: Any) -> str:
    return value if isinstance(value, str) else " ".join(f"{key}={each}" for key, each in value.items()) or "plain"


def captured(run: Run, grads: list[list[Tensor]], static: list[Tensor], change: Callable[[], object] = lambda: None) -> Any:
    """Warm up with the first gradients, change something, and capture a step."""
    run.give(list(static))
    with on_a_stream():
        for own in grads[:WARM]:
            run.fill(own)
            run.optimizer.step()
    synchronize()
    change()
    graph = capture(run.optimizer.step)
    synchronize()
    return graph


@pytest.mark.parametrize(("optimizer", "storage", "options"), CELLS, ids=named)
def test_replays_give_the_bits_of_steps(optimizer: str, storage: str, options: dict[str, Any]) -> None:
    """Gradients change in place; step counters go on, in replays as in the ordinary steps that follow."""
    run, reference = Run(optimizer, storage, **options), Run(optimizer, storage, CPU, "eager", **options)
    grads = [run.gradients(step) for step in range(WARM + REPLAYS + AFTER)]
    static = [torch.zeros_like(grad) for grad in grads[0]]
    graph = captured(run, grads, static)
    for step in range(WARM):
        reference.give(list(reference.gradients(step)))
        reference.optimizer.step()
    assert_alike(run, reference)  # to capture is not to step
    for step in range(WARM, WARM + REPLAYS + AFTER):
        run.fill(grads[step])
        if step < WARM + REPLAYS:
            with synchronisation_is_an_error():
                graph.replay()
        else:
            run.optimizer.step()
        reference.give(list(reference.gradients(step)))
        reference.optimizer.step()
    synchronize()
    assert_alike(run, reference)
    assert run.optimizer.skipped_steps == 0


@pytest.mark.parametrize("optimizer", ["AdamW", "StableAdamW"])
def test_a_learning_rate_that_is_a_tensor_changes_between_replays(optimizer: str) -> None:
    own = [
        Run(optimizer, "fp32", device, backend, lr=torch.tensor(1e-2, device=device))
        for device, backend in ((DEVICE, BACKEND), (CPU, "eager"))
    ]
    run, reference = own
    grads = [run.gradients(step) for step in range(WARM + REPLAYS)]
    graph = captured(run, grads, [torch.zeros_like(grad) for grad in grads[0]])
    for step in range(WARM + REPLAYS):
        if step >= WARM:
            for each in own:
                for group in each.optimizer.param_groups:
                    group["lr"].mul_(0.5)
            run.fill(grads[step])
            graph.replay()
        reference.give(list(reference.gradients(step)))
        reference.optimizer.step()
    synchronize()
    assert_alike(run, reference)


def test_a_replay_whose_gradients_are_not_finite_is_no_step() -> None:
    """It is skipped and counted, as an ordinary one."""
    run, reference = Run("StableAdamW"), Run("StableAdamW", "fp32", CPU, "eager")
    grads = [run.gradients(step) for step in range(WARM + REPLAYS)]
    graph = captured(run, grads, [torch.zeros_like(grad) for grad in grads[0]])
    spoiled = WARM + 1
    grads[spoiled][5][3] = math.nan
    for step in range(WARM + REPLAYS):
        if step >= WARM:
            run.fill(grads[step])
            graph.replay()
        if step != spoiled:
            reference.give(list(reference.gradients(step)))
            reference.optimizer.step()
    synchronize()
    assert_alike(run, reference)
    assert run.optimizer.skipped_steps == 1


@pytest.mark.parametrize("change", ["learning rate", "gradients"])
@pytest.mark.parametrize("optimizer", ["AdamW", "StableAdamW"])
def test_what_has_changed_since_the_step_before_is_captured(optimizer: str, change: str) -> None:
    """The captured step then copies it to the device, and so does each replay."""
    run, reference = Run(optimizer, "bf16_kahan"), Run(optimizer, "bf16_kahan", CPU, "eager")
    grads = [run.gradients(step) for step in range(WARM + REPLAYS)]
    moved = [torch.zeros_like(grad) for grad in grads[0]]
    changes = {"learning rate": run.schedule.step, "gradients": lambda: run.give(list(moved))}
    graph = captured(run, grads, [torch.zeros_like(grad) for grad in grads[0]], changes[change])
    for step in range(WARM + REPLAYS):
        if step >= WARM:
            run.fill(grads[step])
            graph.replay()
        if step == WARM and change == "learning rate":
            reference.schedule.step()
        reference.give(list(reference.gradients(step)))
        reference.optimizer.step()
    synchronize()
    assert_alike(run, reference)


@torch.no_grad()
def test_a_graph_keeps_what_it_reads() -> None:
    """Steps with other hyperparameters and gradients replace what it reads; if nothing kept that, others would be given the memory."""
    storage = "bf16_kahan_stochastic"
    run, reference = Run("StableAdamW", storage), Run("StableAdamW", storage, CPU, "eager")
    grads = [run.gradients(step) for step in range(WARM + REPLAYS)]
    static, moved = ([torch.zeros_like(grad) for grad in grads[0]] for _ in range(2))
    graph = captured(run, grads, moved, lambda: (run.schedule.step(), run.give(list(static))))
    tensors = [*run.params, *(value for param in run.params for value in run.optimizer.state[param].values())]
    before = [tensor.clone() for tensor in tensors], [dict(group) for group in run.optimizer.param_groups]
    for step in range(3):
        for group in run.optimizer.param_groups:
            group |= {"lr": 0.1 / (1 + step), "betas": (0.5, 0.8 + 0.01 * step), "rounding_seed": 100 + step}
        run.give(list(run.gradients(step)))
        run.optimizer.step()
    synchronize()
    # Of all sizes that tables have, on the device and where the host copies from.
    rubbish = [torch.full((numel,), -1, dtype=torch.int64, device=DEVICE) for numel in range(1, 2 if REHEARSAL else 4000)]
    if not REHEARSAL:
        rubbish += [torch.full((2**power,), -1, dtype=torch.int64).pin_memory() for power in range(12) for _ in range(100)]
    for tensor, value in zip(tensors, before[0], strict=True):
        tensor.copy_(value)
    for group, values in zip(run.optimizer.param_groups, before[1], strict=True):
        group |= values
    run.give(list(static))
    for step in range(WARM + REPLAYS):
        if step >= WARM:
            run.fill(grads[step])
            graph.replay()
        if step == WARM:
            reference.schedule.step()
        reference.give(list(reference.gradients(step)))
        reference.optimizer.step()
    synchronize()
    assert_alike(run, reference)
    del rubbish


def test_a_graph_of_the_backend_alone_keeps_what_it_reads() -> None:
    """Also when the backend is called with other tensors in between."""
    case = Case(algorithm=ADAM, fmt="bf16_kahan", grad="bf16", shapes=[(71,), (33, 2)] if REHEARSAL else [(100_003,), (4096,), (33, 1000)])
    expected, actual, other = case.operands(), case.operands(DEVICE.type), case.operands(DEVICE.type)
    coefficients = case.coefficients(expected, GROUP)
    on_device = coefficients.to(DEVICE)
    own, _ = choose(("triton",), DEVICE, frozenset({torch.float32}))
    for _ in range(3):
        eager.BACKEND.update(ADAM, expected, coefficients, None, None, None)
    own.update(ADAM, actual, on_device, None, None, None)
    graph = capture(lambda: own.update(ADAM, actual, on_device, None, None, None))
    graph.replay()
    home = actual.grad.tensors, actual.grad.addresses
    actual.grad.renew(other.grad.tensors, other.grad.addresses)
    own.update(ADAM, actual, on_device * 0, torch.tensor(False).to(DEVICE), None, None)
    actual.grad.renew(*home)
    graph.replay()
    for a, e in zip(actual.param.tensors, expected.param.tensors, strict=True):
        assert_same(a, e, "param")
