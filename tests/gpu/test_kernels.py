"""Every kernel gives the bits of the eager backend: of its definition on the CPU, and of the same torch operations on the GPU.

Torch does not promise that an operation gives the same bits on a CPU and on a GPU. What is relied on is that CUDA adds, multiplies, divides
and takes roots as IEEE 754 says unless it is compiled otherwise, which torch is not, and that an operation of torch is one kernel, so that
nothing is contracted between two of them. `test_torch_operations_round_alike` says which operation it is where that is no longer so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from operand_cases import GROUP, STATISTIC, Case, assert_same, columns_of
from torch import Tensor
from variants import examples

from gpu.device import DEVICE, REHEARSAL, synchronisation_is_an_error, synchronize
from sharded_optim.backends import Backend, Column, Operands, choose, eager
from sharded_optim.backends.operands import addresses_of
from sharded_optim.formulas import Algorithm, operations, scalars
from sharded_optim.optimizers.adam import ADAM, AMSGRAD
from sharded_optim.optimizers.sgd import MOMENTUM, SGD
from sharded_optim.optimizers.stable_adamw import STABLE_ADAMW
from sharded_optim.sharding.segment import Segment
from sharded_optim.storage.formats import FORMATS, format_of

pytest.importorskip("triton", reason="the triton package is not installed")

CPU = torch.device("cpu")
ALGORITHMS = (STABLE_ADAMW, ADAM, AMSGRAD, MOMENTUM, SGD)
GRADS = ("fp32", "bf16", "fp16")
STATES = ("fp32", "bf16")
LARGE = None if REHEARSAL else [(100_003,), (4096,), (33, 1000), (4097,), (8191, 3), (1,), (0,)]
CELLS = list(product(ALGORITHMS, FORMATS, GRADS))
# What a rehearsal, which is slow, tries: each algorithm, format and dtype, but not each pair.
CELLS = [cell for number, cell in enumerate(CELLS) if number % 7 == 0] if REHEARSAL else CELLS
assert {name for _, name, _ in CELLS} == set(FORMATS)


def own() -> Backend:
    """The backend that a step on the device takes by itself."""
    backend, _ = choose(("triton",), DEVICE, frozenset({torch.float32}))
    return backend


def stepped(
    backend: Backend,
    case: Case,
    device: torch.device,
    *,
    steps: int = 2,
    group: dict[str, Any] = GROUP,
    proceed: bool | None = None,
    grad_scale: float | None = None,
) -> Operands:
    """What a backend makes of a case on a device, where gradients lie elsewhere in the second step; the host waits for nothing."""
    operands = case.operands(device.type)
    told = [None if value is None else torch.tensor(value, device=device) for value in (proceed, grad_scale)]
    keys = case.keys(operands)
    for step in range(1, steps + 1):
        table = case.coefficients(operands, group, step).to(device)
        drawn = None if keys is None else (keys + step).to(device)
        if backend is eager.BACKEND:
            backend.update(case.algorithm, operands, table, *told, drawn)
        else:
            with synchronisation_is_an_error():
                backend.update(case.algorithm, operands, table, *told, drawn)
        grads = [grad.clone() if grad.is_contiguous() else grad for grad in operands.grad.tensors]
        operands.grad.renew(grads, addresses_of(grads))
    return operands


def assert_same_operands(actual: Operands, expected: Operands, what: object) -> None:
    for (name, column), other in zip(columns_of(actual).items(), columns_of(expected).values(), strict=True):
        for a, e in zip(column.tensors, other.tensors, strict=True):
            assert_same(a, e.cpu(), f"{what}: {name}")


def check(case: Case, *, at: torch.device = CPU, **options: Any) -> Operands:
    actual = stepped(own(), case, DEVICE, **options)
    assert_same_operands(actual, stepped(eager.BACKEND, case, at, **options), case)
    return actual


# -------------------------------------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize(("algorithm", "fmt", "grad"), CELLS, ids=lambda value: getattr(value, "name", value))
def test_an_update_gives_the_bits_of_the_eager_backend_on_the_cpu(algorithm: Algorithm, fmt: str, grad: str) -> None:
    """Awkward shapes, strides, alignments and segments, then large ones; the moments in both dtypes."""
    for state in STATES if algorithm.state else STATES[:1]:
        for shapes in (None, LARGE) if LARGE else (None,):
            check(Case(algorithm=algorithm, fmt=fmt, grad=grad, state=state, shapes=shapes))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("algorithm", ALGORITHMS[: 1 if REHEARSAL else None], ids=lambda algorithm: algorithm.name)
def test_an_update_gives_the_bits_of_the_eager_backend_on_the_gpu(algorithm: Algorithm, fmt: str) -> None:
    case = Case(algorithm=algorithm, fmt=fmt, grad=fmt.partition("_")[0])
    check(case, at=DEVICE)
    if LARGE:
        check(replace(case, shapes=LARGE), at=DEVICE)


@pytest.mark.parametrize("state", [fmt for fmt in FORMATS if fmt not in STATES])
def test_moments_have_any_format(state: str) -> None:
    check(Case(algorithm=ADAM, fmt="bf16_kahan_stochastic", grad="bf16", state=state))
    observed_alike(Case(algorithm=STABLE_ADAMW, state=state))


@pytest.mark.parametrize("fmt", ["fp32", "bf16_kahan_stochastic", "fp16_kahan"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_gradients_are_multiplied_by_their_scale_and_nothing_is_written_unless_the_device_says_so(algorithm: Algorithm, fmt: str) -> None:
    case = Case(algorithm=algorithm, fmt=fmt, grad="fp16")
    check(case, grad_scale=1 / 3, proceed=True)
    assert_same_operands(check(case, grad_scale=1 / 3, proceed=False), case.operands(), "a step that does not happen")


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, -torch.inf, 3e38, 1e-45])
@pytest.mark.parametrize("fmt", ["fp32", "bf16", "bf16_kahan", "bf16_stochastic", "fp16_kahan_stochastic"])
def test_what_is_not_finite_or_at_the_end_of_the_range_goes_where_it_does_on_the_cpu(fmt: str, spoiled: float) -> None:
    for algorithm in (SGD, AMSGRAD):
        check(Case(algorithm=algorithm, fmt=fmt, spoiled=spoiled, shapes=[(3,), (4,), (20,)]))
    check(Case(algorithm=AMSGRAD, fmt=fmt, spoiled_state=abs(spoiled), shapes=[(3,), (4,), (20,)]))


@given(
    numel=st.integers(0, 60 if REHEARSAL else 9000),
    betas=st.tuples(st.sampled_from([0.0, 0.3, 0.9]), st.floats(0.0, 0.9999)),
    eps=st.sampled_from([0.0, 1e-30, 1e-8, 1e-3]),
    weight_decay=st.floats(0.0, 0.5),
    magnitude=st.integers(-44, 12),
    size=st.sampled_from([1.0, 1e-6, 1e-39]),
    algorithm=st.sampled_from([STABLE_ADAMW, AMSGRAD, MOMENTUM]),
    fmt=st.sampled_from(["fp32", "bf16", "bf16_kahan_stochastic", "fp16_stochastic"]),
    state=st.sampled_from(STATES),
    seed=st.integers(0, 2**32),
)
@settings(
    deadline=None,
    max_examples=examples(5 if REHEARSAL else 150),
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,
)
def test_any_hyperparameters_and_magnitudes_give_the_bits_of_the_eager_backend(
    numel: int,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    magnitude: int,
    size: float,
    algorithm: Algorithm,
    fmt: str,
    state: str,
    seed: int,
) -> None:
    """Magnitudes of gradients and parameters reach into the denormal numbers of each dtype."""
    shapes = [(numel,), (3,)]
    case = Case(algorithm=algorithm, fmt=fmt, state=state, seed=seed, shapes=shapes, magnitude=10.0**magnitude, size=size)
    group = GROUP | {"betas": betas, "eps": eps, "weight_decay": weight_decay, "lr": size * 10.0 ** (magnitude % 7 - 3)}
    check(case, steps=1, group=group)
    if algorithm is STABLE_ADAMW:
        observed_alike(case, group=group | {"betas": (betas[0], min(betas[1], 0.99))})


# ------------------------------------------------------------------------------------------------------------------------- observe


def observation(
    backend: Backend, case: Case, device: torch.device, group: dict[str, Any], grad_scale: float | None, sums: bool
) -> tuple[Tensor, Tensor]:
    assert STATISTIC is not None
    operands = case.operands(device.type)
    count = len(operands)
    table = torch.tensor([STATISTIC.coefficients(group, 3 + row) for row in range(count)], dtype=torch.float64).to(torch.float32)
    limits = torch.full((count,), 1.01 * STATISTIC.bound(group))
    scales = torch.tensor([2.0 ** (44 - 8 * (row % 4)) for row in range(count)])
    scale = None if grad_scale is None else torch.tensor(grad_scale, device=device)
    arguments = [table.to(device), limits.to(device), scales.to(device), scale]
    found = backend.observe(STATISTIC if sums else None, operands, *arguments)
    for column, other in zip(columns_of(operands).values(), columns_of(case.operands()).values(), strict=True):
        for a, e in zip(column.tensors, other.tensors, strict=True):
            assert_same(a, e, "what observe must not write")
    return found[0].cpu(), found[1].cpu() != 0


def observed_alike(case: Case, *, group: dict[str, Any] = GROUP, grad_scale: float | None = None, sums: bool = True) -> Tensor:
    """On the device, and by torch's operations on the CPU and on the device; gives which operands are not finite."""
    expected_sums, expected_flags = observation(eager.BACKEND, case, CPU, group, grad_scale, sums)
    for backend in (own(), eager.BACKEND):
        actual_sums, actual_flags = observation(backend, case, DEVICE, group, grad_scale, sums)
        assert torch.equal(actual_flags, expected_flags), backend.name
        assert torch.equal(actual_sums[~expected_flags], expected_sums[~expected_flags]), backend.name
    return expected_flags


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("state", STATES)
def test_an_observation_gives_the_sums_of_the_eager_backend(grad: str, state: str) -> None:
    """Sums are of integers, so the order in which programs add to them does not matter."""
    for shapes in (None, LARGE) if LARGE else (None,):
        case = Case(algorithm=STABLE_ADAMW, grad=grad, state=state, shapes=shapes)
        assert not observed_alike(case).any()
        observed_alike(case, grad_scale=1 / 3)
        observed_alike(case, grad_scale=1 / 3, sums=False)


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, 3e19, 1e17])
def test_one_element_that_is_not_finite_spoils_its_own_operand_only(spoiled: float, sums: bool) -> None:
    """3e19 has no finite square, 1e17 has."""
    flags = observed_alike(Case(algorithm=STABLE_ADAMW, spoiled=spoiled), sums=sums)
    assert flags.tolist() == [row == 2 and spoiled != 1e17 for row in range(len(flags))]


# ---------------------------------------------------------------------------------------------------------------------------- size

MANY = 300 if REHEARSAL else 2**31 + 4099  # elements, of which an int32 cannot tell the number
AT_ONCE = 128 if REHEARSAL else 2**26
BYTES = 64 * 2**30  # that the tensors, and what torch's operations need beside them, take at most


def test_a_tensor_may_have_more_elements_than_an_int32_counts() -> None:
    """All of its bits are those of torch's operations on its parts, one after the other, on the same device."""
    if not REHEARSAL and torch.cuda.mem_get_info()[0] < BYTES:
        pytest.skip(f"{BYTES / 2**30:.0f} GiB of the GPU's memory are not free")
    assert STATISTIC is not None
    fmt = FORMATS["bf16_stochastic"]
    pattern = torch.randn(1_000_003 if not REHEARSAL else 7, generator=torch.Generator().manual_seed(0)).to(DEVICE, fmt.dtype)

    def tensor(scale: float) -> Tensor:
        made = torch.empty(MANY, dtype=fmt.dtype, device=DEVICE)
        for start in range(0, MANY, len(pattern)):
            made[start : start + len(pattern)] = (pattern * scale)[: MANY - start]
        return made

    def operands(start: int, tensors: list[Tensor]) -> Operands:
        param, grad, *state = [Column([each]) for each in tensors]
        segment = Segment.flat("w", (MANY,), start, tensors[0].numel())
        plain = tuple(format_of(column.dtype) for column in state)
        return Operands(segments=[segment], format=fmt, param=param, extra=(), grad=grad, state_formats=plain, state=tuple(state))

    tensors = [tensor(1.0), tensor(0.5), tensor(0.1), tensor(0.2).abs_()]
    before = [each.clone() for each in tensors]
    whole = operands(0, tensors)
    row = torch.tensor([STABLE_ADAMW.coefficients(GROUP, 3, 1.0)], dtype=torch.float64).float().to(DEVICE)
    observed = torch.tensor([STATISTIC.coefficients(GROUP, 3)], dtype=torch.float64).float().to(DEVICE)
    limit, scale = torch.tensor([1.01 * STATISTIC.bound(GROUP)], device=DEVICE), torch.tensor([2.0**20], device=DEVICE)
    key = torch.tensor([[0x123456789ABCDEF]], device=DEVICE)
    sums, flags = own().observe(STATISTIC, whole, observed, limit, scale, None)
    own().update(STABLE_ADAMW, whole, row, None, None, key)
    total = torch.zeros_like(sums)
    for start in range(0, MANY, AT_ONCE):
        part = operands(start, [each[start : start + AT_ONCE] for each in before])
        total += eager.BACKEND.observe(STATISTIC, part, observed, limit, scale, None)[0]
        eager.BACKEND.update(STABLE_ADAMW, part, row, None, None, key)
    synchronize()
    assert not flags.any()
    assert torch.equal(total, sums)
    for name, actual, expected in zip(("param", "grad", "exp_avg", "exp_avg_sq"), tensors, before, strict=True):
        assert torch.equal(actual.view(torch.int16), expected.view(torch.int16)), name


# --------------------------------------------------------------------------------------------------------------------------- torch

OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "a + b": lambda a, b, c: a + b,
    "a - b": lambda a, b, c: a - b,
    "a * b": lambda a, b, c: a * b,
    "a * b + c": lambda a, b, c: a * b + c,
    "a * (0-dim)": lambda a, b, c: a * c,
    "a + (0-dim)": lambda a, b, c: a + c,
    "a * (Python float)": lambda a, b, c: a * 2.0**-24,
    "divide(a, b)": lambda a, b, c: operations.divide(a, b),
    "divide(a, 0-dim)": lambda a, b, c: operations.divide(a, c),
    "sqrt(|a|)": lambda a, b, c: operations.sqrt(a.abs()),
    "sqrt of float64": lambda a, b, c: scalars.sqrt(a.abs().double() * (1.0 + 2.0**-30)),
    "maximum(|a|, |b|)": lambda a, b, c: operations.maximum(a.abs(), b.abs()),
    "float64 product": lambda a, b, c: a.double() * b.double() * c.double(),
    "float64 to float32": lambda a, b, c: (a.double() * b.double()).float(),
    "to bfloat16": lambda a, b, c: a.to(torch.bfloat16).float(),
    "to float16": lambda a, b, c: a.to(torch.float16).float(),
    "round": lambda a, b, c: (a * 2.0**20).round(),
    "floor": lambda a, b, c: (a * 2.0**10).floor(),
    "copysign": lambda a, b, c: torch.copysign(a, b),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_operations_round_alike(name: str) -> None:
    """On the CPU and on the GPU: those that define the bits, over all magnitudes, denormal numbers and what is not finite included."""
    generator = torch.Generator().manual_seed(5)
    count = 1000 if REHEARSAL else 1_000_000
    a, b = (
        torch.randn(count, generator=generator) * 10.0 ** torch.randint(-44, 38, (count,), generator=generator).double() for _ in range(2)
    )
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 1.17549435e-38, 3.4e38])
    a, b = (torch.cat([each.float(), special]) for each in (a, b.flip(0)))
    c = torch.tensor(1 / 3)
    expected = OPERATIONS[name](a, b, c)
    actual = OPERATIONS[name](a.to(DEVICE), b.to(DEVICE), c.to(DEVICE)).cpu()
    bits = torch.int64 if expected.dtype == torch.float64 else torch.int32
    differ = (actual.view(bits) != expected.view(bits)) & ~(actual.isnan() & expected.isnan())
    first = differ.nonzero()[:3].flatten().tolist()
    assert not differ.any(), f"{int(differ.sum())} of {len(a)} differ, as for {[(a[i].item(), b[i].item()) for i in first]}"
