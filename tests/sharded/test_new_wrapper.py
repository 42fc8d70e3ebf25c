"""A wrapper is one file and its registration: steps, gradient release and checkpoints know it then. See `toy_wrapper.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import ranks
import torch
import torch.distributed as dist
from test_training import Model
from torch import Tensor, nn
from toy_wrapper import CutRows, Unreduced

import sharded_optim as so
from sharded_optim.sharding import Wrapper, describe
from sharded_optim.sharding.wrappers import WRAPPERS

STEPS = 6
MORE = 2
REGISTRATION = ("toy_wrapper", "toy_wrapper")


def stable_adamw(model: nn.Module, **options: Any) -> so.StableAdamW:
    return so.StableAdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, weight: float = 1.0) -> None:
    """Weighted losses of the same spiky batches.

    Args:
        weight: of the losses; over ranks, 1 on the average.
    """
    for step in steps:
        x = torch.randn(12, 17, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x).square().mean() * {3: 100.0, 6: 30.0}.get(step, 1.0) * weight).backward()
        optimizer.step()


def trained(steps: int) -> tuple[Model, so.StableAdamW]:
    """In one process."""
    model = Model()
    optimizer = stable_adamw(model)
    train(model, optimizer, range(steps))
    return model, optimizer


def assert_rows_of(model: nn.Module, expected: nn.Module) -> None:
    for shard, whole in zip(model.parameters(), expected.parameters(), strict=True):
        rows = torch.arange(len(whole)).tensor_split(dist.get_world_size())[dist.get_rank()] if whole.ndim > 1 else slice(None)
        assert torch.equal(shard, whole[rows])


def check_steps(weight: float, folder: str) -> None:
    model = CutRows(Model())
    piece = describe(model.inner.get_parameter("1.weight"), "1.weight").pieces[0].segment
    assert (piece.shape, piece.numel) == ((34, 17), 34 * 17 // 2)
    optimizer = stable_adamw(model)
    train(model, optimizer, range(STEPS), weight)
    assert isinstance(model.inner.get_parameter("0.weight").grad, Unreduced)  # so the step has reduced it
    assert_rows_of(model, trained(STEPS)[0])
    so.checkpoint.save(folder, STEPS, model=model, optimizer=optimizer)


def check_loading(weight: float, folder: str) -> None:
    """Of what one process has saved."""
    model = CutRows(Model())
    optimizer = stable_adamw(model)
    so.checkpoint.load(folder, model=model, optimizer=optimizer)
    train(model, optimizer, range(STEPS, STEPS + MORE), weight)
    assert_rows_of(model, trained(STEPS + MORE)[0])


def check_gradient_release(weight: float) -> None:
    """The parameters of a unit are stepped together."""
    model = CutRows(Model())
    optimizer = stable_adamw(model, gradient_release=True)
    so.prepare_for_gradient_release(model, optimizer, ignore_existing_hooks=True)
    stepped: list[int] = []
    step: Callable[..., Any] = optimizer.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "step", lambda *args, param=None: (stepped.append(len(param or ())), step(*args, param=param)))
        train(model, optimizer, range(STEPS), weight)
    assert stepped == [len(list(model.parameters())), 0] * STEPS  # 0: the call in the loop
    assert all(param.grad is None for param in model.parameters())
    assert_rows_of(model, trained(STEPS)[0])


def check_everything(saved: str, plain: str) -> None:
    WRAPPERS.update([REGISTRATION])
    weight = 2.0 * dist.get_rank()  # the mean of ranks' gradients is exactly the gradient of one process
    check_steps(weight, saved)
    check_loading(weight, plain)
    check_gradient_release(weight)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As ranks have: torch's products of matrices have other last bits on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_it_takes_one_new_file_and_its_registration(tmp_path: Path) -> None:
    """Then it is stepped, saved, loaded and released with the bits of one process, and its checkpoints are everybody's."""
    saved, plain = str(tmp_path / "saved"), str(tmp_path / "plain")
    model, optimizer = trained(STEPS)
    so.checkpoint.save(plain, STEPS, model=model, optimizer=optimizer)
    ranks.run(check_everything, 2, saved, plain)
    other = Model()
    optimizer = stable_adamw(other)
    so.checkpoint.load(saved, model=other, optimizer=optimizer)
    train(other, optimizer, range(STEPS, STEPS + MORE))
    for actual, expected in zip(other.parameters(), trained(STEPS + MORE)[0].parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_what_a_wrapper_cannot_do_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a registered wrapper raises of a model is what gradient release and checkpoints raise, before anything has changed."""

    def refuse(*_: object) -> NoReturn:
        raise ValueError("CutRows cannot do this")

    monkeypatch.setitem(sys.modules, "refusing_wrapper", SimpleNamespace(WRAPPER=Wrapper(name="CutRows", units=refuse, content=refuse)))
    monkeypatch.setitem(WRAPPERS, "refusing_wrapper", "refusing_wrapper")
    model = Model()
    optimizer = stable_adamw(model, gradient_release=True)
    with pytest.raises(ValueError, match="CutRows cannot do this"):
        so.prepare_for_gradient_release(model, optimizer)
    with pytest.raises(so.checkpoint.CheckpointError, match="CutRows cannot do this"):
        so.checkpoint.save(tmp_path, 1, model=model)
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


@pytest.mark.parametrize("marked", ["float_param", "integer_param", "buffer"])
def test_every_tensor_that_a_wrapper_claims_is_described_by_it(marked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also ordinary tensors that it only marks, and those that no optimizer steps: they may be parts too."""

    def refuse(_: Tensor, name: str) -> NoReturn:
        raise ValueError(f"{name} is described by the wrapper")

    marking = Wrapper(name="Marking", claims=lambda tensor: hasattr(tensor, "is_marked"), describe=refuse)
    monkeypatch.setitem(sys.modules, "marking_wrapper", SimpleNamespace(WRAPPER=marking))
    monkeypatch.setitem(WRAPPERS, "marking_wrapper", "marking_wrapper")
    model = nn.Module()
    model.float_param = nn.Parameter(torch.ones(4))
    model.integer_param = nn.Parameter(torch.arange(4), requires_grad=False)
    model.register_buffer("buffer", torch.ones(4))
    getattr(model, marked).is_marked = True
    with pytest.raises(so.checkpoint.CheckpointError, match=f"{marked} is described by the wrapper"):
        so.checkpoint.save(tmp_path, 1, model=model)
