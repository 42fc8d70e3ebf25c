"""Where the verdict on a step is known on the device only: values are selected there, and errors come one step later.

There is no GPU where these tests run, so the CPU is declared to be a device that the host must not wait for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from fake_device import FakeEvent
from torch import Tensor, nn
from toy_optimizer import ThresholdAdamW
from variants import CPU_BACKENDS

import sharded_optim as so
from sharded_optim.formulas import scalars
from sharded_optim.formulas.verdict import INVALID
from sharded_optim.step import agreement, param_set
from sharded_optim.storage.devices import DeviceCache


def as_if_another_rank_met_bad_input(contributed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def changed(*args: object, **options: object) -> Tensor:
        vector = contributed(*args, **options)
        vector[INVALID] = 1
        return vector

    return changed


OPTIMIZERS = {
    "Adam": partial(so.Adam, weight_decay=0.1),
    "AdamW": so.AdamW,
    "DecoupledAdamW": partial(so.DecoupledAdamW, amsgrad=True),
    "DecoupledSGDW": partial(so.DecoupledSGDW, momentum=0.9, dampening=0.3, weight_decay=1e-4),
    "StableAdamW": so.StableAdamW,
    "StableAdamW-stochastic": partial(so.StableAdamW, stochastic_rounding=True),
    "ThresholdAdamW": partial(ThresholdAdamW, threshold=0.3),
}


def run(make: Callable, nan_at: int | None, backend: str = "auto", steps: int = 8) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (1, 5)] + [nn.Parameter(torch.linspace(-1, 1, 64).bfloat16())]
    optimizer = make([{"params": params[:2]}, {"params": params[2:], "lr": 3e-2}], lr=1e-2, nonfinite="skip", backend=backend)
    for step in range(steps):
        for index, param in enumerate(params):
            grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + index)) * 10 ** (step % 3)
            param.grad = grad.to(param.dtype)
        if step == nan_at:
            params[1].grad[3] = torch.nan
        if step == 5:
            params[0].grad = None
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("nan_at", [None, 0, 4])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_selecting_on_the_device_gives_the_bits_of_branching_on_the_host(name: str, nan_at: int | None, backend: str, request) -> None:
    """Parameters, Kahan compensation, moments, step counters and the count of skipped steps."""
    expected = run(OPTIMIZERS[name], nan_at)
    request.getfixturevalue("cpu_is_a_device")
    assert_same(run(OPTIMIZERS[name], nan_at, backend), expected, skipped=nan_at is not None)


@pytest.mark.parametrize("name", ["DecoupledSGDW", "StableAdamW-stochastic", "ThresholdAdamW"])
def test_steps_of_kernels_alone_give_the_bits_of_branching_on_the_host(name: str, request) -> None:
    """The same in Triton's interpreter, with coefficients and learning-rate scales from a kernel, which takes half a second for a step."""
    expected = run(OPTIMIZERS[name], 1, steps=3)
    request.getfixturevalue("cpu_is_a_device")
    request.getfixturevalue("interpreter")
    assert_same(run(OPTIMIZERS[name], 1, "triton", steps=3), expected, skipped=True)


def assert_same(
    actual: tuple[list[nn.Parameter], torch.optim.Optimizer], expected: tuple[list[nn.Parameter], torch.optim.Optimizer], *, skipped: bool
) -> None:
    (params, optimizer), (others, reference) = actual, expected
    assert optimizer.skipped_steps == reference.skipped_steps == skipped
    for a, e in zip(params, others, strict=True):
        assert torch.equal(a, e)
        for key, value in reference.state[e].items():
            assert torch.equal(optimizer.state[a][key], value)


@pytest.mark.usefixtures("cpu_is_a_device")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_reads_nothing_from_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But the verdict on the step before, which is copied as soon as it is there."""
    monkeypatch.setattr(agreement.Agreement, "raise_pending", lambda *_: None)
    monkeypatch.setitem(scalars.FUNCTIONS, "sqrt", torch.sqrt)  # what it is on a device
    params = [nn.Parameter(torch.ones(n)) for n in (3, 5)]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 3e-2}]
    optimizer = OPTIMIZERS[name](groups, lr=1e-2, nonfinite="skip", backend="eager")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for method in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, method, lambda self, method=method: pytest.fail(f"Tensor.{method} was called"))
    optimizer.step()


@pytest.mark.usefixtures("cpu_is_a_device")
def test_an_inconsistency_is_raised_in_the_next_step_and_nothing_is_written_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """In exactly the next: ranks that raised in different steps would leave each other in the all-reduce."""
    param = nn.Parameter(torch.ones(3))
    optimizer = so.StableAdamW([("w", param)], lr=1e-2)
    param.grad = torch.ones(3)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[param]), param.detach().clone()

    monkeypatch.setattr(agreement, "_contributed", as_if_another_rank_met_bad_input(agreement._contributed))
    optimizer.step()
    assert torch.equal(param.detach(), before[1])
    assert all(torch.equal(optimizer.state[param][key], value) for key, value in before[0].items())
    with pytest.raises(ValueError, match=r"bad input on 1 other ranks"):
        optimizer.step()
    assert FakeEvent.waits == 2, "once for each step that followed an agreement"


@pytest.mark.usefixtures("cpu_is_a_device")
@pytest.mark.parametrize("change", ["replaced", "removed", "evicted"])
def test_what_a_set_has_left_to_be_raised_is_raised_though_the_set_is_dropped(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(11)]
    optimizer = so.StableAdamW([{"params": [(f"w{index}", param)]} for index, param in enumerate(params)], lr=1e-2)

    def give(*changed: nn.Parameter) -> None:
        for param in (*params, *changed):
            param.grad = torch.ones(3)

    give()
    optimizer.step()
    optimizer.step(param=(params[0], params[1]))
    with monkeypatch.context() as patch:
        patch.setattr(agreement, "_contributed", as_if_another_rank_met_bad_input(agreement._contributed))
        give()
        optimizer.step(param=(params[0], params[1]))
    new = nn.Parameter(torch.ones(3))
    give(new)
    steps: list[tuple[nn.Parameter, ...] | None] = [(params[0], other) for other in params[2:]]
    if change == "replaced":
        optimizer.param_groups[0]["params"][0] = new
        steps = [(new, params[1])]
    elif change == "removed":
        del optimizer.param_groups[:2]
        steps = [None]

    def go_on() -> None:
        for only in steps:
            optimizer.step(param=only)

    with pytest.raises(ValueError, match=r"bad input on \d+ other ranks"):
        go_on()
    optimizer.step()


@pytest.mark.usefixtures("cpu_is_a_device")
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_what_was_observed_early_is_forgotten_when_a_part_is_stepped(backend: str) -> None:
    """A device tells nobody what a step has written."""
    ends = []
    for early in (True, False):
        params = [nn.Parameter(torch.ones(count)) for count in (3, 5)]
        optimizer = so.StableAdamW([(f"w{index}", param) for index, param in enumerate(params)], lr=1e-2, backend=backend)
        for scale in (1.0, 30.0):
            for index, param in enumerate(params):
                param.grad = scale * torch.randn(param.shape, generator=torch.Generator().manual_seed(index))
            if scale == 1.0:
                optimizer.step()
                optimizer.step(param=params[0])
            elif early:
                optimizer.observe_unit(0)
        optimizer.step(param=params[0])
        optimizer.step()
        ends.append(params)
    assert all(map(torch.equal, *ends))


@pytest.mark.usefixtures("cpu_is_a_device")
def test_a_rank_that_meets_bad_input_raises_after_the_others_have_heard_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    def record(*args, agree=agreement.agree, **options) -> agreement.Agreement:
        heard.append(options["invalid"])
        return agree(*args, **options)

    monkeypatch.setattr(param_set, "agree", record)
    param = nn.Parameter(torch.ones(3))
    optimizer = so.StableAdamW([("w", param)], lr=1e-2)
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="gradient of 'w' is sparse"):
        optimizer.step()
    assert heard == [True]


@pytest.mark.usefixtures("cpu_is_a_device")
def test_a_tensor_lr_is_read_where_it_is() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    for param, lr in ((a, torch.tensor(1e-2)), (b, float(torch.tensor(1e-2)))):
        optimizer = so.AdamW([param], lr=lr)
        for step in range(3):
            param.grad = torch.full((3,), step - 1.5)
            optimizer.step()
    assert torch.equal(a, b)


def test_values_that_were_sent_to_one_device_are_sent_to_another() -> None:
    cache: DeviceCache[torch.Tensor] = DeviceCache()
    for device in (torch.device("cpu"), torch.device("meta"), torch.device("cpu")):
        assert cache.of([], device, lambda device=device: torch.zeros(1, device=device)).device == device
