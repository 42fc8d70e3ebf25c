"""torch's Join, in which ranks run out of inputs: refused on all ranks where a step is a collective, before one can wait for another."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import sharded_optim as so

Make = Callable[[DistributedDataParallel], Any]  # an optimizer

COLLECTIVE: dict[str, Make] = {
    "StableAdamW": lambda model: so.StableAdamW(model.parameters(), lr=1e-2),
    "AdamW that skips": lambda model: so.AdamW(model.parameters(), lr=1e-2, nonfinite="skip"),
    "ShardedOptimizer": lambda model: so.ShardedOptimizer(model, so.AdamW, lr=1e-2),
    "ShardedOptimizer of parameters": lambda model: so.ShardedOptimizer(list(model.module.parameters()), so.AdamW, lr=1e-2),
}
LOCAL: dict[str, Make] = {"AdamW": lambda model: so.AdamW(model.parameters(), lr=1e-2)}


def train(model: nn.Module, optimizer: Any, batches: int) -> None:
    for batch in range(batches):
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(100 * batch + dist.get_rank()))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(optimizer, so.ShardedOptimizer):
        optimizer.wait()


def uneven() -> int:
    return 5 if dist.get_rank() == 0 else 3


def assert_replicas_are_equal(model: nn.Module) -> None:
    own = torch.cat([param.detach().flatten() for param in model.parameters()])
    others = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(others, own)
    assert all(torch.equal(own, each) for each in others)


def assert_refused(model: nn.Module, optimizer: Any, context: AbstractContextManager[Any], batches: int) -> None:
    started = time.monotonic()
    with (
        pytest.raises(ValueError, match=r"Join lets ranks run out of inputs, but a step of this optimizer is a collective.*drop_last"),
        context,
    ):
        train(model, optimizer, batches)
    assert time.monotonic() - started < 10.0


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("name", "before", "way"),  # an optimizer, its steps before the context, and which context
    [(name, before, "Join") for name in COLLECTIVE for before in (0, 1)] + [("StableAdamW", 3, "join"), ("StableAdamW", 0, "Join of two")],
)
def test_join_is_refused_by_name_where_a_step_is_a_collective(name: str, before: int, way: str) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 3))
    optimizer = COLLECTIVE[name](model)
    train(model, optimizer, before)
    joined = {"join": [], "Join": [model], "Join of two": [DistributedDataParallel(nn.Linear(1, 1)), model]}[way]
    context = Join(joined) if joined else model.join()
    assert_refused(model, optimizer, context, uneven())
    assert_replicas_are_equal(model)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", COLLECTIVE | LOCAL)
def test_join_is_refused_nowhere_else(name: str) -> None:
    """Not for AdamW, for another model, in a context that is off, has been left, or stops all ranks together."""
    torch.manual_seed(0)
    model, other = DistributedDataParallel(nn.Linear(4, 3)), DistributedDataParallel(nn.Linear(4, 3))
    optimizer, local = (COLLECTIVE | LOCAL)[name](model), LOCAL["AdamW"](other)
    with Join([other]):  # of another model
        train(other, local, uneven())
    train(model, optimizer, 2)
    with Join([model], enable=False):
        train(model, optimizer, 2)
    with Join([model]):
        train(model, optimizer, uneven() if name in LOCAL else 0)
    if name not in LOCAL:  # whose moments Join has not made equal
        train(model, optimizer, 2)  # after a context
    assert_replicas_are_equal(model)
    with (
        pytest.raises(RuntimeError, match=r"exhausted all inputs|Detected at least one rank that exhausted inputs"),
        Join([model], throw_on_early_termination=True),
    ):
        train(model, optimizer, uneven())


@pytest.mark.ranks(2)
def test_join_of_the_optimizer_itself_is_refused() -> None:
    """As it is passed beside the model where ZeroRedundancyOptimizer is used."""
    model = DistributedDataParallel(nn.Linear(4, 3))
    optimizer = so.ShardedOptimizer(model, so.AdamW, lr=1e-2)
    with pytest.raises(ValueError, match="Join lets ranks run out of inputs, but a step of this optimizer is a collective"):
        Join([model, optimizer])


@pytest.mark.ranks(2)
def test_a_rank_that_has_no_inputs_is_not_waited_for() -> None:
    """The one that has some says so at once, in its first step: no collective of this library comes before."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 3))
    optimizer = so.StableAdamW(model.parameters(), lr=1e-2)
    if dist.get_rank() == 0:
        assert_refused(model, optimizer, Join([model]), 1)
    else:
        hooks = [joinable.join_hook() for joinable in (model,)]
        Join([model])._get_num_nonjoined_procs()
        hooks[0].main_hook()  # what Join does in the place of a rank without inputs, for one batch of the other
    dist.barrier()
