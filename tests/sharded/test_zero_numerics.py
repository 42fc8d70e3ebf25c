"""ShardedOptimizer to the last bit where float32 sums depend on their order, and where an average of equal values rounds."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_zero import STABLE, ranks_per_machine, sharded
from torch import Tensor, nn

import sharded_optim as so

SHAPES = ((96,), (5, 7), (31,), (192,), (1,), (64, 3))
NEGATES = partial(so.DecoupledSGDW, lr=1.0)  # parameters of 0 become the gradients, negated
MIB = 2**20


def given(seed: int, rank: int) -> list[Tensor]:
    """Gradients that differ in size, from rank to rank and within one."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return [torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-14, 15, shape, generator=generator)) for shape in SHAPES]


def zeros(dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES)


def backward(model: nn.ParameterList, grads: list[Tensor]) -> None:
    torch.stack([(param * grad.to(param.dtype)).sum() for param, grad in zip(model, grads, strict=True)]).sum().backward()


def mean_in_order(parts: list[Tensor], *, scaled_first: bool) -> Tensor:
    """Added up in float32, from the first to the last."""
    scale = 1.0 / len(parts)
    total = torch.zeros(parts[0].shape)
    for part in parts:
        total = total + ((part * scale).float() if scaled_first else part.float())
    return total if scaled_first else total * scale


@pytest.mark.ranks(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_added_in_the_order_of_ranks(dtype: torch.dtype) -> None:
    """In memory, by sends, and by both."""
    world_size = dist.get_world_size()
    of_ranks = [[grad.to(dtype) for grad in given(1, rank)] for rank in range(world_size)]
    for together in range(1, world_size + 1):
        for bucket_bytes in (1, MIB):
            model = zeros(dtype)
            with ranks_per_machine(together):
                optimizer = sharded(NEGATES, model, bucket_mb=bucket_bytes / MIB)
            backward(model, given(1, dist.get_rank()))
            optimizer.step()
            optimizer.wait()
            differs = False
            for index, param in enumerate(model):
                parts = [grads[index] for grads in of_ranks]
                # Without memory that ranks share, a gradient that fills its bucket is sent from where it is, and divided at the end.
                unit = world_size * 64 // dtype.itemsize
                is_alone = together == 1 and bucket_bytes == 1 and param.numel() % unit == 0
                mean = mean_in_order(parts, scaled_first=not is_alone)
                differs |= not torch.equal(mean, mean_in_order(parts[::-1], scaled_first=not is_alone))
                assert torch.equal(param, -mean.to(dtype)), f"{together=} {bucket_bytes=} {index}"
                own = optimizer.state.get(param, {})
                if "master" in own:
                    shard = optimizer.state_dict()["shards"][index]
                    assert torch.equal(own["master"], -mean.flatten()[shard["start"] : shard["start"] + shard["numel"]])
            assert differs, "the order makes no difference to these gradients"


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [3, 5])
@pytest.mark.parametrize("how", ["added", "unfrozen"])
@pytest.mark.parametrize("way", ["assigned", "computed", "computed on rank 1"])
def test_the_gradient_of_a_parameter_that_comes_later_is_averaged_unless_it_was_assigned(world_size: int, how: str, way: str) -> None:
    """What was assigned has the bits of one process. Thirds and fifths are no float32, so that an average of equal values may round."""
    models = [zeros(), zeros()]
    optimizers = []
    for model, make in zip(models, (STABLE, partial(sharded, STABLE)), strict=True):
        model[2].requires_grad_(how == "added")
        params = [param for index, param in enumerate(model) if how == "unfrozen" or index != 2]
        optimizers.append(make(params))
    for step in (1, 2, 3):
        if step == 2:
            for model, optimizer in zip(models, optimizers, strict=True):
                model[2].requires_grad_(True)
                if how == "added":
                    if optimizer is optimizers[1] and way != "assigned":
                        late(model[2], step, way)
                    optimizer.add_param_group({"params": [model[2]], "lr": 5e-3})
                elif optimizer is optimizers[1] and way != "assigned":
                    late(model[2], step, way)
        for model, optimizer in zip(models, optimizers, strict=True):
            for index, (param, grad) in enumerate(zip(model, given(step, 0), strict=True)):
                if index != 2 or (step > 1 and (way == "assigned" or step == 3)):
                    param.grad = grad
                elif step == 2 and optimizer is optimizers[0]:
                    users = range(world_size) if way == "computed" else (1,)
                    param.grad = torch.stack([given(step, user)[2] / world_size for user in users]).sum(0)
            optimizer.step()
            optimizer.zero_grad()
    for index, (a, b) in enumerate(zip(*models, strict=True)):
        if way == "assigned":
            assert torch.equal(a, b), f"{index}"
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=f"{index}")


def late(param: Tensor, step: int, way: str) -> None:
    """A backward pass of a parameter that is in no bucket."""
    rank = dist.get_rank()
    if way == "computed" or rank == 1:
        (param * given(step, rank)[2]).sum().backward()


def test_the_norm_of_gradients_has_the_same_bits_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are added up in the order of the parameters, not in that of a set of objects, which is another one in every run."""
    model = zeros()
    optimizer = sharded(STABLE, model, bucket_mb=1e-4)
    backward(model, given(1, 0))
    numels: list[int] = []
    vector_norm = torch.linalg.vector_norm

    def recorded(grad: Tensor, *args: Any, **options: Any) -> Tensor:
        numels.append(grad.numel())
        return vector_norm(grad, *args, **options)

    monkeypatch.setattr(torch.linalg, "vector_norm", recorded)
    collect = optimizer._sharded_gradients.collect
    for step in (1, -1):

        class Ordered(set):  # type: ignore[type-arg]
            """A set with an order of its own."""

            def __iter__(self, step: int = step) -> Any:
                return iter(sorted(set.__iter__(self), key=lambda slot: slot.offset)[::step])

        monkeypatch.setattr(optimizer._sharded_gradients, "collect", lambda made=Ordered: made(collect()))
        numels.clear()
        optimizer.clip_grad_norm_(1e9)
        assert numels == [param.numel() for param in model]
