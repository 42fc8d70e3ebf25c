"""The metrics that Composer's OptimizerMonitor asks for are those of whole tensors and of the step that was taken, on every sharding."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import ranks
import torch
import torch.distributed as dist
from collectives import collectives
from sharded_models import AwkwardModel, ShardedModel
from test_invariance import param_groups, spiky_grads, start_values
from torch import Tensor, nn

import sharded_optim as so

OPTIMIZERS: dict[str, Callable] = {
    "Adam": lambda groups: so.Adam(groups, lr=1e-2, weight_decay=0.1),
    "AdamW": lambda groups: so.AdamW(groups, lr=1e-2, weight_decay=0.5),
    "DecoupledAdamW": lambda groups: so.DecoupledAdamW(groups, lr=1e-2, weight_decay=1e-2, amsgrad=True),
    "DecoupledSGDW": lambda groups: so.DecoupledSGDW(groups, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "DecoupledSGDW-plain": lambda groups: so.DecoupledSGDW(groups, lr=1e-2, weight_decay=1e-2),
    "StableAdamW": lambda groups: so.StableAdamW(groups, lr=1e-2, weight_decay=0.5),
    "Muon": lambda groups: so.Muon([groups[0], groups[1] | {"algorithm": "adamw"}], lr=1e-2),
}
STEPS = 3
MOMENTS = {"exp_avg", "momentum_buffer"}

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")


def norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def cosine(a: Tensor, b: Tensor) -> float:
    scale = norm(a) * norm(b)
    return float((a.double() * b.double()).sum()) / scale if scale else 0.0


def expected_metrics(make: Callable) -> dict[str, float]:
    """Of the last of some steps, from the parameters before and after it, in one process."""
    params = {name: nn.Parameter(value.clone()) for name, value in start_values(torch.float32).items()}
    optimizer = make(param_groups(params))
    before: dict[str, Tensor] = {}
    for step in range(STEPS):
        grads = spiky_grads(step, torch.float32)
        before = {name: param.detach().clone() for name, param in params.items()}
        for name, param in params.items():
            param.grad = grads.get(name)
        optimizer.step()
    metrics = {}
    for name, param in params.items():
        if param.grad is None:
            continue
        vectors = {"param": param.detach(), "grad": param.grad, "update": before[name] - param.detach()}
        for key in MOMENTS & optimizer.state[param].keys():
            vectors["moment"] = optimizer.state[param][key]
        metrics |= {f"l2_norm/{vector}/{name}": norm(value) for vector, value in vectors.items()}
        metrics[f"cosine/update_grad/{name}"] = cosine(vectors["update"], param.grad)
        if "moment" in vectors:
            metrics[f"cosine/moment_grad/{name}"] = cosine(vectors["moment"], param.grad)
    return metrics


def monitored(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], *, reduce: bool) -> dict[str, float]:
    """What the monitor does after a step, when a scheduler has already changed the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] *= 7.0
    metrics: dict = {"lr": 1.0}
    for name, param in params.items():
        if param.grad is not None:
            metrics = optimizer.report_per_parameter_metrics(param, name, metrics)
    if reduce:
        metrics = optimizer.dist_reduce_metrics(optimizer.pre_reduce_metrics(metrics))
    assert metrics.pop("lr") == 1.0, "a key of others passes"
    return {key: value.item() for key, value in metrics.items()}


def asked(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter]) -> None:
    """Ask for reports, as the monitor does after each step: updates of matrices are measured in the steps after the first report."""
    for name, param in params.items():
        optimizer.report_per_parameter_metrics(param, name, {})


def assert_close(actual: dict[str, float], expected: dict[str, float], where: str) -> None:
    """To a rounding of the parameters, which are 100 times larger than what is subtracted from them."""
    assert actual.keys() == expected.keys(), where
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value, rel=2e-4, abs=1e-6), f"{where} {key}"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_process_reports_the_step_it_took_per_group(name: str) -> None:
    """The update with its decay, from the parameter before the step; with each group's own hyperparameters, those of the step."""
    params = {name: nn.Parameter(value.clone()) for name, value in start_values(torch.float32).items()}
    optimizer = OPTIMIZERS[name](param_groups(params))
    for step in range(STEPS):
        grads = spiky_grads(step, torch.float32)
        for key, param in params.items():
            param.grad = grads.get(key)
        optimizer.step()
        asked(optimizer, params)
    expected = expected_metrics(OPTIMIZERS[name])
    assert_close(monitored(optimizer, params, reduce=False), expected, name)
    assert_close(monitored(optimizer, params, reduce=True), expected, name)


def check_ranks(wrappers: list[str], expected: dict[str, dict[str, float]]) -> None:
    for wrapper in wrappers:
        for name, make in OPTIMIZERS.items():
            model = ShardedModel(wrapper, start_values(torch.float32))
            optimizer = make(param_groups(model.params))
            for step in range(STEPS):
                model.set_grads(spiky_grads(step, torch.float32))
                optimizer.step()
                asked(optimizer, model.params)
            with collectives() as found:
                metrics = monitored(optimizer, model.params, reduce=True)
            assert found.count("gloo:all_reduce") == 1, found
            assert_close(metrics, expected[name], f"{wrapper} {name} rank {dist.get_rank()}")
            if wrapper == "ddp":
                assert_close(monitored(optimizer, model.params, reduce=False), expected[name], f"{wrapper} {name}, not reduced")


@pytest.mark.parametrize(("world_size", "wrappers"), [(2, ["ddp", "fsdp2"]), (4, ["hsdp", "fsdp2_tp"])])
def test_every_sharding_reports_whole_tensors_with_one_all_reduce(world_size: int, wrappers: list[str]) -> None:
    """Replicas do not count twice: under HSDP and tensor parallelism as in one process, on every rank."""
    ranks.run(check_ranks, world_size, wrappers, {name: expected_metrics(make) for name, make in OPTIMIZERS.items()})


def check_stages() -> None:
    """Ranks that hold different tensors learn of all."""
    rank = dist.get_rank()
    param = nn.Parameter(torch.full((3,), 1.0 + rank))
    optimizer = so.AdamW([(f"stage{rank}", param)], lr=1e-2)
    param.grad = torch.ones(3)
    optimizer.step()
    metrics = monitored(optimizer, {f"stage{rank}": param}, reduce=True)
    assert {key for key in metrics if key.startswith("l2_norm/grad/")} == {"l2_norm/grad/stage0", "l2_norm/grad/stage1"}
    assert metrics["l2_norm/param/stage1"] == pytest.approx(1.99 * 3**0.5, rel=1e-3)


def test_stages_of_a_pipeline_report_each_others_tensors() -> None:
    ranks.run(check_stages, 2)


def test_a_skipped_step_has_update_0_and_a_parameter_of_another_optimizer_no_metrics() -> None:
    param, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = so.StableAdamW([("w", param)], lr=1e-2)
    param.grad = torch.ones(3)
    optimizer.step()
    param.grad = torch.tensor([1.0, torch.nan, 1.0])
    optimizer.step()
    assert optimizer.report_per_parameter_metrics(param, "w", {})["l2_norm/update/w"] == 0.0
    assert optimizer.report_per_parameter_metrics(other, "v", {"x": 1}) == {"x": 1}


@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_low_precision_reports_the_update_before_its_rounding(stochastic_rounding: bool) -> None:
    param = nn.Parameter(torch.linspace(0.5, 1.5, 100, dtype=torch.bfloat16))
    optimizer = so.AdamW([param], lr=1e-4, weight_decay=0.0, stochastic_rounding=stochastic_rounding)
    param.grad = torch.ones(100, dtype=torch.bfloat16)
    optimizer.step()
    metrics = optimizer.report_per_parameter_metrics(param, "w", {})
    assert metrics["l2_norm/update/w"].item() == pytest.approx(1e-4 * 10, rel=1e-4)


def test_unscaled_gradients_are_reported_under_grad_scaler() -> None:
    model = nn.Linear(3, 2)
    optimizer = so.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    scaler.step(optimizer)
    assert optimizer.report_per_parameter_metrics(model.bias, "bias", {})["l2_norm/grad/bias"].item() == pytest.approx(2**0.5)


def test_names_are_the_monitors_own() -> None:
    """The optimizer need not know the names of the model."""
    model = AwkwardModel()
    nn.init.ones_(model.five)
    optimizer = so.StableAdamW([model.five], lr=1e-2)
    model.five.grad = torch.ones(5)
    optimizer.step()
    metrics = optimizer.report_per_parameter_metrics(model.five, "module.five", {})
    metrics = optimizer.dist_reduce_metrics(optimizer.pre_reduce_metrics(metrics))
    assert metrics["l2_norm/grad/module.five"].item() == pytest.approx(5**0.5)


def test_keys_of_others_pass_unchanged_and_tied_weights_count_once() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = so.AdamW([param], lr=1e-2)
    param.grad = torch.ones(4)
    optimizer.step()
    metrics = {"l2_norm/grad/global": 3.0, "l2_norm/grad/other": torch.tensor(5.0)}
    for name in ("embedding", "head"):
        metrics = optimizer.report_per_parameter_metrics(param, name, metrics)
    assert optimizer.pre_reduce_metrics(metrics) is metrics
    assert metrics["l2_norm/grad/head"].item() == pytest.approx(4.0)
    assert optimizer.dist_reduce_metrics(metrics) is metrics, "as Composer's methods, in place and returned"
    assert metrics["l2_norm/grad/global"] == 3.0
    assert metrics["l2_norm/grad/other"] == 5.0
    assert metrics["l2_norm/grad/embedding"].item() == metrics["l2_norm/grad/head"].item() == pytest.approx(2.0)


def test_reports_take_as_much_work_for_each_of_many_parameters_as_for_each_of_few() -> None:
    """Counted as calls of functions: no report may look through all parameters, also none for another optimizer's parameter."""

    def calls(count: int) -> int:
        params, others = ([nn.Parameter(torch.ones(2)) for _ in range(count)] for _ in range(2))
        optimizer = so.StableAdamW([(f"w{index}", param) for index, param in enumerate(params)], lr=1e-2)
        for param in params:
            param.grad = torch.ones(2)
        optimizer.step()
        total = 0

        def count_call(frame, event, argument) -> None:
            nonlocal total
            total += event in ("call", "c_call")

        sys.setprofile(count_call)
        try:
            for index, param in enumerate([*params, *others]):
                optimizer.report_per_parameter_metrics(param, f"w{index}", {})
        finally:
            sys.setprofile(None)
        return total

    assert calls(200) < 4.5 * calls(50)
