"""A storage format is two functions and an entry of FORMATS: all backends, state dicts, checkpoints and reports follow from these.

The formats here and in `toy_format.py` are nowhere else.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from operand_cases import Case, assert_same, assert_same_observation, assert_same_update
from torch import Tensor, nn
from toy_format import PARTS, load_parts

import sharded_optim as so
from sharded_optim import checkpoint
from sharded_optim.checkpoint.export import export_torch
from sharded_optim.formulas import operations as xp
from sharded_optim.optimizers.adam import ADAM
from sharded_optim.optimizers.stable_adamw import STABLE_ADAMW
from sharded_optim.step import stateful
from sharded_optim.storage.format import Array, Format
from sharded_optim.storage.formats import FORMATS, format_beside, param_format

ROOT = Path(__file__).parents[2]
SHAPES = [(), (5,), (7, 3), (150,), (0,)]


# -------------------------------------------------------------------------------------- others


def load_bf16(stored):
    return xp.from_bf16(stored)


def store_toward_zero(value, uniform):
    return (xp.to_bf16(xp.stochastic_bf16(value, 1.0)),)


TENTH = 0.1


def load_tenths(stored):
    return 10.0 * stored


def store_tenths(value, uniform):
    return (TENTH * limited(value),)


def limited(value):
    return xp.where(value > 1e30, 1e30, value)


def load_mixed(rounded, rest):
    return xp.from_fp16(rounded) + rest


def store_mixed(value, uniform):
    rounded = xp.to_fp16(xp.stochastic_fp16(value, uniform))
    return rounded, value - xp.from_fp16(rounded)


def load_codes(code):
    return 0.015625 * code


def store_codes(value, uniform):
    scaled = 64.0 * xp.where(value > 1.0, 1.0, xp.where(value < -1.0, -1.0, value))
    return ((scaled + 12582912.0) - 12582912.0,)  # 1.5 * 2**23: to the nearest integer, which the array takes


OTHERS = (
    Format(name="codes of 8 bits", arrays=(Array("", torch.int8),), load=load_codes, store=store_codes),
    Format(name="toward zero", arrays=(Array("", torch.bfloat16),), load=load_bf16, store=store_toward_zero),
    Format(name="tenths", arrays=(Array("", torch.float32),), load=load_tenths, store=store_tenths),
    Format(
        name="of two dtypes, at random",
        arrays=(Array("", torch.float16), Array("rest", torch.float32)),
        load=load_mixed,
        store=store_mixed,
        is_random=True,
    ),
)
NEW = {fmt.name: fmt for fmt in (PARTS, *OTHERS)}
OF_MOMENTS = {"codes of 8 bits", "tenths"}  # without the main array being the value


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for fmt in NEW.values():
        monkeypatch.setitem(FORMATS, fmt.name, fmt)


@pytest.fixture
def parts_for_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 parameters are stored in three parts."""
    monkeypatch.setattr(stateful, "param_format", of_parameters)


def of_parameters(dtype: torch.dtype, **options: Any) -> Format:
    return PARTS if dtype == torch.bfloat16 else param_format(dtype, **options)


# ----------------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("compiling", ["cpu", "triton"])
def test_what_is_compiled_of_a_format_gives_the_bits_of_its_functions(name: str, compiling: str, request: pytest.FixtureRequest) -> None:
    """Of parameters, of moments and of both, on awkward shapes, strides and segments; also where a kernel only observes.

    Numbers in a format are fp32, as those of tensors are: a tenth of float64 would differ.
    """
    if compiling == "triton":
        request.getfixturevalue("interpreter")
    module = import_module(f"sharded_optim.backends.{compiling}")
    own = module.Triton(chunk=128, threads=4) if compiling == "triton" else module.BACKEND
    for case in (Case(algorithm=ADAM, fmt=name), Case(algorithm=ADAM, state=name), Case(algorithm=STABLE_ADAMW, fmt=name, state=name)):
        assert_same_update(own, case, steps=2)
    assert_same_observation(own, Case(algorithm=STABLE_ADAMW, state=name))


@pytest.mark.parametrize("name", NEW)
def test_what_a_gpu_runs_of_a_format_is_compiled(name: str) -> None:
    """For one that is not there; with arithmetic that rounds each operation once."""
    triton = pytest.importorskip("sharded_optim.backends.triton", reason="the triton package is not installed")
    target = import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    formats = (NEW[name],) * (1 + len(ADAM.state))
    ptx = triton.compile_for(triton.update_kernel(ADAM, formats, FORMATS["bf16"]), target).asm["ptx"]
    assert not re.findall(r"\bfma\.\S*f32|\S+\.ftz\S*|\S+\.approx\S*|\b(?:mul|add|sub)\.f(?:32|64)", ptx)
    assert not re.findall(r"\bcvt\S*\.f64|\S+\.rn\.f64", ptx)


@pytest.mark.parametrize("fmt", [*FORMATS.values(), *NEW.values()], ids=lambda fmt: fmt.name)
def test_zeros_are_what_new_state_needs(fmt: Format) -> None:
    """A moment begins with zeros in all arrays, and beside a parameter zeros leave it as it is; formats with equal arrays load alike."""
    zero, one = torch.zeros(3), torch.tensor([1.0, -0.75, 1.5])
    assert torch.equal(fmt.load(*(zero.to(array.dtype) for array in fmt.arrays)), zero)
    if fmt.name not in OF_MOMENTS:
        loaded = fmt.load(one.to(fmt.dtype), *(zero.to(array.dtype) for array in fmt.extra))
        assert torch.equal(loaded, one)
        assert format_beside(fmt.dtype, {array.name for array in fmt.extra}).arrays == fmt.arrays
    if fmt.name not in NEW:
        assert all(other.load is fmt.load for other in FORMATS.values() if other.arrays == fmt.arrays and other.name not in NEW)


# --------------------------------------------------------------------------------------------------------------------- optimizers


class Run:
    """An optimizer that is stepped with gradients known from the step alone, all of which bfloat16 can hold."""

    def __init__(self, backend: str, dtype: torch.dtype = torch.bfloat16, make: Callable = so.StableAdamW, **options: Any) -> None:
        generator = torch.Generator().manual_seed(5)
        values = [torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in SHAPES]
        self.params = [nn.Parameter(value) for value in values]
        self.optimizer = make([(f"w{index}", param) for index, param in enumerate(self.params)], lr=1e-3, backend=backend, **options)

    def step(self, steps: range) -> Run:
        for step in steps:
            generator = torch.Generator().manual_seed(100 + step)
            for param in self.params:
                param.grad = torch.randn(param.shape, generator=generator).bfloat16().to(param.dtype)
            self.optimizer.step()
        return self

    def values(self, key: str | None = None) -> list[Tensor]:
        """Of the parameters or of a moment, decoded as `PARTS` where they are stored so."""
        found = []
        for param in self.params:
            state = self.optimizer.state[param]
            main, names = (param.detach(), ("middle", "low")) if key is None else (state[key], (f"{key}.middle", f"{key}.low"))
            found.append(load_parts(main, *(state[name] for name in names)) if names[0] in state else main.float())
        return found

    def reports(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index, param in enumerate(self.params):
            found = self.optimizer.report_per_parameter_metrics(param, f"w{index}", found)
        return found

    def assert_same(self, other: Run) -> None:
        for key in (None, "exp_avg", "exp_avg_sq"):
            for mine, its in zip(self.values(key), other.values(key), strict=True):
                assert_same(mine, its, str(key))
        reports = other.reports()
        assert self.reports().keys() == reports.keys()
        for name, value in self.reports().items():
            assert value.item() == reports[name].item(), name


@pytest.mark.usefixtures("parts_for_parameters")
@pytest.mark.parametrize(("backend", "state_dtype"), [("eager", PARTS.name), ("cpu", PARTS.name), ("triton", PARTS.name), ("cpu", None)])
def test_parameters_and_moments_in_three_arrays_step_as_in_float32(
    backend: str, state_dtype: str | None, request: pytest.FixtureRequest
) -> None:
    """Bit for bit, in what is stored and in what is reported: three times 8 bits are all that a float32 has."""
    if backend == "triton":
        request.getfixturevalue("interpreter")
    parts = Run(backend, state_dtype=state_dtype).step(range(4))
    parts.assert_same(Run("eager", torch.float32).step(range(4)))
    expected = {"step", "exp_avg", "exp_avg_sq", "middle", "low"}
    if state_dtype is not None:
        expected |= {f"{moment}.{part}" for moment in ("exp_avg", "exp_avg_sq") for part in ("middle", "low")}
    assert parts.optimizer.state[parts.params[1]].keys() == expected
    assert {each.dtype for each in parts.optimizer.state[parts.params[1]].values()} <= {torch.float32, torch.bfloat16}


@pytest.mark.usefixtures("parts_for_parameters")
def test_a_state_dict_and_a_checkpoint_take_all_arrays_along(tmp_path: Path) -> None:
    straight = Run("cpu", state_dtype=PARTS.name).step(range(6))
    before = Run("cpu", state_dtype=PARTS.name).step(range(3))
    model = nn.ParameterList(before.params)
    checkpoint.save(tmp_path / "root", 3, model=model, optimizer=before.optimizer)
    export_torch(tmp_path / "root", tmp_path / "exported.pt")
    exported = torch.load(tmp_path / "exported.pt", weights_only=True)
    for way in ("state dict", "checkpoint", "export"):
        after = Run("eager", state_dtype=PARTS.name)
        if way == "checkpoint":
            after.step(range(2))
            checkpoint.load(tmp_path / "root", model=nn.ParameterList(after.params), optimizer=after.optimizer)
        else:
            for param, saved in zip(after.params, before.params, strict=True):
                param.data.copy_(saved.detach())
            state_dict = exported["optimizer"] if way == "export" else copy.deepcopy(before.optimizer.state_dict())
            after.optimizer.load_state_dict(state_dict)
        after.step(range(3, 6)).assert_same(straight)


def test_moments_of_another_format_are_converted_where_it_is_known_and_refused_where_it_is_not() -> None:
    """Of several arrays, none is the value."""
    plain, parts = Run("cpu", torch.float32).step(range(2)), Run("cpu", torch.float32, state_dtype=PARTS.name).step(range(2))
    for state_dtype in (PARTS.name, "bf16_kahan"):
        taken = Run("cpu", torch.float32, state_dtype=state_dtype)
        taken.optimizer.load_state_dict(copy.deepcopy(plain.optimizer.state_dict()))
        for param, source in zip(taken.params, plain.params, strict=True):
            for moment in ("exp_avg", "exp_avg_sq"):
                arrays = [taken.optimizer.state[param][key] for key in FORMATS[state_dtype].entries(moment)]
                expected = FORMATS[state_dtype].store(plain.optimizer.state[source][moment], None)
                assert all(torch.equal(a, e) for a, e in zip(arrays, expected, strict=True))
    before = [param.detach().clone() for param in plain.params]
    told = r"saved state of 'w0' has 'exp_avg' of torch.bfloat16, 'exp_avg.middle' .*, but the format 'fp32' has 'exp_avg' of torch.float32"
    with pytest.raises(ValueError, match=told):
        plain.optimizer.load_state_dict(parts.optimizer.state_dict())
    state = parts.optimizer.state_dict()
    del state["state"][1]["exp_avg.low"]
    with pytest.raises(ValueError, match=r"'w1' has 'exp_avg' of torch.bfloat16, 'exp_avg.middle' of torch.bfloat16, but .* load it into"):
        parts.optimizer.load_state_dict(state)
    assert all(torch.equal(param, value) for param, value in zip(plain.params, before, strict=True))


def test_moments_may_be_codes() -> None:
    """Bytes, as integers in what is saved; they are taken for nothing else."""
    runs = [Run(backend, torch.float32, state_dtype="codes of 8 bits").step(range(3)) for backend in ("eager", "cpu")]
    for ours, expected in zip(*(run.params for run in runs), strict=True):
        assert_same(expected, ours, "parameter")
        states = [run.optimizer.state[param] for run, param in zip(runs, (ours, expected), strict=True)]
        assert states[0]["exp_avg"].dtype == torch.int8
        assert torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])
    moments = [load_codes(runs[0].optimizer.state[param]["exp_avg"]) for param in runs[0].params]
    reports = runs[0].reports()
    assert all(reports[f"l2_norm/moment/w{index}"].item() == moment.double().norm().item() for index, moment in enumerate(moments))
    saved = copy.deepcopy(runs[0].optimizer.state_dict())
    plain = Run("cpu", torch.float32).step(range(2))
    with pytest.raises(ValueError, match=r"has 'exp_avg' of torch.int8, but the format 'fp32' has 'exp_avg' of torch.float32"):
        plain.optimizer.load_state_dict(saved)
    runs[1].optimizer.load_state_dict(saved)
    runs[1].step(range(3, 5)).assert_same(runs[0].step(range(3, 5)))
    plain.optimizer.state[plain.params[1]]["exp_avg"] = torch.zeros(5, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"'exp_avg' of 'w1' has dtype torch.int8, but the format 'fp32' stores it in torch.float32"):
        plain.step(range(2, 3))


def test_an_array_of_another_dtype_or_a_lost_one_is_refused_by_name() -> None:
    run = Run("cpu", torch.float32, state_dtype=PARTS.name).step(range(2))
    state = run.optimizer.state[run.params[1]]
    low = state["exp_avg.low"]
    state["exp_avg.low"] = low.float()
    with pytest.raises(
        ValueError, match=r"'exp_avg.low' of 'w1' has dtype torch.float32, but the format 'bf16 in 3 parts' stores it in torch.bfloat16"
    ):
        run.step(range(2, 3))
    del state["exp_avg.low"]
    with pytest.raises(ValueError, match=r"the state of 'w1' lacks 'exp_avg.low' after 2 steps"):
        run.step(range(2, 3))
    state["exp_avg.low"] = low
    run.step(range(2, 4)).assert_same(Run("cpu", torch.float32, state_dtype=PARTS.name).step(range(4)))


def test_a_moment_that_may_begin_late_begins_with_all_arrays_or_none() -> None:
    run = Run("cpu", torch.float32, so.DecoupledAdamW, state_dtype=PARTS.name).step(range(2))
    run.optimizer.param_groups[0]["amsgrad"] = True
    run.step(range(2, 3))
    state = run.optimizer.state[run.params[1]]
    assert state["max_exp_avg_sq.low"].any()
    del state["max_exp_avg_sq.low"]
    with pytest.raises(ValueError, match=r"the state of 'w1' lacks 'max_exp_avg_sq.low' after 3 steps"):
        run.step(range(3, 4))


@pytest.mark.usefixtures("parts_for_parameters")
def test_a_parameter_that_others_have_written_loses_all_further_arrays() -> None:
    run = Run("cpu").step(range(2))
    assert all(run.optimizer.state[run.params[3]][key].any() for key in ("middle", "low"))
    with torch.no_grad():
        run.params[3].fill_(0.5)
    saved = run.optimizer.state_dict()["state"]
    assert not any(saved[3][key].any() for key in ("middle", "low"))
    assert saved[2]["middle"].any()


@pytest.mark.ranks(1)
def test_masters_begin_with_the_value_of_all_arrays(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for fmt in NEW.values():
            patch.setitem(FORMATS, fmt.name, fmt)
        patch.setattr(stateful, "param_format", of_parameters)
        check_masters(tmp_path)


def check_masters(folder: Path) -> None:
    parts = Run("eager").step(range(3))
    checkpoint.save(folder, 3, model=nn.ParameterList(parts.params), optimizer=parts.optimizer)
    expected = parts.values()
    for way in ("checkpoint", "state dict"):
        model = nn.ParameterList(Run("eager").params)
        optimizer = so.ShardedOptimizer(model, so.StableAdamW, lr=1e-3, backend="eager")
        if way == "checkpoint":
            checkpoint.load(folder, model=model, optimizer=optimizer)
        else:
            model.load_state_dict(nn.ParameterList(parts.params).state_dict())
            optimizer.load_state_dict(copy.deepcopy(parts.optimizer.state_dict()))
        for param, value in zip(model, expected, strict=True):
            if value.numel():
                assert torch.equal(optimizer.state[param]["master"].view(value.shape), value), way
            assert torch.equal(param, value.bfloat16()), way


# ------------------------------------------------------------------------------------------------------------- rounded at random


def test_a_parameter_and_its_moments_are_rounded_by_different_numbers() -> None:
    """In the first step of AMSGrad the second moment and its maximum have one value, and the first has it up to a factor."""
    param = nn.Parameter(torch.full((1000,), 1.0))
    optimizer = so.DecoupledAdamW([("w", param)], lr=1e-2, amsgrad=True, state_dtype="bf16_stochastic")
    param.grad = torch.full((1000,), 0.7)
    optimizer.step()
    squares, largest = optimizer.state[param]["exp_avg_sq"], optimizer.state[param]["max_exp_avg_sq"]
    assert len(set(squares.tolist())) == len(set(largest.tolist())) == 2
    assert 0.3 < float((squares == largest).float().mean()) < 0.7


def test_moments_rounded_at_random_go_on_where_they_would_stand_still() -> None:
    """A second moment with beta2 = 0.9999 falls by a tenth in 1000 steps without gradients, which rounding to nearest would all undo."""
    param = nn.Parameter(torch.ones(2000))
    optimizer = so.AdamW([("w", param)], lr=0.0, betas=(0.9, 0.9999), state_dtype="bf16_stochastic", weight_decay=0.0)
    param.grad = torch.ones(2000)
    optimizer.step()
    optimizer.state[param]["exp_avg_sq"].fill_(1.0)
    param.grad = torch.zeros(2000)
    for _ in range(1000):
        optimizer.step()
    assert float(optimizer.state[param]["exp_avg_sq"].double().mean()) == pytest.approx(0.9999**1000, rel=2e-3)


# ------------------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize("name", ["bf16_typo", "fp16", "fp16_kahan"])
def test_a_format_that_moments_cannot_have_is_refused_with_those_they_can(name: str) -> None:
    with pytest.raises(ValueError, match=rf"state_dtype must be torch.float32, torch.bfloat16 or .*'bf16_kahan'.* got {name}"):
        so.AdamW([nn.Parameter(torch.ones(3))], lr=1e-2, state_dtype=name)


@pytest.mark.parametrize("choice", [torch.bfloat16, "bf16"])
def test_a_plain_format_may_be_named_or_given_by_its_dtype(choice: torch.dtype | str) -> None:
    with pytest.raises(ValueError, match=r"state_dtype=torch.bfloat16 needs beta2 <= 0.9961, got 0.999"):
        so.AdamW([nn.Parameter(torch.ones(3))], lr=1e-2, betas=(0.9, 0.999), state_dtype=choice)
    run = Run("cpu", torch.float32, state_dtype=choice).step(range(2))
    assert run.optimizer.state[run.params[1]]["exp_avg"].dtype == torch.bfloat16
    assert copy.deepcopy(run.optimizer).state_dtype == choice


# ------------------------------------------------------------------------------------------------------------------- one new file

LISTED = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
import sharded_optim as so
from sharded_optim.tools.plan import Setup, plan
from sharded_optim.tools.shapes import from_shapes

def trained(backend, shard=False):
    torch.manual_seed(0)
    model = nn.Linear(5, 7)
    if shard:
        fully_shard(model)
    optimizer = so.StableAdamW(model.named_parameters(), lr=1e-2, state_dtype="bf16 in 3 parts", backend=backend)
    for step in range(3):
        for number, param in enumerate(model.parameters()):
            grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + number)) * 8.0
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if shard else grad
        optimizer.step()
    return [param.full_tensor() if shard else param.detach() for param in model.parameters()]

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous")
whole = trained("eager")
assert all(map(torch.equal, trained("cpu"), whole))
assert all(map(torch.equal, trained("cpu", shard=True), whole))
dist.destroy_process_group()
planned = [plan(from_shapes({"w": [7, 5]}), "none", Setup(state_dtype=name)).memory.moments for name in ("fp32", "bf16 in 3 parts")]
assert planned == [2 * 4 * 35, 2 * 6 * 35], planned
"""


def test_it_takes_one_new_file_and_a_line(tmp_path: Path) -> None:
    """Then backends, shardings and plans have it."""
    shutil.copytree(ROOT / "sharded_optim", tmp_path / "sharded_optim", ignore=shutil.ignore_patterns("__pycache__"))
    storage = tmp_path / "sharded_optim" / "storage"
    shutil.copy(ROOT / "tests" / "toy_format.py", storage / "toy.py")
    listed = (storage / "formats.py").read_text().replace("in (*FLOAT_FORMATS,)", "in (*FLOAT_FORMATS, PARTS)")
    imported = "from sharded_optim.storage.format import Format\n"
    (storage / "formats.py").write_text(listed.replace(imported, imported + "from sharded_optim.storage.toy import PARTS\n"))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LISTED, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        for each in started:
            output, _ = each.communicate(timeout=100)
            assert each.returncode == 0, output
    finally:
        for each in started:
            each.kill()
