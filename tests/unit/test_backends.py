"""Every backend gives the bits of the eager one: parameters, Kahan compensation, moments, sums and non-finite counts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from operand_cases import GROUP, Case, assert_same_observation, assert_same_update
from torch import Tensor, nn
from toy_optimizer import ThresholdAdamW
from variants import CPU_BACKENDS, examples

import sharded_optim as so
from sharded_optim import backends
from sharded_optim.backends import cpu
from sharded_optim.backends.cpu import per_tensor, threads
from sharded_optim.formulas import Algorithm
from sharded_optim.optimizers.adam import ADAM, AMSGRAD
from sharded_optim.optimizers.sgd import MOMENTUM, SGD
from sharded_optim.optimizers.stable_adamw import STABLE_ADAMW
from sharded_optim.storage.formats import FORMATS

SHAPES = [(), (1,), (5,), (7, 3), (33, 17), (0,), (40_000,)]
OPTIMIZERS: dict[str, Callable] = {
    "Adam-l2": lambda params, **options: so.Adam(params, lr=1e-2, weight_decay=0.1, **options),
    "AdamW-skip": lambda params, **options: so.AdamW(params, lr=1e-2, betas=(0.3, 0.9), nonfinite="skip", **options),
    "DecoupledAdamW-amsgrad": lambda params, **options: so.DecoupledAdamW(params, lr=1e-2, amsgrad=True, **options),
    "DecoupledSGDW": lambda params, **options: so.DecoupledSGDW(params, lr=1e-2, **options),
    "DecoupledSGDW-dampening": lambda params, **options: so.DecoupledSGDW(params, lr=1e-2, momentum=0.9, dampening=0.3, **options),
    "DecoupledSGDW-nesterov": lambda params, **options: so.DecoupledSGDW(params, lr=1e-2, momentum=0.9, nesterov=True, **options),
    "StableAdamW": lambda params, **options: so.StableAdamW(params, lr=1e-2, **options),
    "ThresholdAdamW": lambda params, **options: ThresholdAdamW(params, lr=1e-2, threshold=0.3, **options),
}
STORAGES: dict[str, tuple[torch.dtype, dict]] = {
    "fp32": (torch.float32, {}),
    "fp32, bf16 moments": (torch.float32, {"state_dtype": torch.bfloat16}),
    "fp32, bf16 Kahan moments": (torch.float32, {"state_dtype": "bf16_kahan"}),
    "fp32, bf16 stochastic moments": (torch.float32, {"state_dtype": "bf16_stochastic"}),
    "bf16": (torch.bfloat16, {"kahan_sum": False}),
    "bf16 Kahan": (torch.bfloat16, {}),
    "bf16 stochastic": (torch.bfloat16, {"stochastic_rounding": True}),
    "bf16 Kahan stochastic": (torch.bfloat16, {"kahan_sum": True, "stochastic_rounding": True}),
    "all bf16 Kahan stochastic": (
        torch.bfloat16,
        {"kahan_sum": True, "stochastic_rounding": True, "state_dtype": "bf16_kahan_stochastic"},
    ),
    "fp16 Kahan": (torch.float16, {}),
    "fp16 stochastic": (torch.float16, {"stochastic_rounding": True}),
}


def awkward(dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Of all shapes, one transposed, one a slice with gaps, and one that begins in the middle of a buffer."""
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    values.append(torch.randn(6, 4, generator=generator).to(dtype).t())
    values.append(torch.randn(9, 8, generator=generator).to(dtype)[:, 3:6])
    values.append(torch.randn(1001, generator=generator).to(dtype)[1:])
    return values


def trained(make: Callable, storage: str, backend: str) -> list[dict[str, Tensor]]:
    dtype, options = STORAGES[storage]
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(value) for value in awkward(dtype, generator)]
    optimizer = make(params, backend=backend, **options)
    for step in range(5):
        for param, value in zip(params, awkward(dtype, generator), strict=True):
            param.grad = value * 10 ** (step % 4)
        grads = [param.grad.clone() for param in params]
        optimizer.step()
        assert all(torch.equal(param.grad, grad) for param, grad in zip(params, grads, strict=True)), "gradients are read-only"
    return [{"param": param.detach(), **optimizer.state[param]} for param in params]


def assert_same(actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for a, e in zip(actual, expected, strict=True):
        for key, value in e.items():
            # NaN has many bit patterns, of which backends may choose.
            assert torch.equal(a[key].nan_to_num(7.0), value.nan_to_num(7.0)), f"{key} of {tuple(value.shape)}"
            assert torch.equal(a[key].isnan(), value.isnan())


# Storage and math do not know each other, and each kernel costs half a second: not all pairs.
PAIRS = [(name, storage) for name in OPTIMIZERS for storage in ("fp32", "bf16 Kahan")]
PAIRS += [
    (name, storage) for name in ("StableAdamW", "DecoupledSGDW-nesterov") for storage in STORAGES if storage not in ("fp32", "bf16 Kahan")
]


@pytest.mark.parametrize(("name", "storage"), PAIRS)
def test_the_cpu_backend_gives_the_bits_of_the_eager_one(name: str, storage: str) -> None:
    """Awkward shapes and strides, jumping gradients; in float16 some overflow."""
    assert_same(trained(OPTIMIZERS[name], storage, "cpu"), trained(OPTIMIZERS[name], storage, "eager"))


@given(
    numel=st.integers(0, 70_000),
    betas=st.tuples(st.floats(0.0, 0.999), st.floats(0.0, 0.9999)),
    eps=st.sampled_from([0.0, 1e-30, 1e-8, 1e-3]),
    weight_decay=st.floats(0.0, 0.5),
    magnitude=st.integers(-30, 12),
    seed=st.integers(0, 2**32),
    spoiled=st.sampled_from([None, torch.nan, torch.inf]),
)
@pytest.mark.filterwarnings("ignore:eps=.* look swapped")
@settings(deadline=None, max_examples=examples(20))
def test_any_hyperparameters_and_magnitudes_give_the_bits_of_the_eager_backend(
    numel: int, betas: tuple[float, float], eps: float, weight_decay: float, magnitude: int, seed: int, spoiled: float | None
) -> None:
    results = []
    for backend in ("eager", "cpu"):
        generator = torch.Generator().manual_seed(seed)
        param = nn.Parameter(torch.randn(numel, generator=generator))
        optimizer = so.StableAdamW([("w", param)], lr=1e-2, betas=betas, eps=eps, weight_decay=weight_decay, backend=backend)
        for step in range(3):
            param.grad = torch.randn(numel, generator=generator) * 10.0**magnitude
            if spoiled is not None and step == 1 and numel:
                param.grad[numel // 2] = spoiled
            optimizer.step()
        results.append([{"param": param.detach(), **optimizer.state[param]}])
        results[-1].append({key: torch.tensor(value) for key, value in optimizer.metrics().items()})
    assert_same(results[1], results[0])


SHAPES_OF_FEW = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@given(
    algorithm=st.sampled_from([ADAM, AMSGRAD, SGD, MOMENTUM, STABLE_ADAMW]),
    fmt=st.sampled_from(sorted(FORMATS)),
    grad=st.sampled_from(["fp32", "bf16", "fp16"]),
    state=st.sampled_from(["fp32", "bf16", "bf16_kahan", "bf16_stochastic"]),
    shapes=st.none() | st.lists(SHAPES_OF_FEW, min_size=3, max_size=5),
    betas=st.tuples(st.sampled_from([0.0, 0.3, 0.9]), st.floats(0.0, 0.9999)),
    eps=st.sampled_from([0.0, 1e-30, 1e-8, 1e-3]),
    form=st.sampled_from(["coupled", "decoupled", "corrected"]),
    magnitude=st.integers(-44, 12),
    size=st.sampled_from([1.0, 1e-6, 1e-39]),
    grad_scale=st.sampled_from([None, 1 / 3]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=examples(7), phases=(Phase.explicit, Phase.reuse, Phase.generate))
def test_any_storage_shape_and_option_gives_the_bits_of_the_eager_backend(
    algorithm: Algorithm,
    fmt: str,
    grad: str,
    state: str,
    shapes,
    betas,
    eps: float,
    form: str,
    magnitude: int,
    size: float,
    grad_scale,
    seed,
) -> None:
    """Down to the denormal numbers of each dtype; without shapes, strides and alignments are awkward and tensors are shards."""
    case = Case(algorithm=algorithm, fmt=fmt, grad=grad, state=state, seed=seed, shapes=shapes, magnitude=10.0**magnitude, size=size)
    group = GROUP | {"betas": betas, "eps": eps, "decay_form": form, "lr": size * 10.0 ** (magnitude % 7 - 3)}
    assert_same_update(cpu.BACKEND, case, group=group, grad_scale=grad_scale, steps=2)
    if algorithm.statistic is not None:
        observable = group | {"betas": (betas[0], min(betas[1], 0.99))}
        assert_same_observation(cpu.BACKEND, case, group=observable, grad_scale=grad_scale)
    assert_same_observation(cpu.BACKEND, case, sums=False, grad_scale=grad_scale)


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, 3e19, 1e17])
def test_one_element_that_is_not_finite_spoils_its_own_operand_only(spoiled: float) -> None:
    """3e19 has no finite square, 1e17 has."""
    for sums in (True, False):
        flags = assert_same_observation(cpu.BACKEND, Case(algorithm=STABLE_ADAMW, spoiled=spoiled), sums=sums)
        assert flags.tolist() == [row == 2 and spoiled != 1e17 for row in range(len(flags))]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_autograd_notices_that_a_parameter_was_written(backend: str) -> None:
    """A second backward through a graph that saved the old value is an error, not a wrong gradient."""
    param = nn.Parameter(torch.ones(3))
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    so.AdamW([param], lr=1e-2, backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture
def without_llvmlite(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("sharded_optim.backends.cpu")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llvmlite", None)


@pytest.mark.usefixtures("without_llvmlite")
def test_a_backend_whose_package_is_missing_says_what_to_install() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = so.AdamW([param], lr=1e-2, backend="cpu")
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"no backend for cpu .*llvmlite.*pip install llvmlite"):
        optimizer.step()


def test_the_backend_that_runs_is_named() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = so.AdamW([param], lr=1e-2, backend="cpu")
    param.grad = torch.ones(3)
    optimizer.step()
    assert "backend: cpu" in repr(optimizer)
    assert backends.available() == ("auto", *backends.MODULES)


def run_python(code: str, **environment: str) -> list[str]:
    """What it prints, line by line, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100, env=os.environ | environment
    )
    return result.stdout.split("\n")[:-1]


STEPS = """
import os, signal, threading, torch, sharded_optim as so
def train(seed):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(300, 400, generator=generator)) for _ in range(3)]
    optimizer = so.StableAdamW(params, lr=1e-2, backend="cpu")
    for _ in range(STEPS):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return [param.detach() for param in params]
same = lambda a, b: all(map(torch.equal, a, b))
"""
WITHOUT_OPENMP = "from sharded_optim.backends.cpu import threads; threads._openmp = lambda: None"


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_child_that_is_forked_after_a_step_steps_too(threads: str) -> None:
    """With the same bits; it has none of its parent's threads, and OpenMP's would end it or have it wait for ever."""
    code = (
        f"STEPS = 3{STEPS}"
        "want = train(0)\n"
        "child = os.fork()\n"
        "if not child: signal.alarm(60); os._exit(0 if same(train(0), want) else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same(train(0), want))"
    )
    assert run_python(code, OMP_NUM_THREADS=threads) == ["0 True"]


def test_a_child_that_is_forked_before_the_first_step_steps_on_threads_of_its_own(tmp_path: Path) -> None:
    """The parent's torch has started OpenMP's threads, which the child does not have: a parallel region would wait for them for ever."""
    code = f"""
import os, pathlib, signal, torch, sharded_optim as so
from sharded_optim.backends.cpu import threads
torch.ones(4_000_000).exp()
param = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 300_000))
param.grad = torch.linspace(1.0, 2.0, 300_000)
optimizer = so.DecoupledSGDW([param], lr=1e-2, backend="cpu")
path = pathlib.Path({str(tmp_path / "values")!r})
child = os.fork()
if not child:
    signal.alarm(60)
    optimizer.step()
    path.write_bytes(param.detach().numpy().tobytes())
    os._exit(0 if threads._State.pool is not None else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
optimizer.step()
print(path.read_bytes() == param.detach().numpy().tobytes())
"""
    assert run_python(code, OMP_NUM_THREADS="2") == ["0", "True"]


@pytest.mark.parametrize("pool", ["OpenMP", "Python"])
def test_optimizers_of_several_threads_step_at_the_same_time(pool: str) -> None:
    code = (
        f"STEPS = 20{STEPS}"
        "want = [train(seed) for seed in range(3)]\n"
        f"{'' if pool == 'OpenMP' else WITHOUT_OPENMP}\n"
        "found = [None] * 3\n"
        "def work(seed): found[seed] = train(seed)\n"
        "threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]\n"
        "[each.start() for each in threads]; [each.join() for each in threads]\n"
        "print(all(map(same, want, found)))"
    )
    assert run_python(code, OMP_NUM_THREADS="2") == ["True"]


@pytest.mark.usefixtures("without_llvmlite")
def test_many_elements_without_a_compiled_backend_warn_once_with_the_command() -> None:
    """Where it was not asked for, and not for a model that is small."""

    def warned(numel: int, **options) -> int:
        param = nn.Parameter(torch.zeros(numel))
        optimizer = so.AdamW([param], lr=1e-2, **options)
        param.grad = torch.zeros(numel)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            optimizer.step()
            optimizer.step()
        return sum("pip install llvmlite" in str(each.message) for each in found)

    assert warned(1_000_001) == 1
    assert warned(1_000_001, triton=False) == 1
    assert warned(1_000_001, backend="eager") == 0
    assert warned(1_000_000) == 0


@pytest.mark.usefixtures("without_llvmlite")
def test_the_log_says_which_backend_runs_and_why_not_another(caplog: pytest.LogCaptureFixture) -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = so.AdamW([param], lr=1e-2)
    with caplog.at_level("INFO", logger="sharded_optim"):
        optimizer.step()
        optimizer.step()
    (line,) = caplog.messages
    assert "AdamW steps float32 on cpu with the eager backend (cpu: " in line
    assert "pip install llvmlite" in line
    assert "triton: it runs on GPUs, not on cpu" in line
    assert "backend: eager" in repr(optimizer)


# ------------------------------------------------------------------------------------------------------------- what goes wrong there

STEP = """
import gc, torch, sharded_optim as so
param = torch.nn.Parameter(torch.ones(5))
param.grad = torch.ones(5)
"""
INTERRUPTED = """
from llvmlite import binding
finalize = binding.ExecutionEngine.finalize_object
def interrupt(engine): raise KeyboardInterrupt
binding.ExecutionEngine.finalize_object = interrupt
optimizer = so.AdamW([param], backend="cpu")
try:
    optimizer.step()
except KeyboardInterrupt:
    pass
binding.ExecutionEngine.finalize_object = finalize
gc.collect()
optimizer.step()
print(bool((param < 1).all()))
"""
OLD = """
import llvmlite
llvmlite.__version__ = "0.44.0"
optimizer = so.AdamW([param])
optimizer.step()
from sharded_optim.backends.position_hash import position_hashes
print("backend: eager" in repr(optimizer), len(position_hashes([param])))
"""


@pytest.mark.parametrize(("code", "printed"), [(INTERRUPTED, "True"), (OLD, "True 1")], ids=["interrupted compilation", "old llvmlite"])
def test_a_compiler_that_fails_leaves_steps_right(code: str, printed: str) -> None:
    """In a process of its own, which such a step has ended."""
    result = subprocess.run([sys.executable, "-c", STEP + code], capture_output=True, text=True, timeout=100, check=False)
    assert result.stdout.strip() == printed, result.stderr


def test_shares_of_work_are_waited_for_though_the_wait_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is freed afterwards."""
    ended = threading.Event()
    waits = []

    def interrupted(shares: list[Future[None]]) -> None:
        waits.append(1)
        if len(waits) == 1:
            raise KeyboardInterrupt
        ended.set()
        wait(shares)

    monkeypatch.setattr(threads, "wait", interrupted)
    with ThreadPoolExecutor(1) as pool:
        share = pool.submit(ended.wait, 10)
        with pytest.raises(KeyboardInterrupt):
            threads._wait_for_all([share])
        assert share.done()


def test_all_kernels_of_a_step_are_compiled_before_it() -> None:
    """One that cannot be compiled after the update would leave parameters stepped and their counters not."""
    per_tensor.kernels.cache_clear()
    case = Case(algorithm=ADAM, shapes=[(4,)])
    cpu.BACKEND.prepare(ADAM, case.operands())
    assert per_tensor.kernels.cache_info().currsize == 1
