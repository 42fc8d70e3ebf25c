"""Machine code of the CPU backend, also for CPUs that are not there: wide vectors, and each operation rounded once."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from llvmlite import binding, ir
from operand_cases import Case, assert_same_update

from sharded_optim.backends import cpu as backend
from sharded_optim.backends.cpu import kernels, loops
from sharded_optim.backends.cpu.kernels import Ahead, observe_function, update_function
from sharded_optim.formulas import operations as xp
from sharded_optim.optimizers.adam import ADAM
from sharded_optim.optimizers.stable_adamw import STABLE_ADAMW
from sharded_optim.storage.formats import FORMATS

FP32, BF16, KAHAN, STOCHASTIC = (FORMATS[name] for name in ("fp32", "bf16", "bf16_kahan", "bf16_stochastic"))
X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
# Of each CPU: its triple and name for LLVM, bytes of a register, and what full registers of fp32 are called.
CPUS = {"AVX-512": (X86, "x86-64-v4", 64, "zmm"), "AVX2": (X86, "x86-64-v3", 32, "ymm"), "NEON": (ARM, "generic", 16, ".4s")}
FORMATS_OF_PARAM = {"fp32": (FP32, FP32), "bf16 Kahan": (KAHAN, BF16), "bf16 stochastic": (STOCHASTIC, BF16)}
# One instruction with two operations on fp32; on float64 the sum may use one, as the product is exact.
FUSED = {X86: r"vfn?m(?:add|sub)\w*[ps]s\b", ARM: r"fn?m(?:add|sub|la|ls)\s+(?:s\d|v\d+\.[24]s)"}
APPROXIMATE = {X86: r"v?(?:rcp|rsqrt)\w*[ps]s\b", ARM: r"f(?:recp|rsqrt)\w+"}
EXACT = {X86: {"division": r"vdivps", "root": r"vsqrtps"}, ARM: {"division": r"fdiv\s+v\d+\.4s", "root": r"fsqrt\s+v\d+\.4s"}}

every_cpu = pytest.mark.parametrize("cpu", CPUS)


def assembly(function: ir.Function, cpu: str) -> str:
    triple, name, *_ = CPUS[cpu]
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=name, opt=3)
    return machine.emit_assembly(binding.parse_assembly(str(function.module)))


@pytest.fixture
def as_wide(monkeypatch: pytest.MonkeyPatch, cpu: str) -> None:
    monkeypatch.setattr(loops, "LANES", 2 * CPUS[cpu][2] // 4)


@every_cpu
@pytest.mark.parametrize("storage", FORMATS_OF_PARAM)
@pytest.mark.usefixtures("as_wide")
def test_an_update_fills_vector_registers_and_rounds_each_operation(cpu: str, storage: str) -> None:
    triple, _, _, register = CPUS[cpu]
    fmt, grad_format = FORMATS_OF_PARAM[storage]
    text = assembly(update_function(ADAM, (fmt, FP32, FP32), grad_format), cpu)
    assert not re.findall(FUSED[triple], text)
    assert not re.findall(APPROXIMATE[triple], text)
    for operation, pattern in EXACT[triple].items():
        lines = [line for line in text.splitlines() if re.search(pattern, line)]
        assert len(lines) == 2, f"one {operation} for each of two registers"
        assert all(register in line for line in lines)


@every_cpu
@pytest.mark.usefixtures("as_wide")
def test_an_observation_fills_vector_registers_and_rounds_each_operation(cpu: str) -> None:
    triple, _, _, register = CPUS[cpu]
    text = assembly(observe_function(STABLE_ADAMW.statistic, FP32, (FP32, FP32)), cpu)
    assert not re.findall(FUSED[triple], text)
    assert not re.findall(APPROXIMATE[triple], text)
    divisions = [line for line in text.splitlines() if re.search(EXACT[triple]["division"], line)]
    assert len(divisions) == 2
    assert all(register in line for line in divisions)


@pytest.mark.parametrize("cpu", ["AVX-512"])
@pytest.mark.usefixtures("as_wide")
def test_only_what_is_read_is_prefetched(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An observation does not use the first moment: two arrays of two cache lines in a pass, where an update has four."""
    monkeypatch.setattr(kernels, "AHEAD", Ahead(4096, 2048))
    observed = assembly(observe_function(STABLE_ADAMW.statistic, FP32, (FP32, FP32)), cpu)
    updated = assembly(update_function(ADAM, (FP32, FP32, FP32), FP32), cpu)
    assert (observed.count("prefetch"), updated.count("prefetch")) == (4, 8)


def test_a_formula_that_branches_on_a_value_is_refused() -> None:
    """In Python an object counts as true: one of the branches would be compiled for all elements."""

    def update(param, grad, exp_avg, exp_avg_sq, *coefficients):
        return (param if grad > 0.0 else grad), exp_avg, exp_avg_sq

    with pytest.raises(TypeError, match=r"cannot branch on the value .* xp.where"):
        update_function(replace(ADAM, update=update), (FP32, FP32, FP32), FP32)


def test_comparisons_and_whole_numbers_give_the_bits_of_the_eager_backend() -> None:
    """Those that no algorithm of this library uses."""

    def update(param, grad, exp_avg, exp_avg_sq, l2, decay, from_grad, weight1, beta2, one_minus_beta2, step_size, eps):
        same, other = xp.where(grad == grad, 1.0, 2.0), xp.where(exp_avg != exp_avg, 3.0, 4.0)
        ordered = xp.where(grad <= exp_avg, 2 * grad, xp.where(grad >= 1, grad - 1, 1 - grad))
        return same * param, other * exp_avg, xp.maximum(ordered, xp.where(grad < 0.0, 0, exp_avg_sq))

    for spoiled in (None, torch.nan, torch.inf):
        case = Case(algorithm=replace(ADAM, name="comparisons", update=update), spoiled=spoiled, spoiled_state=spoiled)
        assert_same_update(backend.BACKEND, case)
