"""Every backend gives the bits of the eager one: parameters, Kahan compensation, moments, sums and non-finite counts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from operand_cases import GROUP, Case, assert_same_observation, assert_same_update
from torch import Tensor, nn
from variants import CPU_BACKENDS, examples

import sharded_optim as so
from sharded_optim import backends
from sharded_optim.algorithms import Algorithm
from sharded_optim.algorithms.adam import ADAM, AMSGRAD
from sharded_optim.algorithms.sgd import MOMENTUM, SGD
from sharded_optim.algorithms.stable_adamw import STABLE_ADAMW
from sharded_optim.backends import cpu
from sharded_optim.formats import FORMATS

SHAPES = [(), (1,), (5,), (7, 3), (33, 17), (0,), (40_000,)]
OPTIMIZERS: dict[str, Callable] = {
    "Adam-l2": lambda params, **options: so.Adam(params, lr=1e-2, weight_decay=0.1, **options),
    "AdamW-skip": lambda params, **options: so.AdamW(params, lr=1e-2, betas=(0.3, 0.9), nonfinite="skip", **options),
    "DecoupledAdamW-amsgrad": lambda params, **options: so.DecoupledAdamW(params, lr=1e-2, amsgrad=True, **options),
    "DecoupledSGDW": lambda params, **options: so.DecoupledSGDW(params, lr=1e-2, **options),
    "DecoupledSGDW-dampening": lambda params, **options: so.DecoupledSGDW(params, lr=1e-2, momentum=0.9, dampening=0.3, **options),
    "DecoupledSGDW-nesterov": lambda params, **options: so.DecoupledSGDW(params, lr=1e-2, momentum=0.9, nesterov=True, **options),
    "StableAdamW": lambda params, **options: so.StableAdamW(params, lr=1e-2, **options),
}
STORAGES: dict[str, tuple[torch.dtype, dict]] = {
    "fp32": (torch.float32, {}),
    "fp32, bf16 moments": (torch.float32, {"state_dtype": torch.bfloat16}),
    "bf16": (torch.bfloat16, {"kahan_sum": False}),
    "bf16 Kahan": (torch.bfloat16, {}),
    "bf16 stochastic": (torch.bfloat16, {"stochastic_rounding": True}),
    "bf16 Kahan stochastic": (torch.bfloat16, {"kahan_sum": True, "stochastic_rounding": True}),
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
    state=st.sampled_from(["fp32", "bf16"]),
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


def test_a_cached_kernel_is_that_of_the_code_that_runs(tmp_path: Path) -> None:
    """Not of files, which may have changed since they were imported: an upgrade, or an edit, under a running process."""
    package = tmp_path / "sharded_optim"
    shutil.copytree(Path(so.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import pathlib, torch, sharded_optim as so; from sharded_optim.algorithms import adam\n"
        "{edit}\n"
        "param = torch.nn.Parameter(torch.ones(3)); param.grad = torch.zeros(3)\n"
        "so.AdamW([param], lr=0.1, weight_decay=0.5, backend='cpu').step(); print(param[0].item())"
    )
    edit = "path = pathlib.Path(adam.__file__); path.write_text(path.read_text().replace('decay * param', 'decay * decay * param'))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    printed = [
        float(
            subprocess.run(
                [sys.executable, "-c", code.format(edit=each)],
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
                cwd=tmp_path,
                env=environment,
            ).stdout
        )
        for each in (edit, "")
    ]
    assert printed == pytest.approx([0.95, 0.95**2])


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, name: str, source: str, written: Callable = cpu._written) -> Path:
        if folder == tmp_path:
            raise OSError("no space left on device")
        return written(folder, name, source)

    monkeypatch.setattr(cpu, "_cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cpu, "_written", fail)
    cpu._update_kernel.cache_clear()
    case = Case(algorithm=SGD)
    assert_same_update(cpu.BACKEND, case)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_autograd_notices_that_a_parameter_was_written(backend: str) -> None:
    """A second backward through a graph that saved the old value is an error, not a wrong gradient."""
    param = nn.Parameter(torch.ones(3))
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    so.AdamW([param], lr=1e-2, backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_threads_are_torchs() -> None:
    """Ranks of one machine share its cores; torchrun and OMP_NUM_THREADS tell torch, not numba."""
    before, threads = numba.get_num_threads(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with cpu._threads(10**9):
            assert numba.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    with cpu._threads(1):
        assert numba.get_num_threads() == 1, "a small step wakes no threads"
    assert numba.get_num_threads() == before


def test_a_backend_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sharded_optim.backends.cpu")
    monkeypatch.setitem(sys.modules, "numba", None)
    param = nn.Parameter(torch.ones(3))
    optimizer = so.AdamW([param], lr=1e-2, backend="cpu")
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"no backend for cpu .*numba.*pip install 'sharded-optim\[cpu\]'"):
        optimizer.step()


def test_the_backend_that_runs_is_named() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = so.AdamW([param], lr=1e-2, backend="cpu")
    param.grad = torch.ones(3)
    optimizer.step()
    assert "backend: cpu" in repr(optimizer)
    assert backends.available() == ("auto", *backends.MODULES)


def test_a_step_leaves_torchs_threads_alone() -> None:
    """Also the first of a process, in which numba starts its threads and with them sets the number of OpenMP's, which is torch's."""
    code = (
        "import torch, sharded_optim as so; torch.set_num_threads(1)\n"
        "param = torch.nn.Parameter(torch.ones(100_000)); param.grad = torch.ones(100_000)\n"
        "so.AdamW([param], lr=1e-3, backend='cpu').step(); print(torch.get_num_threads())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "1"


def test_the_log_says_which_backend_runs_and_why_not_another(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delitem(sys.modules, "sharded_optim.backends.cpu")
    monkeypatch.setitem(sys.modules, "numba", None)
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = so.AdamW([param], lr=1e-2)
    with caplog.at_level("INFO", logger="sharded_optim"):
        optimizer.step()
        optimizer.step()
    (line,) = caplog.messages
    assert "AdamW steps float32 on cpu with the eager backend (cpu: " in line
    assert "pip install 'sharded-optim[cpu]'" in line
    assert "triton: it runs on GPUs, not on cpu" in line
    assert "backend: eager" in repr(optimizer)
