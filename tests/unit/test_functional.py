"""`DecoupledAdamW.adamw` and `DecoupledSGDW.sgdw`: one step on given tensors, called as Composer's."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sharded_optim as so

SHAPES = [(), (1,), (5,), (7, 3), (13, 11), (0,)]
STEPS = 12
ADAMW = {"beta1": 0.9, "beta2": 0.95, "initial_lr": 1e-2, "weight_decay": 5e-4, "eps": 1e-8}
SGDW = {"initial_lr": 1e-2, "weight_decay": 5e-4}


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def grads_at(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * (300.0 if step % 5 == 3 else 1.0) for shape in SHAPES]


def lr_at(step: int) -> float:
    """Not the reference learning rate, but in the first step."""
    return 1e-2 * math.cos(step / STEPS)


def zeros() -> list[Tensor]:
    return [torch.zeros(shape) for shape in SHAPES]


def assert_bitwise_equal(actual: list[Tensor], expected: list[Any]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e.detach())


def stepped_by_class(optimizer: torch.optim.Optimizer, step: int) -> None:
    group = optimizer.param_groups[0]
    group["lr"] = lr_at(step)
    for param, grad in zip(group["params"], grads_at(step), strict=True):
        param.grad = grad
    optimizer.step()


def keywords(function: Callable) -> tuple[list[str], list[str]]:
    """Names of the arguments that may be given by position, and of those that must not."""
    parameters = inspect.signature(function).parameters.values()
    assert all(parameter.default is parameter.empty for parameter in parameters)
    by_position = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    return by_position, [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def test_the_arguments_are_composers_in_its_order() -> None:
    """All required; hyperparameters by keyword only."""
    assert keywords(so.DecoupledAdamW.adamw) == (
        ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"],
        ["amsgrad", "beta1", "beta2", "lr", "initial_lr", "weight_decay", "eps"],
    )
    assert keywords(so.DecoupledSGDW.sgdw) == (
        ["params", "d_p_list", "momentum_buffer_list"],
        ["weight_decay", "momentum", "lr", "initial_lr", "dampening", "nesterov"],
    )


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_equals_the_class_bitwise(amsgrad: bool) -> None:
    """Parameters and moments over 12 steps with changing learning rates; gradients and step counters are left alone."""
    params, first, second, largest = start(), zeros(), zeros(), zeros()
    twins = [nn.Parameter(param.clone()) for param in params]
    optimizer = so.DecoupledAdamW(twins, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=5e-4, amsgrad=amsgrad)
    for step in range(STEPS):
        grads, steps = grads_at(step), [torch.tensor(step + 1.0) for _ in params]
        so.DecoupledAdamW.adamw(params, grads, first, second, largest if amsgrad else [], steps, amsgrad=amsgrad, lr=lr_at(step), **ADAMW)
        stepped_by_class(optimizer, step)
        assert_bitwise_equal(params, twins)
        assert_bitwise_equal(grads, grads_at(step))
        assert [float(each) for each in steps] == [step + 1.0] * len(params)
    states = [optimizer.state[param] for param in twins]
    assert_bitwise_equal(first, [state["exp_avg"] for state in states])
    assert_bitwise_equal(second, [state["exp_avg_sq"] for state in states])
    if amsgrad:
        assert_bitwise_equal(largest, [state["max_exp_avg_sq"] for state in states])
        assert any((a > b).any() for a, b in zip(largest, second, strict=True)), "the largest was never another"


def test_adamw_without_amsgrad_does_not_touch_the_largest_second_moments() -> None:
    params, largest = start(), [torch.full(shape, 7.0) for shape in SHAPES]
    steps = [torch.tensor(1.0) for _ in params]
    so.DecoupledAdamW.adamw(params, grads_at(0), zeros(), zeros(), largest, steps, amsgrad=False, lr=1e-2, **ADAMW)
    assert all((each == 7.0).all() for each in largest)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_step_counters_may_have_any_dtype(dtype: torch.dtype) -> None:
    stepped = []
    for counter in (torch.tensor(100.0), torch.tensor(100, dtype=dtype)):
        params, moments = [torch.ones(3)], [torch.ones(3) for _ in range(2)]
        so.DecoupledAdamW.adamw(params, [torch.ones(3)], moments[:1], moments[1:], [], [counter], amsgrad=False, lr=1e-2, **ADAMW)
        stepped += params
    assert_bitwise_equal(stepped[:1], stepped[1:])


def test_adamw_corrects_the_bias_of_each_parameter_by_its_own_step() -> None:
    """After its first step a parameter has moved by lr, whatever the others' steps. Steps may be plain numbers."""
    params, grads = [torch.zeros(3), torch.zeros(3)], [torch.tensor([1.0, -2.0, 4.0])] * 2
    moments = [torch.zeros(3) for _ in range(4)]
    so.DecoupledAdamW.adamw(params, grads, moments[:2], moments[2:], [], [1, 1000], amsgrad=False, lr=1e-2, **ADAMW)
    torch.testing.assert_close(params[0], -1e-2 * grads[0].sign(), rtol=1e-5, atol=0)
    torch.testing.assert_close(params[1], -1e-2 * 0.1 / math.sqrt(0.05) * grads[0].sign(), rtol=1e-5, atol=0)


SGD_OPTIONS = [
    {"momentum": 0.0, "dampening": 0.0, "nesterov": False},
    {"momentum": 0.9, "dampening": 0.0, "nesterov": False},
    {"momentum": 0.9, "dampening": 0.4, "nesterov": False},
    {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
]
every_sgd = pytest.mark.parametrize("options", SGD_OPTIONS, ids=["plain", "momentum", "dampening", "nesterov"])


@every_sgd
def test_sgdw_equals_the_class_bitwise(options: dict[str, Any]) -> None:
    """Parameters and buffers over 12 steps with changing learning rates; gradients are left alone."""
    params, buffers = start(), [None] * len(SHAPES)
    twins = [nn.Parameter(param.clone()) for param in params]
    optimizer = so.DecoupledSGDW(twins, lr=1e-2, weight_decay=5e-4, **options)
    for step in range(STEPS):
        grads = grads_at(step)
        so.DecoupledSGDW.sgdw(params, grads, buffers, lr=lr_at(step), **SGDW, **options)
        stepped_by_class(optimizer, step)
        assert_bitwise_equal(params, twins)
        assert_bitwise_equal(grads, grads_at(step))
    if options["momentum"]:
        assert_bitwise_equal(buffers, [optimizer.state[param]["momentum_buffer"] for param in twins])
    else:
        assert buffers == [None] * len(SHAPES)


@every_sgd
def test_a_momentum_buffer_of_none_is_replaced_by_the_gradient(options: dict[str, Any]) -> None:
    """In the caller's list, by a tensor of its own, next to buffers that have begun and keep theirs; dampening comes later."""
    params, grads = [torch.ones(3), torch.ones(3)], [torch.tensor([1.0, -2.0, 4.0]), torch.ones(3)]
    begun = torch.full((3,), 2.0)
    buffers = [None, begun]
    so.DecoupledSGDW.sgdw(params, grads, buffers, lr=1e-2, **SGDW, **options)
    assert buffers[1] is begun
    if options["momentum"]:
        assert isinstance(buffers[0], Tensor)
        assert torch.equal(buffers[0], grads[0])
        assert buffers[0].data_ptr() != grads[0].data_ptr()
        torch.testing.assert_close(begun, torch.full((3,), 2.0 * 0.9 + 1.0 - options["dampening"]))
    else:
        assert buffers[0] is None
        assert torch.equal(begun, torch.full((3,), 2.0))


def test_empty_lists_are_a_step_of_nothing() -> None:
    params, buffers = [], []
    so.DecoupledAdamW.adamw(params, [], [], [], [], [], amsgrad=False, lr=1e-2, **ADAMW)
    so.DecoupledAdamW.adamw(params, [], [], [], [], [], amsgrad=True, lr=1e-2, **ADAMW)
    for options in SGD_OPTIONS:
        so.DecoupledSGDW.sgdw(params, [], buffers, lr=1e-2, **SGDW, **options)
    assert (params, buffers) == ([], [])


def test_lists_of_different_lengths_are_an_error() -> None:
    steps = [torch.tensor(1.0) for _ in SHAPES]
    with pytest.raises(ValueError, match=r"grads must have one tensor for each of \d+ params, got \d+"):
        so.DecoupledAdamW.adamw(start(), grads_at(0)[:-1], zeros(), zeros(), [], steps, amsgrad=False, lr=1e-2, **ADAMW)
    with pytest.raises(ValueError, match=r"max_exp_avg_sq must have one tensor for each of \d+ params, got 0"):
        so.DecoupledAdamW.adamw(start(), grads_at(0), zeros(), zeros(), [], steps, amsgrad=True, lr=1e-2, **ADAMW)
    with pytest.raises(ValueError, match=r"momentum_buffer must have one tensor for each of \d+ params, got 1"):
        so.DecoupledSGDW.sgdw(start(), grads_at(0), [None], lr=1e-2, momentum=0.9, dampening=0.0, nesterov=False, **SGDW)


def test_an_initial_lr_of_0_decays_nothing() -> None:
    """Composer's decays by the whole weight_decay there."""
    for grad, weight_decay in ((0.0, 0.1), (1.0, 0.1), (1.0, 0.0)):
        adamw, sgdw = torch.ones(3), torch.ones(3)
        grads, moments, steps = [torch.full((3,), grad)], [torch.zeros(3), torch.zeros(3)], [torch.tensor(1.0)]
        options = ADAMW | {"initial_lr": 0.0, "weight_decay": weight_decay}
        so.DecoupledAdamW.adamw([adamw], grads, moments[:1], moments[1:], [], steps, amsgrad=False, lr=1e-2, **options)
        options = {"initial_lr": 0.0, "weight_decay": weight_decay, "momentum": 0.9, "dampening": 0.0, "nesterov": False}
        so.DecoupledSGDW.sgdw([sgdw], grads, [None], lr=1e-2, **options)
        torch.testing.assert_close(adamw, torch.full((3,), 1.0 - 1e-2 * grad), rtol=1e-6, atol=0)
        torch.testing.assert_close(sgdw, torch.full((3,), 1.0 - 1e-2 * grad), rtol=1e-6, atol=0)


def test_parameters_of_a_model_are_stepped_in_place_without_a_graph() -> None:
    """Leaves that require gradients may be given as they are."""
    param = nn.Parameter(torch.ones(5))
    version = param._version
    so.DecoupledSGDW.sgdw([param], [torch.ones(5)], [None], lr=1e-2, momentum=0.9, dampening=0.0, nesterov=False, **SGDW)
    assert param._version > version
    assert param.is_leaf
    assert param.requires_grad
    torch.testing.assert_close(param.detach(), torch.full((5,), 1.0 - 5e-4 - 1e-2))


def test_tensors_that_do_not_fit_their_parameter_are_refused() -> None:
    """Compiled kernels would read and write beyond them."""
    param, big = torch.ones(6), torch.ones(6)
    moments = [torch.zeros(6)], [torch.zeros(6)]
    options: dict = {"amsgrad": False, "beta1": 0.9, "beta2": 0.99, "lr": 0.1, "initial_lr": 0.1, "weight_decay": 0.0, "eps": 1e-8}
    step = [torch.tensor(1.0)]
    with pytest.raises(ValueError, match=r"gradient of 'params\[0\]' has shape \(3,\), the parameter \(6,\)"):
        so.DecoupledAdamW.adamw([param], [big[:3]], *moments, [], step, **options)
    with pytest.raises(ValueError, match=r"exp_avg_sq of 'params\[0\]' has shape \(3,\)"):
        so.DecoupledAdamW.adamw([param], [big], moments[0], [torch.zeros(3)], [], step, **options)
    grads = [big, torch._efficientzerotensor(6)]
    with pytest.raises(ValueError, match=r"gradient of 'params\[1\]' has no memory"):
        so.DecoupledAdamW.adamw([param, big.clone()], grads, *([each[0], each[0].clone()] for each in moments), [], 2 * step, **options)
    assert torch.equal(param, torch.ones(6))
