"""Every backend gives the bits of the eager one: parameters, Kahan compensation, moments, sums and non-finite counts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from variants import CPU_BACKENDS

import sharded_optim as so
from sharded_optim import backends
from sharded_optim.backends import cpu

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
@settings(deadline=None, max_examples=40)
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
