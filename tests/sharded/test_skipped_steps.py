"""A job that skips one step after the other stops, on all ranks, and says which gradients went wrong first."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import sharded_optim as so
from sharded_optim.step.agreement import Streak

NAN = float("nan")
AdamW = partial(so.AdamW, nonfinite="skip")


def stepped(optimizer: Any, params: dict[str, nn.Parameter], bad: Sequence[str] = ()) -> None:
    for name, param in params.items():
        param.grad = torch.full_like(param, NAN if name in bad else 0.5)
    optimizer.step()


def parameters(count: int = 2) -> dict[str, nn.Parameter]:
    return {f"w{index}": nn.Parameter(torch.ones(index + 1)) for index in range(count)}


def snapshot(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter]) -> list[Tensor]:
    return [tensor.detach().clone() for param in params.values() for tensor in (param, *optimizer.state[param].values())]


def assert_equal(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("make", [so.StableAdamW, AdamW])
def test_the_nth_in_a_row_raises_and_names_what_was_wrong_in_the_first(make: Callable[..., Any]) -> None:
    params = parameters()
    optimizer = make(list(params.items()), lr=1e-2, max_skipped_steps=3)
    stepped(optimizer, params)
    before = snapshot(optimizer, params)
    for _ in range(2):  # a step that happens begins anew
        stepped(optimizer, params, ["w0"])
        stepped(optimizer, params, ["w0", "w1"])
        assert_equal(before, snapshot(optimizer, params))
        stepped(optimizer, params)
        before = snapshot(optimizer, params)
    stepped(optimizer, params, ["w1"])
    stepped(optimizer, params, ["w0"])
    for count in (3, 4):
        with pytest.raises(
            FloatingPointError, match=rf"{count} steps in a row were skipped.*first of them: 'w1' on 1 rank\. .*Lower the lear"
        ):
            stepped(optimizer, params, ["w0"])
        assert_equal(before, snapshot(optimizer, params))
        assert optimizer.skipped_steps == 4 + count
    stepped(optimizer, params)
    assert all(not torch.equal(a, b) for a, b in zip(before, snapshot(optimizer, params), strict=True))
    stepped(optimizer, params, ["w0"])


@pytest.mark.parametrize("limit", [1, 100])
def test_a_hundred_in_a_row_by_default_and_any_number_without_limit(limit: int) -> None:
    params = parameters(11)
    optimizer = so.StableAdamW(list(params.items()), lr=1e-2, **({} if limit == 100 else {"max_skipped_steps": limit}))
    for _ in range(limit - 1):
        stepped(optimizer, params, list(params))
    with pytest.raises(FloatingPointError, match=rf"^{limit} steps.*'w7' on 1 rank and 3 more\."):
        stepped(optimizer, params, list(params))
    assert optimizer.skipped_steps == limit
    optimizer = so.StableAdamW(list(params.items()), lr=1e-2, max_skipped_steps=None)
    for _ in range(150):
        stepped(optimizer, params, ["w1"])
    assert optimizer.skipped_steps == 150


@pytest.mark.parametrize("cls", [so.Adam, so.AdamW, so.DecoupledAdamW, so.DecoupledSGDW, so.StableAdamW])
@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3"])
def test_limits_that_are_none_are_refused(cls: type, limit: Any) -> None:
    with pytest.raises(ValueError, match=r"max_skipped_steps must be a positive int, or None for no limit, got"):
        cls([nn.Parameter(torch.ones(2))], lr=1e-3, max_skipped_steps=limit)


def test_what_nothing_is_agreed_on_about_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streak, "count", lambda *_, **__: pytest.fail("counted"))
    for options in ({}, {"nonfinite": "allow"}, {"nonfinite": "skip", "max_skipped_steps": None}):
        params = parameters()
        optimizer = so.AdamW(list(params.items()), lr=1e-2, **{"max_skipped_steps": 1, **options})
        for _ in range(3):
            stepped(optimizer, params, ["w0"])
    params = parameters()
    optimizer = so.StableAdamW(list(params.items()), lr=1e-2, max_skipped_steps=1)
    for _ in range(3):  # nor costs anything as long as all is well
        stepped(optimizer, params)


def test_copies_have_the_limit_and_begin_anew() -> None:
    params = parameters()
    optimizer = so.StableAdamW(list(params.items()), lr=1e-2, max_skipped_steps=2)
    stepped(optimizer, params, ["w0"])
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        own = {f"w{index}": param for index, param in enumerate(copied.param_groups[0]["params"])}
        stepped(copied, own, ["w1"])
        with pytest.raises(FloatingPointError, match=r"'w1' on 1 rank\."):
            stepped(copied, own, ["w0"])
    with pytest.raises(FloatingPointError, match=r"'w0' on 1 rank\."):
        stepped(optimizer, params, ["w1"])


def check_grad_scaler(*, deferred: bool) -> None:
    params = parameters()
    optimizer = so.StableAdamW(list(params.items()), lr=1e-2, max_skipped_steps=2)
    stepped(optimizer, params, ["w1"])
    optimizer.found_inf = torch.tensor(1.0)  # of something else: the gradients are finite
    for _ in range(3):
        stepped(optimizer, params)
    optimizer.found_inf = torch.tensor(0.0)
    before = snapshot(optimizer, params)
    if deferred:
        stepped(optimizer, params, ["w0"])
    with pytest.raises(FloatingPointError, match=r"2 steps in a row.*'w1' on 1 rank\."):
        stepped(optimizer, params, ["w0"])
    assert_equal(before, snapshot(optimizer, params))
    assert optimizer.skipped_steps == 5


def test_what_grad_scaler_alone_has_stopped_neither_counts_nor_ends_a_streak() -> None:
    check_grad_scaler(deferred=False)


@pytest.mark.usefixtures("cpu_is_a_device")
def test_what_grad_scaler_alone_has_stopped_on_a_device() -> None:
    check_grad_scaler(deferred=True)


@pytest.mark.usefixtures("cpu_is_a_device")
@pytest.mark.parametrize("make", [so.StableAdamW, AdamW])
def test_on_a_device_the_next_step_raises(make: Callable[..., Any]) -> None:
    """In exactly the next, so on all ranks in the same; it does nothing, and the one after it goes on."""
    params = parameters()
    optimizer = make(list(params.items()), lr=1e-2, max_skipped_steps=2)
    for bad in ([], ["w0"], [], ["w1"], ["w0"]):
        stepped(optimizer, params, bad)
    before = snapshot(optimizer, params)
    with pytest.raises(FloatingPointError, match=r"2 steps in a row.*'w1' on 1 rank\."):
        stepped(optimizer, params)
    assert_equal(before, snapshot(optimizer, params))
    stepped(optimizer, params)
    assert all(not torch.equal(a, b) for a, b in zip(before, snapshot(optimizer, params), strict=True))
    for bad in (["w0"], [], ["w0"], []):
        stepped(optimizer, params, bad)
    assert optimizer.skipped_steps == 5


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", ["fsdp2", "zero1", "zero2"])
def test_a_rank_alone_with_nan_stops_all(kind: str) -> None:
    """With the same message, in the same step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    if kind == "fsdp2":
        fully_shard(model)
        optimizer: Any = so.StableAdamW(model.named_parameters(), lr=1e-2, max_skipped_steps=2)
    else:
        optimizer = so.ShardedOptimizer(model, so.StableAdamW, lr=1e-2, max_skipped_steps=2, stage=1 if kind == "zero1" else 2)

    def step(*, bad: bool) -> None:
        for name, param in model.named_parameters():
            grad = torch.ones_like(param)
            if bad and name == "1.weight":
                local = grad.to_local() if isinstance(grad, DTensor) else grad
                if kind != "fsdp2" or dist.get_rank() == 1:
                    local.view(-1)[-1] = NAN  # of the last element, which is on rank 1
            param.grad = grad
        optimizer.step()
        optimizer.zero_grad()

    def values() -> list[Tensor]:
        tensors = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
        return [(each.to_local() if isinstance(each, DTensor) else each).detach().clone() for each in tensors]

    step(bad=False)
    step(bad=True)
    step(bad=False)
    before = values()
    step(bad=True)
    holder = 1 if kind == "fsdp2" else 0  # there the last element is on rank 1; ZeRO's buckets are cut elsewhere
    with pytest.raises(
        FloatingPointError, match=rf"2 steps in a row .*'1.weight' on 1 rank\. .*held by rank {holder} were not finite\."
    ) as raised:
        step(bad=True)
    messages: list[Any] = [None, None]
    dist.all_gather_object(messages, str(raised.value))
    assert len(set(messages)) == 1
    optimizer.zero_grad()
    assert_equal(before, values())
    step(bad=False)
    assert any(not torch.equal(a, b) for a, b in zip(before, values(), strict=True)), kind
