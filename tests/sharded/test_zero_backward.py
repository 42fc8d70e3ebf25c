"""ShardedOptimizer with backward passes inside of backward passes, as reentrant activation checkpoints run them, and with failing ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_zero import STABLE, ranks_per_machine, sharded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import sharded_optim as so
from sharded_optim.zero.placeholder import GradientInBucket

WIDTH = 6
MANY, ONE = 1e-4, 1.0  # MiB of a bucket
SGD = partial(so.DecoupledSGDW, lr=0.05, momentum=0.9)
Run = Callable[..., Any]  # a function and its arguments, checkpointed or not


class Net(nn.Module):
    """Parameters before, between and after blocks that may be checkpointed.

    Args:
        way: which blocks are, and how.
        reentrant: which kind of checkpoint; None: none at all.
    """

    def __init__(self, way: str, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.reentrant = way, reentrant
        self.embedding = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(WIDTH, WIDTH)
        if way == "tied":
            self.head.weight = self.embedding.weight
        if way == "tied blocks":
            self.blocks[3][0].weight = self.blocks[1][0].weight
        if way == "frozen outside":
            for module in (self.embedding, self.norm, self.head):
                module.requires_grad_(False)

    def run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.reentrant is None:
            return function(*args)
        return checkpoint(function, *args, use_reentrant=self.reentrant)

    def forward(self, x: Tensor, rank: int) -> Tensor:
        way, run, blocks = self.way, self.run, self.blocks
        x = self.embedding(x.requires_grad_()) if way != "frozen outside" else self.embedding(x).requires_grad_()
        if way == "nested":
            x = run(lambda x: run(blocks[1], self.norm(run(blocks[0], x))), x)
            x = run(lambda x: run(lambda x: run(blocks[3], x), blocks[2](x)), x)
        elif way == "sequential":
            together = nn.Sequential(*blocks)
            x = together(x) if self.reentrant is None else checkpoint_sequential(together, 2, x, use_reentrant=self.reentrant)
        elif way == "one":
            x = blocks[3](blocks[2](run(blocks[1], self.norm(blocks[0](x)))))
        elif way == "head too":
            for block in blocks:
                x = run(block, x)
            return run(self.head, run(self.norm, x))
        else:
            for index, block in enumerate(blocks):
                x = run(block, x)
                if way == "twice" or (way == "twice on one rank" and rank == 0):
                    x = run(block, x)
                if index == 1:
                    x = self.norm(x)
        if way == "tied, and in a block":
            x = run(nn.functional.linear, x, self.embedding.weight)
        return self.head(x)


WAYS = (
    *("each", "one", "nested", "sequential", "head too", "frozen outside"),
    *("twice", "twice on one rank", "tied", "tied blocks", "tied, and in a block"),
)


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def losses(model: nn.Module, step: int, rank: int) -> Iterator[Tensor]:
    """Of two micro-batches."""
    for part in (0, 1):
        yield model(batch(2 * step + part, rank), rank).square().mean()


def reference(way: str, make: Any, world_size: int, steps: int) -> nn.Module:
    """What one process does, that has the mean of all ranks' losses, and no checkpoints."""
    model = Net(way, None)
    optimizer = make(model.parameters())
    for step in range(steps):
        for rank in range(world_size):
            for loss in losses(model, step, rank):
                (loss / world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def tolerance(make: partial) -> float:
    """Gradients are summed in another order than in one process."""
    return 1e-6 if make.func is so.DecoupledSGDW else 1e-5


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("way", "make"), [*product(WAYS, (SGD,)), ("each", STABLE), ("twice on one rank", STABLE)])
def test_reentrant_checkpoints_train_as_without_checkpoints(world_size: int, way: str, make: partial) -> None:
    """Wherever parameters lie, however often they are used, on all ranks or on one; both stages, one bucket and many, with accumulation."""
    rank = dist.get_rank()
    expected = dict(reference(way, make, world_size, 2).named_parameters())
    for stage, bucket_mb, together, accumulates in (
        (2, MANY, world_size, False),
        (2, MANY, 1, True),
        (1, ONE, world_size, False),
        (1, MANY, 1, False),
    ):
        model = Net(way, reentrant=True)
        with ranks_per_machine(together):
            optimizer = sharded(make, model, stage=stage, bucket_mb=bucket_mb)
        for step in range(2):
            first, second = losses(model, step, rank)
            if accumulates:
                with optimizer.no_sync():
                    first.backward()
            else:
                first.backward()
                dist.barrier()  # a collective between backward and step finds every rank at the end of its backward pass
            second.backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.wait()
        for name, param in model.named_parameters():
            error = (param - expected[name]).abs().max()
            assert error < tolerance(make), f"{stage=} {bucket_mb=} {together=} {accumulates=} {name}: {error}"


@pytest.mark.ranks(2)
def test_a_further_gradient_of_a_parameter_leaves_those_alone_that_share_its_memory() -> None:
    """Autograd may give two parameters gradients that are views of one memory; a further gradient of one does not change the other's."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    first, second, last = params = nn.ParameterList(nn.Parameter(torch.zeros(world_size * 16)) for _ in range(3))
    # Sends take a gradient that fills its bucket from where it is.
    optimizer = sharded(partial(so.DecoupledSGDW, lr=1.0), params, bucket_mb=2**-20, transport="sends")
    weights = torch.randn(3, 2, world_size * 16, generator=torch.Generator().manual_seed(0))[:world_size]
    x = torch.zeros(world_size * 16) + last  # whose bucket is reduced first, and is full last
    x = checkpoint(lambda x: x + first * weights[rank, 1], x, use_reentrant=True)
    x = checkpoint(lambda x: x + (first.view(-1, 1) + second.view(-1, 1)).view(-1), x, use_reentrant=True)
    (x * weights[rank, 0]).sum().backward()
    optimizer.step()
    optimizer.wait()
    once, twice = weights[:, 0].mean(0), (weights[:, 0] * weights[:, 1]).mean(0)
    for param, expected in zip(params, (once + twice, once, once), strict=True):
        torch.testing.assert_close(param.detach(), -expected, rtol=0, atol=1e-6)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("way", ["twice", "twice on one rank", "tied blocks"])
@pytest.mark.parametrize("make", [SGD, STABLE], ids=["SGD", "StableAdamW"])
def test_gradients_that_come_after_their_bucket_has_left_are_reduced_in_a_further_round(world_size: int, way: str, make: partial) -> None:
    rank = dist.get_rank()
    expected = dict(reference(way, make, world_size, 2).named_parameters())
    for stage, together in ((2, world_size), (2, 1), (1, world_size)):
        model = Net(way, reentrant=True)
        del model.unused  # whose bucket, never full, would hold back all after it
        with ranks_per_machine(together):
            optimizer = sharded(make, model, stage=stage, bucket_mb=MANY)
        for step in range(2):
            for loss in losses(model, step, rank):
                loss.backward()
            before = optimizer._reducer._round
            optimizer.step()
            assert optimizer._reducer._round > before, f"{stage=} {together=}: no gradient came late, so this tests nothing"
            optimizer.zero_grad()
        optimizer.wait()
        for name, param in model.named_parameters():
            error = (param - expected[name]).abs().max()
            assert error < tolerance(make), f"{stage=} {together=} {name}: {error}"


@pytest.mark.ranks(2)
def test_a_further_gradient_is_not_left_in_the_parameter() -> None:
    """Others would take it there for all of the gradient, or drop it."""
    blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
    optimizer = sharded(SGD, blocks, bucket_mb=MANY)

    def backward() -> None:
        x = torch.ones(2, WIDTH, requires_grad=True)
        for _ in range(2):
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=True)
        x.square().sum().backward()

    backward()
    for use in (
        lambda: torch.nn.utils.clip_grad_norm_(blocks.parameters(), 1e-3),
        lambda: torch.nn.utils.clip_grad_value_(blocks.parameters(), 1e-3),
        lambda: blocks[0].weight.grad.norm(),
    ):
        with pytest.raises(ValueError, match=r"the gradient of '\d.\w+' is in a bucket"):
            use()
    norm = optimizer.clip_grad_norm_(1e9)
    optimizer.zero_grad()
    backward()
    blocks.zero_grad()  # which does not reach what is in buckets, nor what is to follow
    assert torch.equal(optimizer.clip_grad_norm_(1e9), norm)


class Raising(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise ArithmeticError("in backward")


def fail(model: Net, way: str) -> None:
    """Backward completes some gradients, and then fails: between checkpoints, or in one."""
    blocks = model.blocks
    x = model.embedding(torch.ones(2, WIDTH))
    x = model.run(lambda x: Raising.apply(blocks[0](x)), x) if way == "in a checkpoint" else Raising.apply(model.run(blocks[0], x))
    x = model.run(blocks[1], x)
    with pytest.raises(ArithmeticError):
        (x if way == "checkpoints alone" else model.head(x)).sum().backward()


USES: dict[str, Callable[[Net, so.ShardedOptimizer], object]] = {
    "step": lambda model, optimizer: optimizer.step(),
    "zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "clip_grad_norm_": lambda model, optimizer: optimizer.clip_grad_norm_(1.0),
    "backward": lambda model, optimizer: model(batch(0, 0), 0).sum().backward(),
    "backward of a checkpoint": lambda model, optimizer: (
        model.run(model.blocks[0], torch.ones(2, WIDTH, requires_grad=True)).sum().backward()
    ),
}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", ["in a checkpoint", "between", "checkpoints alone"])
@pytest.mark.parametrize("use", USES)
def test_an_exception_in_backward_is_an_error_at_the_next_use(way: str, use: str) -> None:
    """Also where it came after the last gradient of an inner pass, so that no hook of the outer pass had run, and none comes again."""
    model = Net("each", reentrant=True)
    optimizer = sharded(SGD, model, bucket_mb=MANY)
    fail(model, way)
    with pytest.raises(RuntimeError, match=r"the last backward pass did not end: after an exception the bucket.* is still to be"):
        USES[use](model, optimizer)
    dist.barrier()  # the other rank may still be in backward, for which it needs this rank's optimizer


def test_a_process_alone_goes_on_after_an_exception_in_backward() -> None:
    model, expected = Net("each", reentrant=True), Net("each", None)
    optimizer = sharded(SGD, model, bucket_mb=MANY)
    fail(model, "in a checkpoint")
    optimizer.zero_grad()
    for each, stepping in ((model, optimizer), (expected, SGD(expected.parameters()))):
        each(batch(0, 0), 0).square().mean().backward()
        stepping.step()
    for param, same in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(param, same)


@pytest.mark.ranks(2)
def test_what_a_failed_optimizer_has_sent_is_not_taken_for_a_gradient_of_the_next() -> None:
    """Rank 0 has sent the first bucket of a backward pass that failed on both; a new optimizer over the same ranks receives its own."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    kept = []
    for attempt in (1, 2):
        torch.manual_seed(0)
        first, second = model = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        optimizer = sharded(SGD, model, bucket_mb=MANY, transport="sends")
        x = first(batch(attempt, rank))
        if attempt == 1:
            x = second(Raising.apply(x)) if rank == 0 else Raising.apply(second(x))
            with pytest.raises(ArithmeticError):
                x.square().sum().backward()
            kept.append((model, optimizer))
            continue
        second(x).square().sum().backward()
        optimizer.step()
        optimizer.wait()
        torch.manual_seed(0)
        expected = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        for each in range(world_size):
            (expected[1](expected[0](batch(attempt, each))).square().sum() / world_size).backward()
        SGD(expected.parameters()).step()
        for param, same in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(param, same, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use", ["share_memory_", "data_ptr", "__dlpack__", "numpy", "tolist"])
def test_a_gradient_in_a_bucket_has_no_memory_to_give(use: str) -> None:
    """As to model.share_memory() between backward and step, which would end the process."""
    gradient = GradientInBucket(nn.Parameter(torch.ones(2, 3)), "w")
    with pytest.raises(ValueError, match=rf"{use} has no memory to give: the gradient of 'w' is in a bucket"):
        getattr(gradient, use)()
