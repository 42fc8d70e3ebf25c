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

from sharded_optim.backends import Backend, Operands, cpu, eager
from sharded_optim.formulas import Coefficients
from sharded_optim.formulas.recording import Recorder
from sharded_optim.formulas.scalars import Number, Step, Sums, divide, maximum, mean, sqrt
from sharded_optim.formulas.weight_decay import FORMS
from sharded_optim.optimizers import adam, sgd, stable_adamw
from sharded_optim.step import coefficients
from sharded_optim.step.coefficients import LrScale, OperandGroups, coefficient_table, host_numbers

triton = pytest.importorskip("triton", reason="the triton package is not installed")

from absent_gpu import launched  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sharded_optim.backends import triton as backend  # noqa: E402
from sharded_optim.backends.triton import formulas as triton_formulas  # noqa: E402


def of_the_step(group: Mapping[str, Any], step: Step, lr_scale: Number) -> Coefficients:
    """A learning rate that falls as 1 / step, and the step itself."""
    return divide(lr_scale * group["lr"], step), step * group["weight_decay"], 0.5 - step, sqrt(step), maximum(step, 3.0), step


FUNCTIONS: dict[str, Callable] = {
    "of the step": of_the_step,
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


def members(groups: list[Mapping[str, Any]], operands: int) -> OperandGroups:
    group_of = None if len(groups) == 1 else torch.arange(operands) % len(groups)
    return OperandGroups(groups=list(map(host_numbers, groups)), group_of=group_of)


def table(with_: Backend, name: str, groups: list[Mapping[str, Any]], steps: Tensor, lr_scale: float | LrScale | None) -> Tensor:
    params = [torch.zeros(1, dtype=torch.float32) for _ in steps]
    operands = Operands.whole(params, params, [])
    return coefficient_table(FUNCTIONS[name], members(groups, len(steps)), steps, lr_scale, backend=with_, operands=operands)


def backends() -> list[Backend]:
    return [eager.BACKEND, cpu.BACKEND, backend.Triton()]


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
        floats = [STATISTIC.lr_scale(groups[row % len(groups)], mean) for row, mean in enumerate(mean(**sums.inputs()).tolist())]
    expected = of_floats(name, groups, steps, floats)
    for each in backends():
        found = table(each, name, groups, steps, lr_scale)
        assert torch.equal(found.nan_to_num(7.0).view(torch.int32), expected.nan_to_num(7.0).view(torch.int32)), each.name
        assert torch.equal(found.isnan(), expected.isnan())


def sums_of(operands: int, generator: torch.Generator) -> Sums:
    """Of more tensors than operands; means from far below 1 to far above, and one that is not finite."""
    tensors = operands + 2
    return Sums(
        vector=torch.cat([torch.randint(0, 2**50, (tensors,), generator=generator), (torch.arange(tensors) == 1).long()]),
        tensors=tensors,
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


@pytest.mark.usefixtures("interpreter")
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
@pytest.mark.usefixtures("interpreter")
def test_any_hyperparameters_give_the_same_bits(name, betas, lr, reference_lr, eps, weight_decay, form, steps, seed) -> None:
    group = GROUP | {"betas": betas, "lr": lr, "reference_lr": reference_lr, "eps": eps, "weight_decay": weight_decay, "decay_form": form}
    groups = [group, GROUP, group | {"lr": torch.tensor(lr)}]
    assert_all_alike(name, groups, torch.tensor(steps).float(), sums_of(len(steps), torch.Generator().manual_seed(seed)))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    steps = STEPS.clone()
    sums = sums_of(len(steps), torch.Generator().manual_seed(0))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for each in backends():
            scale = LrScale(of_mean=STATISTIC.lr_scale, sums=sums)
            assert table(each, "adam", GROUPS["three"], steps, scale).dtype == torch.float32
        assert_all_alike("adam", GROUPS["three"], steps, sums)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_hyperparameters_may_be_tensors_and_are_not_written(name: str) -> None:
    betas = (torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64))
    tensors = GROUP | {"betas": betas, "weight_decay": torch.tensor(0.25), "eps": torch.tensor(2.0**-20)}
    floats = GROUP | {"weight_decay": 0.25, "eps": 2.0**-20}
    scale = None if name == "observe" else 1.0
    for each in backends():
        assert torch.equal(table(each, name, [tensors], STEPS, scale), table(each, name, [floats], STEPS, scale))
    assert [float(beta) for beta in betas] == [0.9, 0.99]


@pytest.mark.parametrize("lr_scale", [None, 1.0])
def test_a_formula_is_recorded_once_though_the_learning_rate_changes(lr_scale: float | None) -> None:
    """A schedule must not cost what Python takes for every operation of a formula."""
    calls = []

    def coefficients(group: Mapping[str, Any], *_: Any) -> tuple[Any, ...]:
        calls.append(group["momentum"])
        return (group["lr"] * group["momentum"],)

    members = OperandGroups(groups=[GROUP, GROUP | {"momentum": 0.5}], group_of=torch.tensor([0, 1, 0]))
    params = [torch.zeros(1) for _ in range(3)]
    operands, steps = Operands.whole(params, params, []), torch.zeros(3)
    for lr in (0.1, 0.2, torch.tensor(0.4)):
        members = members.having([{**group, "lr": lr} for group in members.groups])
        for each in (eager.BACKEND, cpu.BACKEND):
            found = coefficient_table(coefficients, members, steps, lr_scale, backend=each, operands=operands)
            assert found.flatten().tolist() == (torch.tensor([0.9, 0.5, 0.9], dtype=torch.float64) * lr).float().tolist()
    assert calls == [0.9, 0.5]
    coefficient_table(coefficients, members.having([GROUP, GROUP]), steps, lr_scale, backend=cpu.BACKEND, operands=operands)
    assert calls == [0.9, 0.5, 0.9, 0.9]


def test_a_list_that_is_changed_in_place_changes_the_coefficients() -> None:
    """As a hyperparameter of `Floats` may be one."""
    params = [torch.zeros(1)]
    operands, nus = Operands.whole(params, params, []), [0.5]
    members = OperandGroups(groups=[GROUP | {"nus": nus}])
    for nu in (0.5, 0.9):
        nus[0] = nu
        members = members.having([GROUP | {"nus": nus}])
        found = coefficient_table(lambda group, step: (group["nus"][0],), members, torch.zeros(1), backend=cpu.BACKEND, operands=operands)
        assert found.item() == torch.tensor(nu).item()


@pytest.mark.parametrize("branch", [lambda lr: lr == 0.0, bool, lambda lr: lr < 1.0])
def test_a_branch_on_the_learning_rate_is_refused(branch: Callable[[Any], Any]) -> None:
    """It would be taken once, for all learning rates to come."""
    with pytest.raises(TypeError, match=r"cannot branch on lr|not supported between"):
        branch(Recorder().input("lr"))


@pytest.mark.usefixtures("interpreter")
def test_constants_are_sent_when_they_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    for module in (triton_formulas, coefficients):
        monkeypatch.setattr(module, "send", lambda values, device: sent.append(values) or values)
    own, params = backend.Triton(), [torch.zeros(1) for _ in STEPS]
    operands = Operands.whole(params, params, [])
    members = OperandGroups(groups=[GROUP])
    found = []
    for changes in ({}, {}, {"lr": 5e-3}, {"weight_decay": 0.2}):
        members = members.having([{**members.groups[0], **changes}])
        found.append(coefficient_table(adam.coefficients, members, STEPS, 1.0, backend=own, operands=operands))
    assert len(sent) == 4, "constants and a learning rate, another learning rate, other constants"
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[2], found[3])


def test_what_is_launched_is_what_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an int is 1, or a tensor is aligned by chance."""
    groups = [GROUP | {"lr": torch.tensor(1e-2)}, GROUP | {"lr": torch.tensor(1e-3)}]
    sums = LrScale(of_mean=STATISTIC.lr_scale, sums=sums_of(2, torch.Generator()))
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
