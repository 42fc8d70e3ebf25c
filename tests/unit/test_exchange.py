"""What ranks find by exchanging what they hold is what one process finds that looks at all of it: owners, errors, who writes what."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_ranks import SimulatedGroup
from torch import Tensor

from sharded_optim.checkpoint import write_plan
from sharded_optim.checkpoint.errors import CheckpointError
from sharded_optim.checkpoint.local_tensor import LocalTensor
from sharded_optim.checkpoint.write_plan import WritePlan, plan_for
from sharded_optim.sharding import Layout, LocalParam, Piece, exchange
from sharded_optim.sharding.exchange import exchange_layouts
from sharded_optim.sharding.matrices import Matrices
from sharded_optim.sharding.piece_exchange import group_rows
from sharded_optim.sharding.segment import Segment

FAULTS = (None, None, "lost", "overlap", "shape", "dtype", "values", "gradients", "matrices")
NAMES = ("w", "layers.0.weight", "ünïcode", "a b\nc", "")


@dataclass(frozen=True)
class Held:
    """A piece that a rank holds."""

    segment: Segment
    values: Tensor
    grad: Tensor | None
    matrices: Matrices | None = None
    is_buffer: bool = False


Job = list[list[Held]]  # by rank


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Tensors that are cut into rows or columns, each piece held by some ranks, in any order; some are wrong in one way."""
    world_size = draw(st.integers(1, 5))
    job: Job = [[] for _ in range(world_size)]
    for name in draw(st.permutations(NAMES))[: draw(st.integers(1, 4))]:
        shape = (draw(st.integers(0, 5)), draw(st.integers(1, 4)))
        dim = draw(st.integers(0, 1))
        cuts = sorted(draw(st.lists(st.integers(0, shape[dim]), max_size=3)))
        whole = torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)
        pieces: list[tuple[int, Held]] = []
        for begin, end in zip([0, *cuts], [*cuts, shape[dim]], strict=True):
            offsets, sizes = [0, 0], list(shape)
            offsets[dim], sizes[dim] = begin, end - begin
            segment = Segment.box(name, shape, offsets, sizes)
            values = whole.narrow(dim, begin, end - begin).reshape(-1)
            for rank in draw(st.lists(st.integers(0, world_size - 1), min_size=1, max_size=world_size, unique=True)):
                pieces.append((rank, Held(segment, values, values * draw(st.sampled_from([1.0, 1.0005])) if draw(st.booleans()) else None)))
        pieces = draw(st.permutations(pieces))
        fault = draw(st.sampled_from(FAULTS))
        rank, held = pieces[0]
        if fault == "lost":
            pieces = pieces[1:]
        elif fault == "overlap" and shape[0] > 1:
            pieces.append((rank, Held(Segment.flat(name, shape, 1, 1), whole.reshape(-1)[1:2], None)))
        elif fault == "shape":
            pieces[0] = rank, dataclasses.replace(held, segment=dataclasses.replace(held.segment, shape=(*shape, 1)))
        elif fault == "dtype":
            pieces[0] = rank, dataclasses.replace(held, values=held.values.to(torch.bfloat16), grad=None)
        elif fault == "values":
            pieces[0] = rank, dataclasses.replace(held, values=held.values + 1)
        elif fault == "gradients" and held.grad is not None:
            pieces[0] = rank, dataclasses.replace(held, grad=held.grad * 1.5)
        elif fault == "matrices":
            pieces[0] = rank, dataclasses.replace(held, matrices=Matrices(dtype=torch.float32, shapes=(), flops=()))
        for rank, held in pieces:
            job[rank].append(held)
    return [draw(st.permutations(pieces)) for pieces in job]


def local_params(pieces: Sequence[Held]) -> list[LocalParam]:
    described = []
    for held in pieces:
        param = torch.nn.Parameter(held.values.clone())
        param.grad = held.grad
        piece = Piece(segment=held.segment, matrices=held.matrices)
        described.append(LocalParam(param=param, name=held.segment.name, pieces=(piece,), local=lambda tensor, role: tensor))
    return described


def elements(segment: Segment) -> Tensor:
    return (segment.run_starts()[:, None] + torch.arange(segment.run)).reshape(-1)


def brute_force(job: Job) -> tuple[list[str], list[list[bool]]] | str:
    """Names in order, and who owns what, or the beginning of an error, by looking at all pieces of all ranks."""
    norms = [0.0 if held.grad is None else float(torch.linalg.vector_norm(held.grad)) for pieces in job for held in pieces]
    pieces_of: dict[str, list[tuple[int, Held]]] = {}
    for rank, pieces in enumerate(job):
        for held in pieces:
            pieces_of.setdefault(held.segment.name, []).append((rank, held))
    owner: dict[Segment, int] = {}
    for name, pieces in pieces_of.items():
        first_rank, first = pieces[0]
        for rank, held in pieces:
            if (held.segment.shape, held.values.dtype) != (first.segment.shape, first.values.dtype):
                return (
                    f"ranks disagree about {name!r}: shape {first.segment.shape} and {first.values.dtype} on rank {first_rank}, shape "
                    f"{held.segment.shape} and {held.values.dtype} on rank {rank};"
                )
            if held.matrices != first.matrices:
                return f"ranks {first_rank} and {rank} disagree about the matrices that {name!r} (shape {held.segment.shape}) is"
            known_rank, known = next((other, each) for other, each in pieces if each.segment == held.segment)
            if differ := difference(known, held, max(norms, default=0.0)):
                return f"ranks {known_rank} and {rank} both hold {name!r} (shape {held.segment.shape}), but with different {differ}:"
            owner.setdefault(held.segment, rank)
        covered = torch.zeros(first.segment.tensor_numel, dtype=torch.int64)
        for segment in {held.segment for _, held in pieces}:
            covered[elements(segment)] += 1
        if not (covered == 1).all():
            return f"the pieces of {name!r} (shape {first.segment.shape}) do not tile it: element"
    return list(pieces_of), [[owner[held.segment] == rank for held in pieces] for rank, pieces in enumerate(job)]


def difference(known: Held, held: Held, largest_norm: float) -> str | None:
    if not torch.equal(known.values, held.values):
        return "values"
    if known.grad is None or held.grad is None or not held.segment.numel:
        return None
    one, other = (float(torch.linalg.vector_norm(grad)) for grad in (known.grad, held.grad))
    return "gradients" if abs(one - other) > 1e-2 * max(one, other) and max(one, other) > 1e-4 * largest_norm else None


@settings(max_examples=300, deadline=None)
@given(jobs())
def test_owners_and_errors_are_those_of_one_process_that_sees_all_pieces(job: Job) -> None:
    """Bit for bit the same decisions, in the same order of tensors, and one error on all ranks: that of the first tensor that is wrong."""
    expected = brute_force(job)
    group = SimulatedGroup(len(job))
    results = group.run(
        lambda rank, process_group: exchange_layouts(lambda: local_params(job[rank]), process_group, compares_values=lambda _: True)
    )
    if isinstance(expected, str):
        assert {type(result) for result in results} == {ValueError}, results
        messages = {str(result) for result in results}
        assert len(messages) == 1
        assert messages.pop().startswith(expected)
        return
    names, owned = expected
    held = [[each for own in job for each in own if each.segment.name == name and each.segment.numel] for name in names]
    first = [id(pieces[0]) for pieces in held if pieces]
    for result, own, pieces in zip(results, owned, job, strict=True):
        assert isinstance(result, Layout), result
        assert list(result.names) == names
        assert list(result.owned) == own
        assert [result.names[slot] for slot in result.slots] == [held.segment.name for held in pieces]
        balances = [0 if not held.segment.numel else -1 for held in pieces]
        for number, piece in enumerate(pieces):
            if id(piece) in first:
                balances[number] = (
                    sum(piece.segment.name == held.segment.name and held.segment.numel > 0 for own in job for held in own) - 1
                )
        assert list(result.balance) == balances
        of_names = {held.segment.name: held.segment.tensor_numel for others in job for held in others}
        assert list(result.numels) == [of_names[name] for name in names]


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_an_exchange_is_as_many_collectives_on_any_number_of_ranks(world_size: int) -> None:
    group = SimulatedGroup(world_size)
    pieces = [Held(Segment.whole(f"{number}", (2,)), torch.ones(2), None) for number in range(20)]
    group.run(lambda rank, process_group: exchange_layouts(lambda: local_params(pieces), process_group, compares_values=lambda _: True))
    assert group.calls == ["all-to-all"] * 4 + ["all-gather"]


def test_what_one_rank_raises_is_raised_on_all() -> None:
    def describe(rank: int) -> list[LocalParam]:
        if rank == 1:
            raise ValueError("this rank has no memory")
        return local_params([Held(Segment.whole("w", (2,)), torch.ones(2), None)])

    results = SimulatedGroup(3).run(
        lambda rank, process_group: exchange_layouts(lambda: describe(rank), process_group, compares_values=lambda _: True)
    )
    assert [str(result) for result in results] == ["rank 1: this rank has no memory"] * 3


SHAPES_DIFFER = {
    "beyond the first": [[(4, 0, 4)], [(8, 0, 4)], [(8, 4, 4)]],  # size of the tensor, begin and length of the piece, by rank
    "short of the first": [[(8, 0, 4)], [(4, 0, 4)], [(4, 0, 4)]],
    "first is empty": [[(4, 0, 0)], [(16, 0, 8)], [(16, 8, 8)]],
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", SHAPES_DIFFER)
def test_pieces_of_tensors_of_different_sizes_are_refused_by_their_shapes(case: str) -> None:
    """In layouts and in checkpoints: whether they tile a tensor cannot be asked."""
    job = [
        [Held(Segment.flat("w", (size,), begin, length), torch.ones(length), None) for size, begin, length in pieces]
        for pieces in SHAPES_DIFFER[case]
    ]
    layouts = SimulatedGroup(3).run(
        lambda rank, process_group: exchange_layouts(lambda: local_params(job[rank]), process_group, compares_values=lambda _: True)
    )
    assert {type(each) for each in layouts} == {ValueError}
    assert all(str(each).startswith("ranks disagree about 'w': shape (") for each in layouts)
    plans = SimulatedGroup(3).run(lambda rank, process_group: plan(rank, process_group, job))
    assert {type(each) for each in plans} == {CheckpointError}
    assert all("has shape (" in str(each) for each in plans)


@pytest.mark.timeout(60)
def test_what_a_rank_raises_while_it_checks_pieces_is_raised_on_all() -> None:
    """As where it has no memory: the others wait for its replies."""

    def fails(*args: Any) -> Any:
        raise MemoryError("no memory to compare pieces")

    job = [[Held(Segment.whole("w", (2,)), torch.ones(2), None)]] * 3
    with mock.patch.object(exchange, "PieceChecks", fails):
        layouts = SimulatedGroup(3).run(
            lambda rank, process_group: exchange_layouts(lambda: local_params(job[rank]), process_group, compares_values=lambda _: True)
        )
    with mock.patch.object(write_plan, "WriteChecks", fails):
        plans = SimulatedGroup(3).run(lambda rank, process_group: plan(rank, process_group, job))
    for results, error in ((layouts, ValueError), (plans, CheckpointError)):
        assert {type(each) for each in results} == {error}
        assert all("no memory to compare pieces" in str(each) for each in results)


# -------------------------------------------------------------------------------------------------------- who writes a checkpoint


def local_tensors(pieces: Sequence[Held]) -> list[LocalTensor]:
    return [LocalTensor(kind="model", segment=held.segment, local=held.values, is_buffer=held.is_buffer) for held in pieces]


def plan(rank: int, group: Any, job: Job) -> WritePlan:
    tensors = local_tensors(job[rank])
    return plan_for(tensors, [b""] * len(job), group)


def brute_force_error(job: Job) -> str | None:
    """The beginning of the error that a save raises."""
    pieces = [(rank, held) for rank, pieces in enumerate(job) for held in pieces]
    first: dict[str, Held] = {}
    for rank, held in pieces:
        known = first.setdefault(held.segment.name, held)
        if (held.segment.shape, held.values.dtype) != (known.segment.shape, known.values.dtype):
            return (
                f"'model/{held.segment.name}' has shape {known.segment.shape} and {known.values.dtype} on one rank, and shape "
                f"{held.segment.shape} and {held.values.dtype} on rank {rank};"
            )
    for name, known in first.items():
        covered = torch.zeros(known.segment.tensor_numel, dtype=torch.int64)
        for segment in {held.segment for _, held in pieces if held.segment.name == name}:
            covered[elements(segment)] += 1
        if not (covered == 1).all():
            return f"what the ranks hold of {f'model/{name}'!r} (shape {known.segment.shape}) does not tile it: element"
    for rank, held in pieces:
        known_rank, known = next((other, each) for other, each in pieces if each.segment == held.segment)
        if not torch.equal(known.values, held.values) and not held.is_buffer:
            return f"ranks {known_rank} and {rank} both hold {f'model/{held.segment.name}'!r}, with different values:"
    return None


@settings(max_examples=200, deadline=None)
@given(jobs().filter(lambda job: all(held.segment.name.isprintable() and held.segment.name for pieces in job for held in pieces)))
def test_a_checkpoint_has_each_element_once_or_all_ranks_say_why_not(job: Job) -> None:
    group = SimulatedGroup(len(job))
    expected = brute_force_error(job)
    results = group.run(lambda rank, process_group: plan(rank, process_group, job))
    if expected is not None:
        assert {type(result) for result in results} == {CheckpointError}, results
        messages = {str(result) for result in results}
        assert len(messages) == 1
        assert messages.pop().startswith(expected)
        return
    plans = [result for result in results if isinstance(result, WritePlan)]
    assert len(plans) == len(job), results
    assert all(list(each.tensors.items()) == list(plans[0].tensors.items()) for each in plans), "in the same order on all ranks"
    names = dict.fromkeys(held.segment.name for pieces in job for held in pieces)
    assert [entry.name for entry in plans[0].tensors.values()] == list(names)
    written = {entry.name: torch.zeros(math.prod(entry.shape)) for entry in plans[0].tensors.values()}
    saved = {name: torch.zeros_like(values) for name, values in written.items()}
    for held in (held for pieces in job for held in pieces):
        saved[held.segment.name][elements(held.segment)] = held.values.float()
    for each, pieces in zip(plans, job, strict=True):
        for chunk in each.chunks:
            values = pieces[chunk.row].values[chunk.offset : chunk.offset + chunk.segment.numel]
            written[chunk.segment.name][elements(chunk.segment)] += values
    assert all(torch.equal(written[name], saved[name]) for name in names), "each element once"


def test_replicas_are_spread_over_the_ranks_that_hold_them() -> None:
    """Four ranks in two pairs, each with a half of every tensor: no rank writes more than its part and the largest piece."""
    sizes = [3000, 2000, 2000, 1000, 500, 300, 200, 10, 10]
    halves = [
        [Held(Segment.flat(f"{number}", (2 * size,), half * size, size), torch.ones(size), None) for number, size in enumerate(sizes)]
        for half in range(2)
    ]
    job = [halves[0], halves[1], halves[0], halves[1]]
    plans = SimulatedGroup(4).run(lambda rank, process_group: plan(rank, process_group, job))
    written = [sum(chunk.segment.numel for chunk in each.chunks) for each in plans if isinstance(each, WritePlan)]
    assert sum(written) == 2 * sum(sizes)
    assert max(written) - min(written) <= 20, "the largest are assigned first"


def test_of_a_buffer_the_first_rank_saves_its_own_values() -> None:
    job = [[Held(Segment.whole("mean", (3,)), torch.full((3,), float(rank)), None, is_buffer=True)] for rank in range(3)]
    plans = SimulatedGroup(3).run(lambda rank, process_group: plan(rank, process_group, job))
    assert [len(each.chunks) for each in plans if isinstance(each, WritePlan)] == [1, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 1)), max_size=20))
def test_equal_rows_have_one_number_in_the_order_in_which_they_appear(rows: list[tuple[int, int]]) -> None:
    numbers, first = group_rows(np.array(rows, dtype=np.int64).reshape(len(rows), 2))
    distinct = list(dict.fromkeys(rows))
    assert numbers.tolist() == [distinct.index(row) for row in rows]
    assert first.tolist() == [rows.index(row) for row in distinct]
