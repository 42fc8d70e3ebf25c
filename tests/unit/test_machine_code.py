"""Machine code of the CPU backend, also for CPUs that are not there: wide vectors, and each operation rounded once."""

from __future__ import annotations

import re

import pytest
from llvmlite import binding, ir

from sharded_optim.backends.cpu import kernels
from sharded_optim.backends.cpu.kernels import Ahead, observe_function, update_function
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
    monkeypatch.setattr(kernels, "LANES", 2 * CPUS[cpu][2] // 4)


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
