"""Muon in one process: against torch.optim.Muon, and what makes a tensor a matrix."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

import sharded_optim as so
from sharded_optim.optimizers.muon import JORDAN, Muon, orthogonalize
from sharded_optim.sharding.matrices import Holding, Matrices, choose_owners, plan_matrices
from sharded_optim.sharding.segment import Segment

SHAPES = [(1, 7), (7, 1), (1, 1), (5, 3), (33, 17), (17, 33), (64, 64), (640, 160)]
GROUP = {"ns_coefficients": JORDAN, "ns_steps": 5, "eps": 1e-7, "adjust_lr_fn": "original"}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(optimizer: torch.optim.Optimizer, steps: range = range(4)) -> list[Tensor]:
    """Take steps with gradients that follow from the step and the place of a parameter; return all parameters."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in steps:
        for index, param in enumerate(params):
            param.grad = randn(*param.shape, seed=100 * step + index).to(param.dtype)
        optimizer.step()
    return [param.detach().clone() for param in params]


# ----------------------------------------------------------------------------------------------------------------- against torch


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_direction_is_orthogonalized_to_torchs_bits(shape: tuple[int, int]) -> None:
    """Tall matrices have a scale other than 1, which goes into the last polynomial: of them, to its rounding."""
    direction = randn(*shape).bfloat16()
    expected = _zeropower_via_newtonschulz(direction, JORDAN, 5, 1e-7)
    scale = max(1.0, shape[0] / shape[1]) ** 0.5
    result = orthogonalize(direction, GROUP)
    if scale == 1.0:
        assert torch.equal(result, expected)
    else:
        torch.testing.assert_close(result, expected.float().mul(scale).bfloat16(), rtol=2**-7, atol=0.02 * scale / min(shape) ** 0.5)
        wide = orthogonalize(direction.T.contiguous(), GROUP)  # without a scale
        assert torch.equal(wide, _zeropower_via_newtonschulz(direction.T.contiguous(), JORDAN, 5, 1e-7))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
def test_20_steps_are_those_of_torch(nesterov: bool, adjust_lr_fn: str | None) -> None:
    """Parameters to 2e-2 (Frobenius): a last bit of a direction is amplified by five polynomials in bfloat16. Momentum to an ulp a step."""
    options = {"lr": 0.02, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    ours, theirs = ([nn.Parameter(randn(*shape)) for shape in SHAPES] for _ in range(2))
    optimizer, reference = so.Muon(ours, **options), torch.optim.Muon(theirs, **options)
    train(optimizer, range(20))
    train(reference, range(20))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()
        assert not torch.equal(a, randn(*a.shape)), "it has moved"
        m, n = optimizer.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"]
        torch.testing.assert_close(m, n, rtol=0, atol=20 * 2.0**-23 * float(n.abs().max()))


def test_state_dicts_go_to_torch_and_back() -> None:
    """Each continues the other's training as its own, in its last bits; lr, momentum and None of adjust_lr_fn are taken over."""
    ours, theirs = ([nn.Parameter(randn(8, 6)), nn.Parameter(randn(3, 5))] for _ in range(2))
    reference = torch.optim.Muon(theirs, lr=0.03, momentum=0.9, weight_decay=0.2)
    train(reference)
    optimizer = so.Muon(ours, lr=1.0)
    optimizer.load_state_dict(reference.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["adjust_lr_fn"]) == (0.03, 0.9, 0.2, "original")
    for mine, other in zip(ours, theirs, strict=True):
        mine.data.copy_(other.data)
        assert torch.equal(optimizer.state[mine]["momentum_buffer"], reference.state[other]["momentum_buffer"])
    back = torch.optim.Muon([nn.Parameter(param.detach().clone()) for param in ours], lr=1.0)
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = train(reference, range(4, 8))
    for result in (train(optimizer, range(4, 8)), train(back, range(4, 8))):
        for a, b in zip(result, expected, strict=True):
            assert (a - b).norm() <= 2e-2 * b.norm()


def test_state_of_another_family_is_refused() -> None:
    adam, muon = so.AdamW([nn.Parameter(randn(3, 2))]), so.Muon([nn.Parameter(randn(3, 2))])
    train(adam)
    train(muon)
    with pytest.raises(ValueError, match="momentum_buffer"):
        so.Muon([nn.Parameter(randn(3, 2))]).load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match=r"lacks .exp_avg."):
        so.AdamW([nn.Parameter(randn(3, 2))]).load_state_dict(muon.state_dict())


# ------------------------------------------------------------------------------------------------------------------ the function


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)], ids=str)
def test_polar_express_in_fp32_brings_singular_values_to_the_scale(shape: tuple[int, int]) -> None:
    group = GROUP | {"ns_coefficients": "polar_express", "adjust_lr_fn": "match_rms_adamw", "ns_steps": 7}
    values = torch.linalg.svdvals(orthogonalize(randn(*shape), group).double()) / (0.2 * max(shape) ** 0.5)
    assert values.sub(1.0).abs().max() < 0.1
    jordan = torch.linalg.svdvals(orthogonalize(randn(*shape), GROUP).double()) / max(1.0, shape[0] / shape[1]) ** 0.5
    assert 0.15 < jordan.sub(1.0).abs().max() < 0.5, "the default does not converge, on purpose"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    """XX' of long rows does in float32, without being told otherwise, and so does a sum of many elements."""
    direction = randn(24, 20000).to(dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(orthogonalize(direction, GROUP))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, results[0]) for each in results)


def test_a_direction_of_zeros_stays_zeros() -> None:
    assert torch.equal(orthogonalize(torch.zeros(3, 4).bfloat16(), GROUP), torch.zeros(3, 4).bfloat16())


# ------------------------------------------------------------------------------------------------------------- what is a matrix


def stepped(values: list[Tensor], **options: Any) -> list[Tensor]:
    """Parameters after a step with a gradient of 10 times their values."""
    params = [nn.Parameter(value.clone()) for value in values]
    for param in params:
        param.grad = 10.0 * param.detach()
    so.Muon(params, lr=0.1, **options).step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("ns_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("whole", "parts", "options"),
    [
        (lambda w: w, lambda w: list(w.split([4, 2, 6])), {"split": (4, 2, 6)}),
        (lambda w: w, lambda w: list(w.split(3)), {"split": 3}),
        (lambda w: w.view(3, 4, 5), lambda w: list(w.split(4)), {}),
        (lambda w: w.view(3, 4, 5), lambda w: list(w.split(2)), {"split": [2, 2]}),
        (lambda w: w.view(3, 4, 5), lambda w: [w.view(3, 20)], {"stacked": False}),
        (lambda w: w.view(3, 2, 2, 5), lambda w: [w.view(3, 20)], {}),
    ],
    ids=["split", "heads", "stack", "split-stack", "conv1d", "conv2d"],
)
def test_a_tensor_is_stepped_as_the_matrices_that_it_is(
    whole: Callable[[Tensor], Tensor], parts: Callable[[Tensor], list[Tensor]], options: dict[str, Any], ns_dtype: str
) -> None:
    values = randn(12, 5)
    (result,) = stepped([whole(values)], ns_dtype=ns_dtype, **options)
    expected = stepped(parts(values), ns_dtype=ns_dtype)
    assert torch.equal(result.flatten(), torch.cat([each.flatten() for each in expected]))
    assert not torch.equal(result.flatten(), stepped([values], ns_dtype=ns_dtype)[0].flatten())


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((5,), {}, r"'w' has shape \(5,\), which is no matrix; .*algorithm=\"adamw\".*muon_param_groups"),
        ((), {}, r"'w' has shape \(\)"),
        ((6, 2), {"split": 4}, r"'w' has 6 rows .*split=4 does not add up"),
        ((6, 2), {"split": (4, 3)}, r"'w' has 6 rows .*split=\(4, 3\)"),
        ((6, 2), {"split": 0}, "split must be a number of rows"),
        ((6, 2), {"ns_coefficients": (1.0, 2.0)}, "ns_coefficients must be three finite numbers"),
        ((6, 2), {"ns_coefficients": "jordan"}, "ns_coefficients must be three finite numbers"),
        ((6, 2), {"ns_steps": 0}, "ns_steps must be a whole number from 1 to 99"),
        ((6, 2), {"adjust_lr_fn": "other"}, "adjust_lr_fn must be one of original, match_rms_adamw, spectral_norm"),
        ((6, 2), {"momentum": 1.0}, r"momentum must be a number in \[0, 1\)"),
        ((6, 2), {"decay_form": "l2"}, "decay_form='l2' is not supported by Muon"),
        ((6, 2), {"algorithm": "sgd"}, "algorithm must be one of muon, adamw, stable_adamw"),
        ((6, 2), {"gradient_release": True}, "Muon does not support gradient release"),
    ],
    ids=str,
)
def test_what_cannot_be_stepped_is_refused_by_name(shape: tuple[int, ...], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        so.Muon([("w", nn.Parameter(torch.ones(shape)))], **options)


def test_a_step_of_some_parameters_is_refused_and_changes_nothing() -> None:
    param = nn.Parameter(randn(3, 2))
    param.grad = randn(3, 2)
    with pytest.raises(ValueError, match=r"step\(param=...\) is not supported by Muon"):
        so.Muon([param]).step(param=param)
    assert torch.equal(param, randn(3, 2))


@pytest.mark.parametrize(
    ("first", "change", "words"),
    [
        ({}, {"split": 2}, "'w' is no longer stepped as the same matrices as in its first step"),
        ({}, {"ns_dtype": "float32"}, "'w' is no longer stepped as the same matrices as in its first step"),
        ({"algorithm": "adamw"}, {"algorithm": "muon"}, "the state of 'w' lacks 'momentum_buffer'"),
    ],
    ids=str,
)
def test_matrices_cannot_become_others_after_the_first_step(first: dict[str, Any], change: dict[str, Any], words: str) -> None:
    """Ranks have planned who computes with which. The learning rate, of which that does not depend, may change."""
    optimizer = so.Muon([{"params": [("w", nn.Parameter(randn(4, 3)))], **first}])
    train(optimizer)
    optimizer.param_groups[0]["lr"] = 0.5
    (before,) = train(optimizer)
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0], before)


# ------------------------------------------------------------------------------------------------------------------ other groups


@pytest.mark.parametrize(("algorithm", "other"), [("adamw", so.AdamW), ("stable_adamw", so.StableAdamW)])
def test_other_groups_are_stepped_as_by_their_own_class(algorithm: str, other: Callable[..., Any]) -> None:
    """To the bit, with one report: rms of what has a statistic, and of nothing else."""
    values = [randn(4, 3), randn(7), randn()]
    muon, rest = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    groups = [
        {"params": [("a", muon[0])], "split": 2},
        {"params": [("b", muon[1]), ("c", muon[2])], "algorithm": algorithm, "lr": 0.01, "weight_decay": 0.0},
    ]
    optimizer = so.Muon(groups, lr=0.1)
    assert (optimizer.param_groups[0]["eps"], optimizer.param_groups[1]["eps"]) == (1e-7, 1e-8)
    alone = so.Muon([muon[0].detach().clone().requires_grad_()], lr=0.1, split=2)
    reference = other(rest, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    expected, result, matrix = train(reference), train(optimizer), train(alone)
    assert all(map(torch.equal, result[1:], expected[1:]))
    assert torch.equal(result[0], matrix[0])
    assert set(optimizer.state[muon[0]]) == {"step", "momentum_buffer"}
    assert set(optimizer.state[muon[1]]) == {"step", "exp_avg", "exp_avg_sq"}
    named = {key for key in optimizer.metrics() if key.startswith("rms/")}
    assert named == ({"rms/b", "rms/c"} if algorithm == "stable_adamw" else set())


def test_reports_say_what_is_known_of_a_matrix() -> None:
    """Norms of parameter, gradient and momentum; and, once a report was asked for, of the update, which is measured in the step."""
    param = nn.Parameter(randn(4, 3))
    optimizer = so.Muon([("w", param)])
    train(optimizer)
    report = optimizer.report_per_parameter_metrics(param, "w", {})
    assert report.keys() == {f"l2_norm/{kind}/w" for kind in ("param", "grad", "moment")} | {"cosine/moment_grad/w"}
    torch.testing.assert_close(report["l2_norm/moment/w"], optimizer.state[param]["momentum_buffer"].double().norm())
    before = param.detach().double()
    param.grad = randn(4, 3)
    optimizer.step()
    moved = before - param.detach().double()
    report = optimizer.report_per_parameter_metrics(param, "w", {})
    torch.testing.assert_close(report["l2_norm/update/w"], moved.norm(), rtol=1e-4, atol=0.0)
    cosine = torch.cosine_similarity(moved.flatten(), param.grad.double().flatten(), dim=0)
    torch.testing.assert_close(report["cosine/update_grad/w"], cosine, rtol=1e-4, atol=0.0)
    param.grad = torch.full((4, 3), torch.nan)
    optimizer.step()
    assert optimizer.report_per_parameter_metrics(param, "w", {})["l2_norm/update/w"] == 0.0


def test_gradscalers_scale_is_taken_from_gradients_and_what_it_found_stops_the_step() -> None:
    scaled, plain = (so.Muon([nn.Parameter(randn(4, 3))], lr=0.1) for _ in range(2))
    (param,), (other,) = (optimizer.param_groups[0]["params"] for optimizer in (scaled, plain))
    param.grad, other.grad = 4.0 * randn(4, 3, seed=1), randn(4, 3, seed=1)
    scaled.grad_scale, scaled.found_inf = torch.tensor(4.0), torch.tensor(1.0)  # pyright: ignore[reportAttributeAccessIssue]
    scaled.step()
    assert torch.equal(param, randn(4, 3))
    scaled.found_inf = torch.tensor(0.0)  # pyright: ignore[reportAttributeAccessIssue]
    scaled.step()
    plain.step()
    assert torch.equal(param, other)
    assert torch.equal(scaled.state[param]["momentum_buffer"], plain.state[other]["momentum_buffer"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_backend_gives_the_bits_of_the_eager_one(dtype: torch.dtype) -> None:
    results = []
    for backend in ("eager", "cpu"):
        params = [nn.Parameter(randn(*shape).to(dtype)) for shape in SHAPES[:-1]]
        for index, param in enumerate(params):  # in memory by columns, too
            param.data = param.data.T.contiguous().T if index % 2 else param.data
        for nesterov in (True, False):
            results.append(train(so.Muon(params, lr=0.1, nesterov=nesterov, momentum=0.9 if nesterov else 0.3, backend=backend)))
    assert all(map(torch.equal, results[0] + results[1], results[2] + results[3]))


def test_a_copy_goes_on_as_its_original() -> None:
    optimizer = so.Muon([{"params": [nn.Parameter(randn(4, 3))]}, {"params": [nn.Parameter(randn(3))], "algorithm": "stable_adamw"}])
    train(optimizer)
    copied, pickled = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    expected = train(optimizer, range(4, 6))
    for other in (copied, pickled):
        assert all(map(torch.equal, train(other, range(4, 6)), expected))


# ---------------------------------------------------------------------------------------------------------------------- the plan


def test_owners_are_balanced_over_those_that_hold_a_piece() -> None:
    assert choose_owners([3, 3, 2, 2, 2], [[0, 1]] * 5, [0, 0]) == [0, 1, 0, 1, 0]
    loads = [0, 0, 0]
    assert choose_owners([5, 4, 1], [[0, 1, 2], [1], [1, 2]], loads) == [0, 1, 2]
    assert loads == [5, 4, 1]


def cut(name: str, shape: tuple[int, int], ranges: list[tuple[int, int]]) -> list[Segment]:
    return [Segment.flat(name, shape, begin, end - begin) for begin, end in ranges]


CUTS = {
    "rows": [Segment.box("w", (6, 5), (row, 0), (2, 5)) for row in (0, 2, 4)],
    "columns": [Segment.box("w", (6, 5), (0, column), (6, width)) for column, width in ((0, 2), (2, 2), (4, 1))],
    "inside rows": cut("w", (6, 5), [(0, 7), (7, 7), (7, 30)]),
    "one rank": cut("w", (6, 5), [(0, 0), (0, 30), (0, 0)]),
    "replicas": [Segment.whole("w", (6, 5))] * 3,
    "replicas of halves": cut("w", (6, 5), [(0, 15), (15, 30), (0, 15), (15, 30)]),
}


@pytest.mark.parametrize("blocks", [((6, 5),), ((2, 5), (1, 5), (3, 5))], ids=["whole", "split"])
@pytest.mark.parametrize("segments", CUTS.values(), ids=CUTS)
def test_every_element_comes_to_its_owner_once_and_back_to_all_that_hold_it(
    segments: list[Segment], blocks: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Carried out in one process, for two tensors and one matrix a round; and of a cut matrix exactly as much travels as must."""
    monkeypatch.setattr("sharded_optim.sharding.matrices.ROUND_BYTES", 1)
    world_size = len(segments)
    matrices = Matrices(dtype=torch.bfloat16, shapes=blocks, flops=tuple(rows for rows, _ in blocks))
    holders = {
        name: [Holding(rank, number, Segment(**vars(each) | {"name": name})) for rank, each in enumerate(segments)]
        for number, name in enumerate("vw")
    }
    (plans,) = zip(*(plan_matrices(dict.fromkeys("vw", matrices), holders, rank, world_size) for rank in range(world_size)), strict=True)
    wholes = {name: torch.arange(30) + 100 * number for number, name in enumerate("vw")}
    buffers = []
    for rank, plan in enumerate(plans):
        buffer = torch.zeros(plan.numel, dtype=torch.int64)
        for number, name in enumerate("vw"):
            rows = segments[rank].run_starts().view(-1, 1) + torch.arange(segments[rank].run)
            buffer[plan.places[number]] = wholes[name][rows.flatten()]
        buffers.append(buffer)
    assert len({len(plan.rounds) for plan in plans}) == 1
    computed, travelled = [], 0
    for rounds in zip(*(plan.rounds for plan in plans), strict=True):
        given = [torch.cat([buffer[at] for at in each.gathered_from] or [buffer[:0]]) for buffer, each in zip(buffers, rounds, strict=True)]
        gathered = exchanged(given, [each.gather for each in rounds])
        results = []
        for rank, each in enumerate(rounds):
            sent = torch.zeros(sum(each.scatter.sent), dtype=torch.int64)
            for matrix in each.matrices:
                whole = torch.full((matrix.rows * matrix.columns,), -1)
                for source, parts in ((buffers[rank], matrix.own), (gathered[rank], matrix.gathered)):
                    for part in parts:
                        for overlap in part.overlaps:
                            assert (whole == -1).any()
                            overlap.copy(source[part.begin : part.end], whole)
                computed.append(whole)
                for target, parts in ((buffers[rank], matrix.own), (sent, matrix.results)):
                    for part in parts:
                        for overlap in part.overlaps:
                            overlap.reversed().copy(whole + 1000, target[part.begin : part.end])
            results.append(sent)
        scattered = exchanged(results, [each.scatter for each in rounds])
        for buffer, each, received in zip(buffers, rounds, scattered, strict=True):
            for at, values in zip(each.scattered_to, received.split([at.stop - at.start for at in each.scattered_to]), strict=True):
                buffer[at] = values
        travelled += sum(map(len, given)) + sum(map(len, results))
    ends = torch.tensor([rows * columns for rows, columns in blocks]).cumsum(0)[:-1].tolist()
    expected = [block for whole in wholes.values() for block in whole.tensor_split(ends)]
    assert sorted(each.tolist() for each in computed) == sorted(each.tolist() for each in expected)
    for rank, buffer in enumerate(buffers):
        rows = segments[rank].run_starts().view(-1, 1) + torch.arange(segments[rank].run)
        for number, name in enumerate("vw"):
            assert torch.equal(buffer[plans[rank].places[number]], wholes[name][rows.flatten()] + 1000)
    if len(blocks) == 1 and len({segment.numel for segment in segments}) == 1:  # equal shards
        replicas = max(segments.count(segment) for segment in segments)
        shards = world_size // replicas
        assert travelled * shards == 2 * 30 * ((shards - 1) + (replicas * shards - 1)), "(S-1)/S + (RS-1)/S of each element"
    if segments is CUTS["one rank"]:
        assert travelled == 0
        assert not any(plan.travels for plan in plans)


def exchanged(given: list[Tensor], transfers: list[Any]) -> list[Tensor]:
    """An all-to-all of ranks in one process."""
    pieces = [each.split(transfer.sent) for each, transfer in zip(given, transfers, strict=True)]
    for rank, transfer in enumerate(transfers):
        assert transfer.received == [len(sender[rank]) for sender in pieces]
    return [torch.cat([sender[rank] for sender in pieces]) for rank in range(len(given))]


def test_muon_is_torchs_signature_and_more() -> None:
    theirs, ours = inspect.signature(torch.optim.Muon).parameters, inspect.signature(Muon).parameters
    assert [(name, each.default) for name, each in theirs.items()] == [(name, ours[name].default) for name in list(ours)[: len(theirs)]]


@pytest.mark.parametrize("ns_dtype", ["bfloat16", "float32"])
def test_autocast_around_a_step_changes_nothing(ns_dtype: str) -> None:
    def stepped(*, autocast: bool) -> Tensor:
        param = nn.Parameter(torch.linspace(-1, 1, 35).view(5, 7))
        optimizer = so.Muon([param], lr=0.1, ns_dtype=ns_dtype)
        param.grad = torch.linspace(1, -2, 35).view(5, 7)
        with torch.autocast("cpu", dtype=torch.float16 if ns_dtype == "bfloat16" else torch.bfloat16, enabled=autocast):
            optimizer.step()
        return param.detach()

    assert torch.equal(stepped(autocast=True), stepped(autocast=False))


def test_coefficients_may_be_zero_and_eps_may_be_given_for_adamw() -> None:
    param = nn.Parameter(torch.ones(3, 3))
    so.Muon([param], ns_coefficients=(1.5, -0.5, 0.0))
    assert so.Muon([param], algorithm="adamw", eps=1e-3).param_groups[0]["eps"] == 1e-3
    assert so.Muon([param], algorithm="adamw").param_groups[0]["eps"] == 1e-8
