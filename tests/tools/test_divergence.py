"""Ranks that no longer hold the same are told so, all of them, with the tensor and the ranks; those that do are not."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import deepspeed_models
import pytest
import ranks
import torch
import torch.distributed as dist
from collectives import collectives_of
from every_wrapper import RECIPES, WRAPPERS, Trained, worlds_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sharded_optim as so
from sharded_optim.backends import position_hash
from sharded_optim.backends.position_hash import position_hashes

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8)

# ------------------------------------------------------------------------------------------------------------------------- the hash


def hash_of(tensor: Tensor) -> int:
    return int(position_hashes([tensor]))


def some(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    content = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return content.view(dtype)


# Around the ends of words and blocks, which the tests make small.
SMALL_BLOCK = 4
sizes = st.integers(1, 6 * SMALL_BLOCK * position_hash.WORD // 2)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(position_hash, "BLOCK", SMALL_BLOCK)
        position_hash._weights.cache_clear()
        hash_of(torch.ones(2))  # compiles
        yield
    position_hash._weights.cache_clear()


@given(numel=sizes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32), choice=st.randoms())
def test_every_flipped_bit_is_seen(numel: int, dtype: torch.dtype, seed: int, choice: random.Random) -> None:
    tensor = some(numel, dtype, seed)
    before = hash_of(tensor)
    content = tensor.view(torch.uint8)
    bit = choice.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    assert hash_of(tensor) != before
    content[bit // 8] ^= 1 << bit % 8
    assert hash_of(tensor) == before


@given(numel=sizes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32), choice=st.randoms(), sign=st.booleans())
def test_two_elements_that_change_places_are_seen(numel: int, dtype: torch.dtype, seed: int, choice: random.Random, sign: bool) -> None:
    """Also if they differ in their sign alone, the highest bit, which wrap-around could lose."""
    bits = some(numel, dtype, seed).view(BITS[dtype.itemsize])
    a, b = choice.randrange(numel), choice.randrange(numel)
    if sign:
        bits[a] = bits[b] ^ (torch.iinfo(bits.dtype).min or 128)
    before, x, y = hash_of(bits), int(bits[a]), int(bits[b])
    bits[a], bits[b] = y, x
    assert (hash_of(bits) != before) == (x != y)


@given(numel=sizes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32), offset=st.integers(0, 9))
def test_where_a_tensor_lies_in_memory_makes_no_difference(numel: int, dtype: torch.dtype, seed: int, offset: int) -> None:
    tensor = some(numel, dtype, seed)
    expected = hash_of(tensor)
    moved = torch.cat([tensor[:1].expand(offset), tensor])[offset:]
    strided = torch.stack([tensor, tensor], dim=1)[:, 0]
    assert [expected] * 4 == position_hashes([moved, strided, tensor[None], tensor[:, None]]).tolist()
    square = some(numel * 3, dtype, seed).view(numel, 3)
    assert hash_of(square.t().contiguous().t()) == hash_of(square)


def test_hashes_are_those_of_the_formula_and_of_any_number_of_blocks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(number: int) -> int:
        mixed = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        return (mixed ^ mixed >> 31) | 1

    words = some(3 * SMALL_BLOCK + 1, torch.int64, 0)
    expected = sum(
        odd(SMALL_BLOCK + place // SMALL_BLOCK) * (word + (word >> 32)) * odd(place % SMALL_BLOCK)
        for place, word in enumerate(words.tolist())
    )
    assert hash_of(words) % 2**64 == expected % 2**64
    monkeypatch.setattr(position_hash, "BLOCK", 2**16)  # as users have it, and the same weights
    monkeypatch.setattr(position_hash, "_weights", lambda device: position_hash._odd(torch.arange(2**16)))
    long = some(2**18 + 7, torch.float32, 0)
    swapped = long.clone()
    swapped[5], swapped[2**17 + 5] = long[2**17 + 5], long[5]
    assert hash_of(swapped) != hash_of(long)


@given(numel=sizes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
def test_compiled_hashes_are_the_eager_ones(numel: int, dtype: torch.dtype, seed: int) -> None:
    tensor = some(numel, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(position_hash, "_compiled", lambda: None)
        eager = hash_of(tensor)
    assert hash_of(tensor) == eager


def test_what_has_no_elements_and_what_has_one() -> None:
    empty, scalar = torch.ones(0, 3), torch.tensor(True)
    assert position_hashes([]).tolist() == []
    assert hash_of(empty) == 0
    assert hash_of(scalar) != hash_of(~scalar)


# ------------------------------------------------------------------------------------------------------------------------ the check


def told(check: so.DivergenceCheck) -> str:
    """What a check raises: the same on every rank."""
    with pytest.raises(so.DivergenceError) as raised:
        check()
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, str(raised.value))
    assert len(set(messages)) == 1, messages
    return messages[0]


def check_no_false_alarm(wrappers: Sequence[str]) -> None:
    for wrapper in wrappers:
        trained = WRAPPERS[wrapper](RECIPES["one group" if wrapper == "fsdp1_flat" else "two groups"], 1)
        check = so.DivergenceCheck(trained.optimizer, model=trained.model)
        check()
        for step in (1, 2, 3):
            trained.step(step)
            check()
        assert collectives_of(check) == ["gloo:all_reduce"], wrapper
        assert check._shared, wrapper


@pytest.mark.parametrize(
    ("world_size", "wrappers"),
    [
        (2, ["ddp", "fsdp2", "fsdp1", "fsdp1_flat", "zero1", "zero2_bf16"]),
        (3, ["ddp", "fsdp2", "fsdp1", "zero2"]),
        (4, ["hsdp", "fsdp2_tp"]),
    ],
)
def test_ranks_that_train_together_are_told_nothing_by_one_all_reduce(world_size: int, wrappers: list[str]) -> None:
    assert all(world_size in worlds_of(wrapper) for wrapper in wrappers)
    ranks.run(check_no_false_alarm, world_size, wrappers)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed (the extra `deepspeed`)")
@pytest.mark.parametrize(
    ("world_size", "wrappers"), [(2, ["deepspeed1", "deepspeed2_bf16", "deepspeed3", "deepspeed0_bf16"]), (3, ["deepspeed2"])]
)
def test_ranks_under_deepspeed_are_told_nothing(world_size: int, wrappers: list[str]) -> None:
    deepspeed_models.run(check_no_false_alarm, world_size, wrappers)


def flip(tensor: Tensor, element: int = 0) -> None:
    """The lowest bit of an element."""
    bits = tensor.detach().view(BITS[tensor.element_size()])
    bits.view(-1)[element] ^= 1


def swap(tensor: Tensor) -> None:
    flat = tensor.detach().view(-1)
    flat[[0, -1]] = flat[[-1, 0]]


def check_faults() -> None:
    """One on rank 1 of 3, and undone before the next."""
    trained: Trained = WRAPPERS["ddp"](RECIPES["two groups"], 0)
    check = so.DivergenceCheck(trained.optimizer, model=trained.model)
    trained.step(1)
    params = {name: param for param, name in so.checkpoint.live.model.named_tensors(trained.model)[0].items()}
    name, weight = next((name, param) for name, param in params.items() if param.shape == (64, 41))
    state, groups = trained.optimizer.state[weight], trained.optimizer.param_groups
    scalar = next(name for name, param in params.items() if param.numel() == 1)
    told_of: list[tuple[Callable[[], None], str]] = [
        (partial(flip, weight, 2000), f"'{name}' (parameter): rank 1 differs from ranks 0, 2\n"),
        (partial(flip, params[scalar]), f"'{scalar}' (parameter): rank 1 differs from ranks 0, 2\n"),
        (partial(swap, weight), f"'{name}' (parameter): rank 1 differs from ranks 0, 2\n"),
        (partial(flip, state["exp_avg"], 7), f"'{name}' (exp_avg): rank 1 differs from ranks 0, 2\n"),
        (partial(swap, state["exp_avg_sq"]), f"'{name}' (exp_avg_sq): rank 1 differs from ranks 0, 2\n"),
        (partial(state["step"].add_, 1), f"'{name}' (step): rank 1 differs from ranks 0, 2 (2.0, not 1.0)\n"),
        (partial(groups[1].update, lr=0.5), f"param_groups[1]['lr']: rank 1 differs from ranks 0, 2 (0.5, not {groups[1]['lr']})\n"),
        (partial(groups[0].update, weight_decay=0.2), "param_groups[0]['weight_decay']: rank 1 differs from ranks 0, 2 (0.2, not 0.1)\n"),
        (partial(groups[0].update, betas=(0.9, 0.5)), "param_groups[0]['betas']: rank 1 differs from ranks 0, 2 ((0.9, 0.5), not ("),
    ]
    before = [{key: value.clone() for key, value in each.items()} for each in (dict(params), state)]
    hyperparameters = [dict(group) for group in groups]
    for spoil, line in told_of:
        check()
        if dist.get_rank() == 1:
            spoil()
        message = told(check)
        assert line in message, message
        assert "1 of " in message
        with torch.no_grad():
            for kept, live in zip(before, (params, state), strict=True):
                for key, value in kept.items():
                    live[key].copy_(value)
        for group, kept in zip(groups, hyperparameters, strict=True):
            group.update(kept)
    groups[1]["lr"] = torch.tensor(0.25 if dist.get_rank() == 2 else 0.5)
    assert "param_groups[1]['lr']: rank 2 differs from ranks 0, 1 (0.25, not 0.5)" in told(check)
    with torch.no_grad():
        groups[1]["lr"] = hyperparameters[1]["lr"]
        for param in params.values():
            param.add_(dist.get_rank())
    message = told(check)
    assert "rank 1 differs from rank 0, rank 2 differs from rank 0" in message
    assert f"and {len(params) - 8} more\n" in message


def check_descriptions() -> None:
    """They change on all ranks, on one, or cannot be given on one; what is the matter with them is raised on all."""
    rank = dist.get_rank()
    model = nn.Linear(7, 3)
    wrapped = DistributedDataParallel(model)
    optimizer = so.StableAdamW(model.parameters(), lr=1e-2)
    check = so.DivergenceCheck(optimizer, model=wrapped)
    check()
    wrapped(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    assert len(collectives_of(check)) > 1, "there is state now"
    assert collectives_of(check) == ["gloo:all_reduce"]
    state = optimizer.state
    kept = dict(state[model.bias])
    if rank == 2:
        del state[model.bias]
    assert "'bias' (step): rank 2 differs from ranks 0, 1 (no state, not 1.0)" in told(check)
    if rank == 2:
        state[model.bias] = kept
    check()
    broken = so.DivergenceCheck(optimizer, model=wrapped if rank else "the model")
    for _ in range(2):
        with pytest.raises(TypeError if rank == 0 else ValueError, match=r"model must be a torch.nn.Module"):
            broken()
    if rank == 0:
        check._model = "the model"
    with pytest.raises(TypeError if rank == 0 else ValueError, match=r"model must be a torch.nn.Module"):
        check()
    check._model = wrapped
    check()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5 + rank // 2))]})
    model.register_parameter("late", optimizer.param_groups[1]["params"][0])
    message = told(check)
    assert "'late' (parameter) has shape (5,) and dtype torch.float32 on rank 0, shape (6,) and dtype torch.float32 on rank 2" in message, (
        message
    )
    optimizer.param_groups[1]["params"][0].data = torch.ones(5)
    check()
    buffered = nn.BatchNorm1d(3)
    buffered.running_mean.fill_(rank)
    so.DivergenceCheck(None, model=buffered)()


def check_groups_of_ranks() -> None:
    """Of two that differ neither has a majority; others do not take part; nobody is alone with anybody."""
    rank = dist.get_rank()
    pair = dist.new_group([1, 2])
    alone = dist.new_subgroups(1)[0]
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(rank)
        model.bias.fill_(rank > 1)
    assert collectives_of(so.DivergenceCheck(None, model=model, process_group=alone)) == []
    if rank:
        with pytest.raises(so.DivergenceError, match=r"'weight' \(parameter\): rank 2 differs from rank 1\n"):
            so.DivergenceCheck(None, model=model, process_group=pair)()


def check_sharded() -> None:
    """What is cut is compared where it is held twice; step counters everywhere."""
    trained = WRAPPERS["hsdp"](RECIPES["two groups"], 0)
    check = so.DivergenceCheck(trained.optimizer, model=trained.model)
    trained.step(1)
    check()
    params = {name: param for param, name in so.checkpoint.live.model.named_tensors(trained.model)[0].items()}
    name, weight = next((name, param) for name, param in params.items() if param.shape == (64, 41))
    if dist.get_rank() == 3:
        flip(weight.to_local(), 3)
    message = told(check)
    assert f"'{name}' (parameter, {32 * 41} elements from {32 * 41}): rank 3 differs from rank 1" in message
    if dist.get_rank() == 3:
        flip(weight.to_local(), 3)
        trained.optimizer.state[weight]["step"] += 1
    assert f"'{name}' (step): rank 3 differs from ranks 0, 1, 2 (2.0, not 1.0)" in told(check)


def check_all_of_the_above() -> None:
    check_faults()
    check_descriptions()
    check_groups_of_ranks()


def test_what_differs_on_one_rank_of_three_is_named_on_all() -> None:
    """A bit of a weight or a moment, two elements that have changed places, a step counter, a hyperparameter, state that is gone."""
    ranks.run(check_all_of_the_above, 3)


def test_what_is_sharded_is_compared_where_it_is_replicated() -> None:
    ranks.run(check_sharded, 4)


def test_one_process_checks_nothing() -> None:
    so.DivergenceCheck(None, model="not looked at")()
