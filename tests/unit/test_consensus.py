"""Whether a step happens is the same in plain Python, in torch operations and in one kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from variants import examples

from sharded_optim.backends import cpu
from sharded_optim.formulas.verdict import NON_FINITE, NON_FINITE_PIECE, SECTIONS, TAIL, judge
from sharded_optim.storage.splitmix64 import GOLDEN, mix, signed

triton = pytest.importorskip("triton", reason="the triton package is not installed")

from absent_gpu import launched  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sharded_optim.backends.triton import verdict as triton_verdict  # noqa: E402

RANKS = (
    st.lists(  # of each rank that holds the tensor: the key of its hyperparameters, or None without a gradient; and whether it is finite
        st.tuples(st.sampled_from([2**63 + 3, 2**64 - 1, 2**64 - 1, None]), st.sampled_from([True, True, True, False])), max_size=3
    )
)


@given(
    tensors=st.lists(RANKS, max_size=5),
    padding=st.sampled_from([0, 1, triton_verdict.BLOCK]),
    replaces=st.sampled_from([0, 0, 0, 1]),
    invalid=st.sampled_from([0, 0, 0, 2]),
    found_inf=st.sampled_from([0, 0, 1]),
    skips=st.booleans(),
)
@settings(deadline=None, max_examples=examples(20), suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("interpreter")
def test_a_step_happens_where_all_ranks_agree_and_all_is_finite(tensors, padding, replaces, invalid, found_inf, skips) -> None:
    """With more tensors than the kernel looks at together, or none."""
    tensors = [*tensors, *([[(5, True)]] * padding)]
    vector = torch.zeros(SECTIONS, len(tensors), dtype=torch.int64)
    difference = 0
    for column, ranks in enumerate(tensors):
        bits = 36 if ranks and ranks[0][0] is not None else 0  # the first piece's rank sends it
        vector[NON_FINITE, column] = NON_FINITE_PIECE * sum(not finite for _, finite in ranks) - bits
        weights = (torch.tensor([len(ranks) - 1] + [-1] * (len(ranks) - 1)) * (mix(torch.tensor(column + 1) * GOLDEN) | 1)).tolist()
        difference += sum(weight * key for weight, (key, _) in zip(weights, ranks, strict=False) if key is not None)
    sums = torch.cat([vector.flatten(), torch.tensor([signed(difference), replaces, invalid, found_inf])])
    consistent = not replaces and not invalid and all(len({key for key, _ in ranks}) <= 1 for ranks in tensors)
    finite = all(finite for ranks in tensors for _, finite in ranks)
    for judge_one in (judge, triton_verdict.judge, cpu.BACKEND.judge):
        verdict = judge_one(sums, skips=skips)
        assert verdict.flags.tolist() == [consistent, finite, not found_inf]
        assert bool(verdict.proceed) == (consistent and not found_inf and (finite or not skips))
        assert (verdict.flags.dtype, verdict.proceed.dtype) == (torch.int64, torch.bool)


def compiled(capability: int) -> Any:
    signature = {name: "i32" if name == "tensors" else "*i1" if name == "proceed" else "*i64" for name in triton_verdict.ARGUMENTS}
    constants = {"SKIPS": True, "BLOCK": triton_verdict.BLOCK}
    source = ASTSource(triton_verdict.verdict_kernel(), signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=triton_verdict.OPTIONS)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_gpu_gets_one_small_program(capability: int) -> None:
    code = compiled(capability)
    assert code.metadata.shared <= 64
    assert ".local" not in code.asm["ptx"]


@pytest.mark.parametrize("tensors", [1, 16])
def test_what_is_launched_is_what_was_looked_at(tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an int is 1, or can be divided by 16."""
    sums = torch.zeros(SECTIONS * tensors + TAIL, dtype=torch.int64)
    with launched(monkeypatch) as found:
        triton_verdict.judge(sums, skips=True)
    assert [each.asm["ptx"] for each in found] == [compiled(90).asm["ptx"]]
