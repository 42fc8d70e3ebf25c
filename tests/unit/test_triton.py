"""The Triton backend without a GPU: its kernels run in Triton's interpreter, and are compiled for GPUs that are not there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from operand_cases import GROUP, STATISTIC, Case, assert_same, assert_same_observation, assert_same_update, columns_of
from variants import examples

from sharded_optim.backends import Operands
from sharded_optim.backends.operands import addresses_of
from sharded_optim.optimizers.adam import ADAM, AMSGRAD
from sharded_optim.optimizers.sgd import MOMENTUM, SGD
from sharded_optim.optimizers.stable_adamw import STABLE_ADAMW
from sharded_optim.step import statistics
from sharded_optim.storage.formats import FORMATS

triton = pytest.importorskip("triton", reason="the triton package is not installed")

from absent_gpu import TARGET, launched  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from benchmarks.machine_code import disassembled, figures_of  # noqa: E402
from benchmarks.sweep import VARIANTS  # noqa: E402
from sharded_optim.backends import triton as backend  # noqa: E402
from sharded_optim.backends.triton import scalars as triton_scalars  # noqa: E402


def small() -> backend.Triton:
    """Programs so small that tensors of the interpreter's size take several, and several blocks each."""
    return backend.Triton(chunk=128, threads=4)


# ------------------------------------------------------------------------------------------------------------------- interpreter


FORMAT_NAMES = ("fp32", "bf16", "bf16_kahan", "bf16_stochastic", "bf16_kahan_stochastic", "fp16", "fp16_kahan", "fp16_stochastic")
ALGORITHMS = (SGD, MOMENTUM, AMSGRAD, STABLE_ADAMW)
UPDATES = [Case(algorithm=ADAM, fmt=fmt, grad=fmt.partition("_")[0]) for fmt in FORMAT_NAMES]
UPDATES += [Case(algorithm=algorithm) for algorithm in ALGORITHMS]
UPDATES += [Case(algorithm=algorithm, fmt="bf16_kahan", grad="bf16") for algorithm in ALGORITHMS]
UPDATES += [
    Case(algorithm=ADAM, grad="bf16", state="bf16"),
    Case(algorithm=ADAM, fmt="bf16_kahan", state="bf16"),
    Case(algorithm=ADAM, fmt="bf16_kahan_stochastic", grad="bf16", state="bf16"),
    Case(algorithm=ADAM, grad="bf16", state="bf16_kahan"),
    Case(algorithm=ADAM, fmt="bf16_stochastic", state="bf16_kahan_stochastic"),
    Case(algorithm=MOMENTUM, fmt="fp16_kahan_stochastic", grad="fp16"),
]


def described(case: Case) -> str:
    return f"{case.algorithm.name}-{case.fmt}-{case.grad}-{case.state}"


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("case", UPDATES, ids=described)
def test_an_update_gives_the_bits_of_the_eager_backend(case: Case) -> None:
    """Awkward shapes, strides, alignments and segments, two steps; gradients are not written."""
    assert_same_update(small(), case, steps=2)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("grad", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("state", ["fp32", "bf16", "bf16_kahan"])
def test_an_observation_gives_the_sums_of_the_eager_backend(grad: str, state: str) -> None:
    assert not assert_same_observation(small(), Case(algorithm=STABLE_ADAMW, grad=grad, state=state)).any()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("variant", [{"elements": 16, "backward": False}, {"threads": 2, "eviction": "evict_first"}], ids=str)
def test_how_it_is_launched_changes_no_bit(variant: dict[str, Any]) -> None:
    other = backend.Triton(**{"chunk": 64, "threads": 4} | variant)
    assert_same_update(other, Case(algorithm=STABLE_ADAMW, fmt="bf16_kahan", grad="bf16"), steps=2)
    assert not assert_same_observation(other, Case(algorithm=STABLE_ADAMW)).any()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, 3e19, 1e17])
def test_one_element_that_is_not_finite_spoils_its_own_operand_only(spoiled: float, sums: bool) -> None:
    """3e19 has no finite square, 1e17 has."""
    flags = assert_same_observation(small(), Case(algorithm=STABLE_ADAMW, spoiled=spoiled), sums=sums)
    assert flags.tolist() == [row == 2 and spoiled != 1e17 for row in range(len(flags))]


def of_gradient(grad, exp_avg, exp_avg_sq, factor):
    return factor * grad


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**50])
def test_a_sum_is_of_integers_each_rounded_to_even(scale: float) -> None:
    """From nothing to the largest term there may be, also where half a unit is to be rounded, and where limbs carry."""
    assert STATISTIC is not None
    generator = np.random.default_rng(1)
    halves = generator.integers(0, 2**23, 100) + 0.5
    any_size = 2.0 ** generator.uniform(-30, 51, 100)
    around = np.array([2.0**bits + d * 2.0 ** max(bits - 23, -1) for bits in range(-1, 51) for d in (-1, 0, 1)])
    values = np.concatenate([halves, any_size, around]).astype(np.float32)
    values = np.minimum(values, np.nextafter(np.float32(2.0**51), np.float32(0)))
    for terms in (values, np.full(8, values.max()), *values[:40, None], *values[-40:, None]):
        grads = torch.from_numpy(terms / np.float32(scale))
        operands = Operands.whole([torch.zeros_like(grads)], [grads], [[torch.zeros_like(grads)] for _ in range(2)])
        tables = torch.ones(1, 1), torch.tensor([2.0**51 / scale]), torch.tensor([scale])
        sums, _ = small().observe(replace(STATISTIC, observe=of_gradient), operands, *tables, None)
        assert sums.item() == sum(map(int, np.rint(terms.astype(np.float64)))), terms


@pytest.mark.usefixtures("interpreter")
def test_gradients_are_multiplied_by_their_scale() -> None:
    assert_same_observation(small(), Case(algorithm=STABLE_ADAMW, grad="fp16"), grad_scale=1 / 3)
    assert_same_observation(small(), Case(algorithm=STABLE_ADAMW, grad="fp16"), grad_scale=1 / 3, sums=False)
    assert_same_update(small(), Case(algorithm=ADAM, fmt="fp16_kahan", grad="fp16"), grad_scale=1 / 3)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("fmt", ["fp32", "bf16_kahan_stochastic"])
def test_nothing_is_written_unless_the_device_says_so(fmt: str) -> None:
    case = Case(algorithm=ADAM, fmt=fmt)
    before, after = case.operands(), assert_same_update(small(), case, proceed=False)
    for (name, column), other in zip(columns_of(after).items(), columns_of(before).values(), strict=True):
        for a, e in zip(column.tensors, other.tensors, strict=True):
            assert_same(a, e, name)
    assert not torch.equal(assert_same_update(small(), case, proceed=True).param.tensors[6], before.param.tensors[6])


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("fmt", ["fp32", "bf16_kahan", "bf16_stochastic", "fp16_kahan_stochastic"])
@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_goes_where_the_eager_backend_lets_it_go(fmt: str, spoiled: float) -> None:
    for algorithm in (SGD, AMSGRAD):
        after = assert_same_update(small(), Case(algorithm=algorithm, fmt=fmt, spoiled=spoiled, shapes=[(3,), (4,), (20,)]))
        assert not after.param.tensors[2][-1].isfinite()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
def test_state_that_is_not_finite_is_not_forgotten(spoiled: float) -> None:
    """A maximum with NaN is NaN."""
    flags = assert_same_observation(small(), Case(algorithm=STABLE_ADAMW, spoiled_state=spoiled))
    assert flags.tolist() == [row == 2 and spoiled != torch.inf for row in range(len(flags))]  # a fraction of an infinite one is none
    after = assert_same_update(small(), Case(algorithm=AMSGRAD, spoiled_state=spoiled))
    assert not after.state[-1].tensors[2].isfinite().any()


@given(
    numel=st.integers(0, 300),
    betas=st.tuples(st.sampled_from([0.0, 0.3, 0.9]), st.floats(0.0, 0.9999)),
    eps=st.sampled_from([0.0, 1e-30, 1e-8, 1e-3]),
    weight_decay=st.floats(0.0, 0.5),
    magnitude=st.integers(-44, 12),
    size=st.sampled_from([1.0, 1e-6, 1e-39]),
    fmt=st.sampled_from(["fp32", "bf16", "bf16_kahan_stochastic", "fp16_stochastic"]),
    state=st.sampled_from(["fp32", "bf16"]),
    seed=st.integers(0, 2**32),
)
@settings(
    deadline=None,
    max_examples=examples(10),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # to shrink an example takes the interpreter minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.usefixtures("interpreter")
def test_any_hyperparameters_and_magnitudes_give_the_bits_of_the_eager_backend(
    numel: int, betas: tuple[float, float], eps: float, weight_decay: float, magnitude: int, size: float, fmt: str, state: str, seed: int
) -> None:
    """Magnitudes of gradients and parameters reach into the denormal numbers of each dtype."""
    case = Case(algorithm=STABLE_ADAMW, fmt=fmt, state=state, seed=seed, shapes=[(numel,), (3,)], magnitude=10.0**magnitude, size=size)
    group = GROUP | {"betas": betas, "eps": eps, "weight_decay": weight_decay, "lr": size * 10.0 ** (magnitude % 7 - 3)}
    assert_same_update(small(), case, group=group)
    assert_same_observation(small(), case, group=group | {"betas": (betas[0], min(betas[1], 0.99))})


@pytest.mark.usefixtures("interpreter")
def test_tensors_may_move_between_two_calls() -> None:
    """The tables that depend on shapes are kept, the addresses are looked at anew."""
    case = Case(algorithm=ADAM)
    one, other = case.operands(), case.operands()
    stepped = assert_same_update(own := small(), case)
    own.update(ADAM, one, case.coefficients(one, GROUP, 1), None, None, None)
    moved_to = [tensor.clone() if tensor.is_contiguous() else tensor for tensor in one.param.tensors]
    one.param.renew(moved_to, addresses_of(moved_to))
    for target, source in zip((one.param, *one.state), (other.param, *other.state), strict=True):
        for tensor, value in zip(target.tensors, source.tensors, strict=True):
            tensor.copy_(value)
    own.update(ADAM, one, case.coefficients(one, GROUP, 1), None, None, None)
    for a, e in zip(one.param.tensors, stepped.param.tensors, strict=True):
        assert_same(a, e, "param")


@pytest.mark.usefixtures("interpreter")
def test_autograd_notices_that_a_parameter_was_written() -> None:
    case = Case(algorithm=ADAM, shapes=[(4,)])
    operands = case.operands()
    version = operands.param.tensors[0]._version
    small().update(ADAM, operands, case.coefficients(operands, GROUP), None, None, None)
    assert operands.param.tensors[0]._version > version


@pytest.mark.usefixtures("interpreter")
def test_the_tables_of_operands_end_with_them() -> None:
    own, case = small(), Case(algorithm=SGD, shapes=[(4,)])
    operands = case.operands()
    own.update(SGD, operands, case.coefficients(operands, GROUP), None, None, None)
    tables = ref(operands.derived[own])
    del operands
    assert tables() is None


# ---------------------------------------------------------------------------------------------------------------------- compiled

CAPABILITIES = (80, 90, 100)
COMPILED = [
    Case(algorithm=STABLE_ADAMW),
    Case(algorithm=STABLE_ADAMW, fmt="bf16_kahan", grad="bf16"),
    Case(algorithm=ADAM, fmt="bf16_kahan", grad="bf16", state="bf16"),
]
ONCE = [Case(algorithm=AMSGRAD), Case(algorithm=SGD, fmt="bf16", grad="bf16"), Case(algorithm=MOMENTUM, fmt="bf16_stochastic", grad="bf16")]
TARGETS = [(case, capability) for case in COMPILED for capability in CAPABILITIES] + [(case, 90) for case in ONCE]


def kernels_of(case: Case) -> list[Any]:
    formats, grad_format = case.kernel_formats
    statistic = case.algorithm.statistic
    observed = [backend.observe_kernel(statistic, grad_format, formats[1:])] if statistic else []
    return [backend.update_kernel(case.algorithm, formats, grad_format), *observed]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("case", "capability"), TARGETS, ids=lambda value: described(value) if isinstance(value, Case) else str(value))
def test_a_gpu_gets_ieee_arithmetic_and_long_accesses(case: Case, capability: int, aligned: bool) -> None:
    """Each operation is rounded once: division and square root are exact, nothing is contracted, denormal numbers stay.

    Where tensors are aligned, fp32 goes 16 bytes at a time, as does everything where all is of 16 bits; beside fp32, 16-bit tensors go 8
    bytes at a time, with as many elements. No register is spilled, and nothing but a sum goes through shared memory.
    """
    for kernel in kernels_of(case):
        compiled = backend.compile_for(kernel, GPUTarget("cuda", capability, 32), aligned=aligned)
        ptx = compiled.asm["ptx"]
        assert not re.findall(r"\bfma\.\S*f32|\S+\.ftz\S*|\S+\.approx\S*", ptx)
        assert re.search(r"\bmul\.rn\.f32", ptx)
        assert not re.findall(r"\b(?:mul|add|sub)\.f32", ptx), "ptxas may contract what does not name its rounding"
        uses_adam = case.algorithm in (ADAM, AMSGRAD, STABLE_ADAMW)
        assert bool(re.search(r"\bdiv\.rn\.f32", ptx)) == (uses_adam or "stochastic" in case.fmt)
        assert bool(re.search(r"\bsqrt\.rn\.f32", ptx)) == (uses_adam and kernel.signature.keys() >= {"proceed"})
        code = Counter(re.findall(r"\b(?:LDG|STG|LDL|STL)[\w.]*", disassembled(compiled.asm["cubin"])))
        long = {name.partition(".")[0]: count for name, count in code.items() if name.endswith(".128")}
        written = [case.fmt[:4]] * (1 + len(FORMATS[case.fmt].extra)) + [case.state] * len(case.algorithm.state)
        if "proceed" not in kernel.signature:
            written = []
        read = [case.grad, *(written or [case.state])]  # StableAdamW observes one of the moments
        widest = {kind for kind in read if kind == "fp32"} or set(read)
        if aligned:
            of_each = backend.ELEMENTS * FORMATS[next(iter(widest))].dtype.itemsize // backend.ALIGNMENT
            assert long.get("LDG", 0) >= of_each * sum(kind in widest for kind in read)
            assert long.get("STG", 0) == of_each * sum(kind in widest for kind in written)
        else:
            assert not long, "an address that is not aligned would be a fault"
        assert not any(name.startswith(("LDL", "STL")) for name in code), "registers are spilled"
        assert compiled.metadata.shared <= 1024 * (not written)


MOST_OF_AN_H200 = 0.75  # of the issue slots there are while a copy's bandwidth, 4.3 TB/s, brings an element


@pytest.mark.parametrize("kernel", kernels_of(COMPILED[0]), ids=["update", "observe"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_fp32_waits_for_memory_alone(kernel: Any, capability: int) -> None:
    """By count: instructions leave room for stalls, so do the slower units, and loads in flight bridge twice a busy memory's latency."""
    found = figures_of("", kernel, capability=capability)
    elements = 4.3e12 / found.bytes / 1.9e9 / 132
    assert found.bytes == (28 if "proceed" in kernel.signature else 8)
    assert found.share(elements) < MOST_OF_AN_H200
    assert found.slowest(elements)[0] < MOST_OF_AN_H200 / 2
    assert found.in_flight > 2 * 4.3e12 * 1e-6 / 132
    assert not found.spills


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_the_sweep_are_worth_a_try(variant: dict[str, Any]) -> None:
    """None spills registers, and each is another launch: whoever has a GPU measures nothing else."""
    shape = {name: value for name, value in variant.items() if name in ("chunk", "threads", "elements")}
    assert not any(figures_of("", kernel, **shape).spills for kernel in kernels_of(COMPILED[0]))


@pytest.mark.parametrize("architecture", [("gfx942", 64), ("gfx1100", 32)])
def test_amd_gpus_are_not_ruled_out(architecture: tuple[str, int]) -> None:
    for kernel in kernels_of(COMPILED[1]):
        compiled = backend.compile_for(kernel, GPUTarget("hip", *architecture))
        intermediate, assembly = compiled.asm["llir"], compiled.asm["amdgcn"]
        assert re.search(r"= fdiv float", intermediate)
        assert not re.search(r"\b(?:fast|contract|reassoc|afn|arcp|!fpmath)\b", intermediate)
        assert '"denormal-fp-math-f32"="ieee"' in intermediate
        assert re.search(r"spill_count: *0", assembly)
        assert not re.search(r"spill_count: *[1-9]", assembly)


@pytest.mark.parametrize("case", COMPILED, ids=described)
def test_what_is_launched_is_what_was_looked_at(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each alignment, whatever addresses are aligned by chance."""
    operands = case.operands()
    own = backend.Triton()
    coefficients = case.coefficients(operands, GROUP)
    observed = torch.empty(len(operands), 4), torch.ones(len(operands) + 1)[1:], torch.ones(len(operands))
    with launched(monkeypatch) as found:
        own.update(case.algorithm, operands, coefficients, None, None, None)
        if case.algorithm.statistic is not None:
            own.observe(case.algorithm.statistic, operands, *observed, None)
    expected = [backend.compile_for(kernel, TARGET, aligned=aligned) for kernel in kernels_of(case) for aligned in (True, False)]
    assert [each.asm["ptx"] for each in found] == [each.asm["ptx"] for each in expected]


# ----------------------------------------------------------------------------------------------------------------------- support


def test_limbs_have_all_bits_of_a_term() -> None:
    assert 3 * triton_scalars.LIMB.value == statistics.TERM_BITS


def test_it_says_why_it_does_not_run_on_a_cpu() -> None:
    dtypes = frozenset({torch.float32})
    assert backend.BACKEND.supports(torch.device("cpu"), dtypes) == "it runs on GPUs, not on cpu"
    assert backend.BACKEND.supports(torch.device("meta"), dtypes) == "it runs on GPUs, not on meta"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_why_it_does_not_run_without_a_driver() -> None:
    reason = backend.BACKEND.supports(torch.device("cuda", 0), frozenset({torch.float32}))
    assert reason is not None
    assert reason.startswith("Triton finds no driver for cuda:0")


@pytest.mark.usefixtures("interpreter")
def test_the_interpreter_runs_on_the_cpu_only() -> None:
    assert backend.BACKEND.supports(torch.device("cpu"), frozenset({torch.float32})) is None
    assert "interpreter" in str(backend.BACKEND.supports(torch.device("cuda", 0), frozenset({torch.float32})))


def test_importing_the_package_does_not_import_triton() -> None:
    check = "import sys, sharded_optim; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
