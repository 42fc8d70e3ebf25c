"""Metrics tell of the last step what a computation in float64 on whole tensors tells, on every sharding, and cost no communication."""

from __future__ import annotations

import math
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from collectives import collectives
from sharded_models import ShardedModel
from test_invariance import param_groups, spiky_grads, start_values
from torch import Tensor, nn

import sharded_optim as so

STEPS = 4
EXACT = 1e-6  # relative: what rounding moments to float32 leaves
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")


def options(form: str) -> dict[str, Any]:
    return {"lr": 1e-2, "weight_decay": 0.3, "decay_form": form, "max_lr": 3e-2}


def float64_reference(groups: list[dict[str, Any]], grads_of: list[dict[str, Tensor]], form: str) -> dict[str, float]:
    """The metrics of the last step of StableAdamW, by its formulas on whole tensors."""
    found: dict[str, float] = {"skipped_steps": 0.0}
    for index, group in enumerate(groups):
        values = {**options(form), "betas": (0.9, 0.99), "eps": 1e-6, **group}
        lr, beta2 = values["lr"], values["betas"][1]
        amounts = {"coupled": lr, "decoupled": lr / values["max_lr"], "corrected": lr * lr / values["max_lr"]}
        found |= {f"lr/{index}": lr, f"weight_decay/{index}": amounts[form] * values["weight_decay"]}
        for name, _ in group["params"]:
            second: Tensor | None = None
            for step, grads in enumerate((grads for grads in grads_of if name in grads), start=1):
                square = grads[name].double() ** 2
                second = (1 - beta2) * square if second is None else beta2 * second + (1 - beta2) * square
                corrected = second / (1 - beta2**step)
                rms = (square / corrected.clamp(min=values["eps"] ** 2)).mean().sqrt().item()
                if grads is grads_of[-1] and grads[name].numel():
                    found |= {f"rms/{name}": rms, f"clip_factor/{name}": 1.0 / max(1.0, rms)}
    factors = [value for name, value in found.items() if name.startswith("clip_factor/")]
    return found | {"clipped_share": sum(factor < 1.0 for factor in factors) / len(factors), "non_finite_tensors": 0.0}


def gradients(step: int) -> dict[str, Tensor]:
    """Those of the last step are so large for every other tensor that its update is clipped."""
    grads = spiky_grads(step, torch.float32)
    return {name: grad * 64 if step == STEPS - 1 and index % 2 else grad for index, (name, grad) in enumerate(grads.items())}


class OneProcess:
    """Whole tensors, with the methods of `ShardedModel`."""

    def __init__(self, _: str, values: dict[str, Tensor]) -> None:
        self.params = {name: nn.Parameter(value.clone()) for name, value in values.items()}

    def set_grads(self, grads: dict[str, Tensor]) -> None:
        for name, param in self.params.items():
            param.grad = grads.get(name)


def check(wrappers: list[str], form: str) -> None:
    for wrapper in wrappers:
        model = (OneProcess if wrapper == "one process" else ShardedModel)(wrapper, start_values(torch.float32))
        optimizer = so.StableAdamW(param_groups(model.params), **options(form))
        for step in range(STEPS):
            model.set_grads(gradients(step))
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 7.0  # what a scheduler does before anyone asks
        with collectives() as communicated:
            found = optimizer.metrics()
        assert not communicated, communicated
        expected = float64_reference(param_groups(start_values(torch.float32)), list(map(gradients, range(STEPS))), form)
        assert found.keys() == expected.keys(), wrapper
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=EXACT), f"{wrapper} {name}"
        assert 0.0 < found["clipped_share"] < 1.0, "some are clipped and some are not"


@pytest.mark.parametrize("form", ["coupled", "decoupled", "corrected"])
def test_one_process_reports_what_float64_computes(form: str) -> None:
    check(["one process"], form)


@pytest.mark.parametrize(("world_size", "wrappers"), [(2, ["ddp", "fsdp2"]), (4, ["hsdp", "fsdp2_tp"])])
def test_every_sharding_reports_what_float64_computes(world_size: int, wrappers: list[str]) -> None:
    ranks.run(check, world_size, wrappers, "decoupled")


def check_stages() -> None:
    rank = dist.get_rank()
    param = nn.Parameter(torch.ones(3))
    optimizer = so.StableAdamW([(f"stage{rank}", param)], lr=1e-2)
    for scale in (1.0, 5.0 * rank):
        param.grad = torch.full((3,), 1.0 + scale)
        optimizer.step()
    metrics = optimizer.metrics()
    assert metrics["clip_factor/stage0"] == 1.0
    assert metrics["clip_factor/stage1"] == pytest.approx(1.0 / metrics["rms/stage1"], rel=EXACT)
    assert metrics["clipped_share"] == 0.5


def test_ranks_report_clip_factors_of_tensors_that_others_hold() -> None:
    ranks.run(check_stages, 2)


def stepped() -> tuple[so.StableAdamW, list[nn.Parameter]]:
    params = [nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(4))]
    optimizer = so.StableAdamW([{"params": [("a", params[0])], "name": "matrices"}, {"params": [("b", params[1])]}], lr=1e-2)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer, params


def test_a_group_is_called_by_its_name() -> None:
    optimizer, _ = stepped()
    assert {name for name in optimizer.metrics() if name.startswith("lr/")} == {"lr/matrices", "lr/1"}


def test_a_skipped_step_names_what_was_not_finite_and_has_clipped_nothing() -> None:
    optimizer, params = stepped()
    params[0].grad = torch.full((5, 3), math.nan)
    optimizer.step()
    metrics = optimizer.metrics()
    assert {name: value for name, value in metrics.items() if not name.startswith("rms/")} == {
        "skipped_steps": 1.0,
        "non_finite_tensors": 1.0,
        "non_finite/a": 1.0,
    }
    assert math.isnan(metrics["rms/a"])


def test_the_norm_before_clipping_is_that_of_the_step_that_it_was_computed_for() -> None:
    optimizer, _ = stepped()
    assert "grad_norm" not in optimizer.metrics()
    norm = so.clip_grad_norm_(optimizer, 0.1)
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] == float(norm) == pytest.approx(19**0.5)
    optimizer.step()
    assert "grad_norm" not in optimizer.metrics()


@pytest.mark.parametrize(
    ("make", "per_element"),
    [
        (lambda params: so.AdamW(params, lr=1e-2), 28),  # reads and writes parameter and two moments, reads the gradient
        (lambda params: so.AdamW(params, lr=1e-2, nonfinite="skip"), 32),  # and reads the gradient once more before
        (lambda params: so.StableAdamW(params, lr=1e-2), 40),
        (lambda params: so.Muon(params, lr=1e-2), 28),  # the buffer between its passes is bfloat16
    ],
    ids=["AdamW", "AdamW, skip", "StableAdamW", "Muon"],
)
def test_performance_counts_the_bytes_of_every_pass(make: Any, per_element: int) -> None:
    param = nn.Parameter(torch.ones(30, 20))
    param.grad = torch.ones(30, 20)
    optimizer = make([param])
    assert optimizer.performance() == {}
    optimizer.step()
    found = optimizer.performance()
    assert found["bytes"] == per_element * param.numel()
    assert {"ms/observe", "ms/agree", "ms/matrices", "ms/update", "bytes"} <= found.keys()
    assert ("gb_per_s" in found) == (not isinstance(optimizer, so.Muon))
    if "gb_per_s" in found:
        assert found["gb_per_s"] == pytest.approx(found["bytes"] / (found["ms/observe"] + found["ms/update"]) / 1e6)
    optimizer = so.AdamW([param], lr=1e-2)
    optimizer.step(param=param)
    assert optimizer.performance() == {}, "one of several calls that make a step"


def test_decay_while_the_reference_learning_rate_is_learned_is_that_of_the_step() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = so.DecoupledAdamW([param], lr=0.0, weight_decay=0.1)
    for lr in (1e-3, 2e-3):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.ones(3)
        optimizer.step()
        assert optimizer.metrics()["weight_decay/0"] == pytest.approx(0.1, rel=1e-12)


def test_groups_of_one_name_are_called_by_their_indices() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = so.AdamW([{"params": [param], "name": "same", "lr": 1e-2 * (1 + index)} for index, param in enumerate(params)], lr=1e-2)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    assert [optimizer.metrics()[f"lr/{index}"] for index in range(2)] == [1e-2, 2e-2]


def test_l2_decay_has_no_share_that_a_step_takes_away() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = so.Adam([param], lr=1e-2, weight_decay=0.5)
    optimizer.step()
    assert optimizer.metrics().keys() == {"skipped_steps", "lr/0"}


def check_non_finite_ranks() -> None:
    """Row shards of a tensor, of which the last element is not finite: a piece of the last rank that holds any."""
    last = dist.get_world_size() - 1
    model = ShardedModel("fsdp2", start_values(torch.float32))
    optimizer = so.StableAdamW(list(model.params.items()), lr=1e-2)
    grads = {key: torch.ones_like(value) for key, value in start_values(torch.float32).items()}
    name = max((key for key, value in grads.items() if value.ndim), key=lambda key: len(grads[key]))
    model.set_grads(grads)
    optimizer.step()
    with collectives() as communicated:
        assert optimizer.non_finite_ranks() == {}
    assert not communicated, "all was finite"
    grads[name].view(-1)[-1] = math.inf
    model.set_grads(grads)
    optimizer.step()
    assert optimizer.non_finite_ranks() == {name: [last]}, "on every rank"
    assert optimizer.metrics()[f"non_finite/{name}"] == 1.0


def test_ranks_on_which_a_tensor_is_not_finite_are_known_to_all() -> None:
    ranks.run(check_non_finite_ranks, 3)


def test_one_process_is_the_rank_on_which_a_tensor_is_not_finite() -> None:
    optimizer, params = stepped()
    params[1].grad = torch.full((4,), math.nan)
    optimizer.step()
    assert optimizer.non_finite_ranks() == {"b": [0]}


def test_a_state_dict_that_is_loaded_ends_all_reports_of_the_step_before() -> None:
    optimizer, params = stepped()
    so.clip_grad_norm_(optimizer, 0.1)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.metrics() == {"skipped_steps": 0.0}
    assert optimizer.performance() == {}
    reported = optimizer.report_per_parameter_metrics(params[0], "a", {})
    assert "l2_norm/update/a" not in reported or float(reported["l2_norm/update/a"]) == 0.0
    optimizer.step()
    assert {"rms/a", "lr/matrices"} <= optimizer.metrics().keys()
