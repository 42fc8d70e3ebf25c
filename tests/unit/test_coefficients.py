"""Coefficients are the same bits wherever they are computed: in Python floats, as tensors, and by one kernel on a device."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_optimizer import THRESHOLD_ADAMW
from variants import examples

from sharded_optim.backends import Backend, Operands, eager
from sharded_optim.formulas.recording import Recorder
from sharded_optim.formulas.scalars import Sums
from sharded_optim.formulas.weight_decay import FORMS
from sharded_optim.optimizers import adam, sgd, stable_adamw
from sharded_optim.step import coefficients
from sharded_optim.step.coefficients import GroupRows, LrScale, coefficient_table, host_numbers

triton = pytest.importorskip("triton", reason="the triton package is not installed")

from absent_gpu import launched  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sharded_optim.backends import triton as backend  # noqa: E402
from sharded_optim.backends.triton import formulas as triton_formulas  # noqa: E402

FUNCTIONS: dict[str, Callable] = {
    "adam": adam.coefficients,
    "sgd": sgd.coefficients,
    "momentum": sgd.coefficients_momentum,
    "observe": stable_adamw.observe_coefficients,
}
GROUP: dict[str, Any] = {
    "lr": 1e-2,
    "betas": (0.9, 0.99),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "decay_form": "coupled",
    "reference_lr": 3e-2,
    "momentum": 0.9,
    "dampening": 0.1,
    "nesterov": False,
    "threshold": 0.7,
}
STATISTIC = THRESHOLD_ADAMW.statistic  # whose scale depends on a hyperparameter
assert STATISTIC is not None


@pytest.fixture
def device(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is a device that the host must not wait for, where kernels run in Triton's interpreter."""
    monkeypatch.setattr(coefficients, "known_on_host", lambda tensor: False)


def members(groups: list[Mapping[str, Any]], operands: int) -> GroupRows:
    group_of = torch.arange(operands) % len(groups)
    if len(groups) == 1:
        return GroupRows.one(host_numbers(groups[0]))
    return GroupRows(
        groups=list(map(host_numbers, groups)),
        rows=[(group_of == index).nonzero().flatten() for index in range(len(groups))],
        group_of=group_of,
    )


def table(with_: Backend, name: str, groups: list[Mapping[str, Any]], steps: Tensor, lr_scale: float | LrScale | None) -> Tensor:
    params = [torch.zeros(1, dtype=torch.float32) for _ in steps]
    operands = Operands.whole(params, params, [])
    return coefficient_table(FUNCTIONS[name], members(groups, len(steps)), steps, lr_scale, backend=with_, operands=operands)


def of_floats(name: str, groups: list[Mapping[str, Any]], steps: Tensor, lr_scales: list[float] | None) -> Tensor:
    rows = []
    for row, step in enumerate(steps.tolist()):
        group = groups[row % len(groups)]
        arguments = [{**group, "lr": float(group["lr"])}, int(step) + 1]
        rows.append(FUNCTIONS[name](*arguments, *([] if lr_scales is None else [lr_scales[row]])))
    return torch.tensor(rows, dtype=torch.float64).to(torch.float32)


def assert_all_alike(name: str, groups: list[Mapping[str, Any]], steps: Tensor, sums: Sums | None) -> None:
    lr_scale: float | LrScale | None = None if name == "observe" else 1.0
    floats = None if name == "observe" else [1.0] * len(steps)
    if sums is not None and name != "observe":
        lr_scale = LrScale(of_mean=STATISTIC.lr_scale, sums=sums)
        floats = [STATISTIC.lr_scale(groups[row % len(groups)], mean) for row, mean in enumerate(sums.mean().tolist())]
    expected = of_floats(name, groups, steps, floats)
    for each in (eager.BACKEND, backend.Triton()):
        found = table(each, name, groups, steps, lr_scale)
        assert torch.equal(found.nan_to_num(7.0).view(torch.int32), expected.nan_to_num(7.0).view(torch.int32)), each.name
        assert torch.equal(found.isnan(), expected.isnan())


def sums_of(operands: int, generator: torch.Generator) -> Sums:
    """Of more tensors than operands; means from far below 1 to far above, and one that is not finite."""
    tensors = operands + 2
    return Sums(
        totals=torch.randint(0, 2**50, (tensors,), generator=generator),
        non_finite=(torch.arange(tensors) == 1).long(),
        slots=torch.randperm(tensors, generator=generator)[:operands],
        units=2.0 ** -torch.randint(20, 50, (operands,), generator=generator).double(),
        numels=torch.randint(1, 2**20, (operands,), generator=generator).double(),
    )


STEPS = torch.tensor([0.0, 1.0, 2.0, 9.0, 1000.0, 2.0**24 - 2])
GROUPS = {
    "one group": [GROUP],
    "three": [GROUP, GROUP | {"betas": (0.3, 0.95), "lr": 1e-3, "threshold": 3e-3}, GROUP | {"weight_decay": 0.0}],
    "two formulas": [GROUP, GROUP | {"decay_form": "l2"}, GROUP | {"lr": torch.tensor(3e-3)}],
    "tensors": [GROUP | {"lr": torch.tensor(1e-3)}, GROUP | {"lr": torch.tensor(7e-3), "decay_form": "corrected"}],
    "eps underflows": [GROUP | {"eps": 0.0}, GROUP | {"eps": 1e-30}],
    "no decay yet": [GROUP | {"decay_form": "decoupled", "reference_lr": 0.0}, GROUP],
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("groups", GROUPS)
def test_a_kernel_gives_the_bits_of_floats_and_of_tensors(name: str, groups: str) -> None:
    """More operands than a program takes, with the first step, a late one, and one after which fp32 counts no further."""
    steps = STEPS.repeat(30)
    assert len(steps) > triton_formulas.BLOCK
    assert_all_alike(name, GROUPS[groups], steps, None)
    assert_all_alike(name, GROUPS[groups], steps, sums_of(len(steps), torch.Generator().manual_seed(0)))


@given(
    name=st.sampled_from(sorted(FUNCTIONS)),
    betas=st.tuples(st.floats(0.0, 0.9999), st.floats(0.0, 0.99999)),
    lr=st.floats(0.0, 10.0),
    reference_lr=st.floats(0.0, 10.0),
    eps=st.floats(0.0, 1e-3),
    weight_decay=st.floats(0.0, 1.0),
    form=st.sampled_from(FORMS),
    steps=st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
@settings(
    deadline=None,
    max_examples=examples(20),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.usefixtures("device")
def test_any_hyperparameters_give_the_same_bits(name, betas, lr, reference_lr, eps, weight_decay, form, steps, seed) -> None:
    group = GROUP | {"betas": betas, "lr": lr, "reference_lr": reference_lr, "eps": eps, "weight_decay": weight_decay, "decay_form": form}
    groups = [group, GROUP, group | {"lr": torch.tensor(lr)}]
    assert_all_alike(name, groups, torch.tensor(steps).float(), sums_of(len(steps), torch.Generator().manual_seed(seed)))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    steps = STEPS.clone()
    sums = sums_of(len(steps), torch.Generator().manual_seed(0))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for each in (eager.BACKEND, backend.Triton()):
            scale = LrScale(of_mean=STATISTIC.lr_scale, sums=sums)
            assert table(each, "adam", GROUPS["three"], steps, scale).dtype == torch.float32
        assert_all_alike("adam", GROUPS["three"], steps, sums)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_hyperparameters_may_be_tensors_and_are_not_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coefficients, "known_on_host", lambda tensor: tensor.numel() == 1)
    betas = (torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64))
    tensors = GROUP | {"betas": betas, "weight_decay": torch.tensor(0.25), "eps": torch.tensor(2.0**-20)}
    floats = GROUP | {"weight_decay": 0.25, "eps": 2.0**-20}
    scale = None if name == "observe" else 1.0
    for each in (eager.BACKEND, backend.Triton()):
        assert torch.equal(table(each, name, [tensors], STEPS, scale), table(each, name, [floats], STEPS, scale))
    assert [float(beta) for beta in betas] == [0.9, 0.99]


def test_scales_are_computed_once_for_groups_that_have_all_in_common_that_they_depend_on() -> None:
    """Each takes a dozen operations of torch, however few operands a group has."""
    calls = []

    def of_mean(group: Mapping[str, Any], mean: Any) -> Any:
        calls.append(group["threshold"])
        return STATISTIC.lr_scale(group, mean)

    groups = [GROUP | {"lr": 0.1 * (row + 1), "threshold": threshold} for row, threshold in enumerate((0.7, 3e-3, 0.7, 3e-3, 0.7))]
    steps = STEPS.repeat(3)
    sums = sums_of(len(steps), torch.Generator().manual_seed(0))
    found = table(eager.BACKEND, "adam", groups, steps, LrScale(of_mean=of_mean, sums=sums))
    assert calls == [0.7, 3e-3]
    scales = [STATISTIC.lr_scale(groups[row % len(groups)], mean) for row, mean in enumerate(sums.mean().tolist())]
    assert torch.equal(found.nan_to_num(7.0), of_floats("adam", groups, steps, scales).nan_to_num(7.0))


@pytest.mark.usefixtures("device")
def test_constants_are_sent_when_they_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(triton_formulas, "send", lambda values, device: sent.append(values) or values)
    own, params = backend.Triton(), [torch.zeros(1) for _ in STEPS]
    operands = Operands.whole(params, params, [])
    found = [
        coefficient_table(adam.coefficients, GroupRows.one(GROUP | {"lr": lr}), STEPS, 1.0, backend=own, operands=operands)
        for lr in (1e-2, 1e-2, 5e-3, 1e-2)
    ]
    assert len(sent) == 3
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[2])


def test_what_is_launched_is_what_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an int is 1, or a tensor is aligned by chance."""
    groups = [GROUP | {"lr": torch.tensor(1e-2)}, GROUP | {"lr": torch.tensor(1e-3)}]
    sums = LrScale(of_mean=STATISTIC.lr_scale, sums=sums_of(2, torch.Generator()))
    monkeypatch.setattr(coefficients, "known_on_host", lambda tensor: False)
    with launched(monkeypatch) as found:
        table(backend.Triton(), "adam", groups, torch.zeros(2), sums)
    recorder = Recorder()
    scale = STATISTIC.lr_scale(GROUP, Sums.recorded_mean(recorder))
    arguments = GROUP | {"lr": recorder.input("lr")}, recorder.input("step"), scale
    expected = compiled("adam", arguments, recorder, list(triton_formulas.FOUND), 90)
    assert [each.asm["ptx"] for each in found] == [expected.asm["ptx"]]


def compiled(name: str, arguments: Sequence[Any], recorder: Recorder, inputs: list[str], capability: int) -> Any:
    """The kernel of a function of these arguments, for NVIDIA's GPUs."""
    kernel = triton_formulas.formula_kernel(recorder.formula(FUNCTIONS[name](*arguments)).operations, tuple(inputs))
    signature = {"table": "*fp32", "operands": "i32", "constants": "*fp64", "width": "i32", "steps": "*fp32"}
    signature |= {f"all_{each}": "*fp64" if each in ("lr", "units", "numels") else "*i64" for each in inputs}
    assert list(signature) == kernel.arg_names[:-1]
    source = ASTSource(kernel, signature | {"BLOCK": "constexpr"}, constexprs={"BLOCK": triton_formulas.BLOCK})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=triton_formulas.OPTIONS)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gpu_rounds_each_operation_once(name: str, capability: int) -> None:
    """In double precision; nothing is contracted or approximated, no denormal number flushed, no register spilled."""
    recorder = Recorder()
    arguments: list[Any] = [GROUP | {"lr": recorder.input("lr"), "decay_form": "corrected"}, recorder.input("step")]
    if name != "observe":
        arguments.append(STATISTIC.lr_scale(GROUP, Sums.recorded_mean(recorder)))
    code = compiled(name, arguments, recorder, ["formula_of", "lr"] if name == "observe" else list(triton_formulas.FOUND), capability)
    ptx = code.asm["ptx"]
    assert not re.findall(r"\bfma\.\S*f(?:32|64)|\S+\.ftz\S*|\S+\.approx\S*", ptx)
    assert not re.findall(r"\b(?:mul|add|sub)\.f(?:32|64)", ptx), "ptxas may contract what does not name its rounding"
    assert re.search(r"\bcvt\.rn\.f32\.f64", ptx)
    assert not re.search(r"\bdiv\.(?!rn\.f64)\S*f", ptx)
    assert not re.search(r"\bsqrt\.(?!rn\.f64)\S*f", ptx)
    assert bool(re.search(r"\bdiv\.rn\.f64", ptx)) == (name != "observe")
    assert code.metadata.shared == 0
    assert "local" not in re.sub(r"//.*", "", ptx)
