"""Operands as awkward as a backend may be given, and what compares a backend's results with the eager one's, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharded_optim.backends import Backend, Column, Operands, eager
from sharded_optim.formulas import Algorithm
from sharded_optim.formulas.weight_decay import COUPLED
from sharded_optim.optimizers.stable_adamw import STABLE_ADAMW
from sharded_optim.sharding.segment import Segment
from sharded_optim.storage.format import Format
from sharded_optim.storage.formats import FORMATS

STATISTIC = STABLE_ADAMW.statistic
GROUP: dict[str, Any] = {
    "lr": 1e-2,
    "betas": (0.9, 0.99),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "decay_form": COUPLED,
    "reference_lr": 1e-2,
    "momentum": 0.9,
    "dampening": 0.0,
    "nesterov": True,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Operands of a step, made as often as they are needed: a step writes them."""

    algorithm: Algorithm
    fmt: str = "fp32"
    grad: str = "fp32"
    state: str = "fp32"  # format of every moment
    seed: int = 1
    shapes: Sequence[tuple[int, ...]] | None = None  # None: awkward ones
    magnitude: float = 1.0  # of the gradients
    size: float = 1.0  # of the parameters
    spoiled: float | None = None  # an element of the third gradient ...
    spoiled_state: float | None = None  # ... and of its last state

    def operands(self, device: str = "cpu") -> Operands:
        generator = torch.Generator().manual_seed(self.seed)
        fmt, state_format = FORMATS[self.fmt], FORMATS[self.state]

        def column(dtype: torch.dtype, scale: float, *, positive: bool = False, gradient: bool = False) -> Column:
            tensors = [random(generator, shape, scale) for shape in self.shapes] if self.shapes else awkward(generator, scale, gradient)
            return Column([moved(tensor.abs() if positive else tensor, dtype, device) for tensor in tensors])

        grad = column(FORMATS[self.grad].dtype, self.magnitude, gradient=True)
        if self.spoiled is not None:
            grad.tensors[2].view(-1)[-1] = self.spoiled
        param = column(fmt.dtype, self.size)
        extra = tuple(column(array.dtype, self.size * 2.0**-9) for array in fmt.extra)
        state = tuple(
            column(array.dtype, 0.3 * 2.0 ** (-9 * number), positive="sq" in name)
            for name in self.algorithm.state
            for number, array in enumerate(state_format.arrays)
        )
        if self.spoiled_state is not None:
            state[-1].tensors[2].view(-1)[-1] = self.spoiled_state
        segments = [segment_of(row, tensor.shape) for row, tensor in enumerate(param.tensors)]
        state_formats = (state_format,) * len(self.algorithm.state)
        return Operands(segments=segments, format=fmt, param=param, extra=extra, grad=grad, state_formats=state_formats, state=state)

    @property
    def kernel_formats(self) -> tuple[tuple[Format, ...], Format]:
        """Of what an update stores, and of the gradients."""
        return (FORMATS[self.fmt], *(FORMATS[self.state] for _ in self.algorithm.state)), FORMATS[self.grad]

    def keys(self, operands: Operands) -> Tensor | None:
        """What random numbers are drawn with; None where none are."""
        count = sum(fmt.is_random for fmt in operands.formats)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(-(2**63), 2**63 - 1, (len(operands), count), generator=generator) if count else None

    def coefficients(self, operands: Operands, group: dict[str, Any], step: int = 3) -> Tensor:
        rows = [self.algorithm.coefficients(group | {"lr": group["lr"] * (1 + row)}, step, 1.0) for row in range(len(operands))]
        return torch.tensor(rows, dtype=torch.float64).to(torch.float32)


def random(generator: torch.Generator, shape: Sequence[int], scale: float) -> Tensor:
    return torch.randn(shape, generator=generator) * scale * 10.0 ** torch.randint(-3, 2, shape, generator=generator)


def awkward(generator: torch.Generator, scale: float, gradient: bool) -> list[Tensor]:
    """Tensors without elements, with few, and with more than a program takes; then some that lie in memory in other ways."""
    shapes = [(0,), (), (1,), (5,), (7, 3), (64,), (201,), (48, 2)]
    values = [random(generator, shape, scale) for shape in shapes]
    values.append(random(generator, (6, 4), scale).t())
    other = random(generator, (6, 4), scale)
    values.append(other.reshape(4, 6) if gradient else other.t())  # strided unlike its gradient
    values.append(random(generator, (9, 8), scale)[:, 3:6])
    values.append(random(generator, (71,), scale)[1:])  # unaligned
    values.append(random(generator, (1,), scale).expand(40) if gradient else random(generator, (40,), scale))
    return values


def moved(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """In another dtype, strided as before, and beginning where it began within its memory."""
    base = torch.empty(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=dtype, device=device)
    view = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    if tensor.numel() and 0 not in tensor.stride():
        view.copy_(tensor)
    elif tensor.numel():
        base.fill_(float(tensor.flatten()[0]))
    return view


def segment_of(row: int, shape: Sequence[int]) -> Segment:
    """A whole tensor; or runs of a larger one, shorter or longer than what a program takes."""
    numel = torch.Size(shape).numel()
    if numel % 6 == 0 and numel:
        return Segment(name=f"w{row}", shape=(10 * numel,), start=13, run=6, stride=31, count=numel // 6)
    if numel == 201:
        return Segment(name=f"w{row}", shape=(1000,), start=7, run=67, stride=300, count=3)
    if numel == 70:
        return Segment.flat(f"w{row}", (2**40,), 2**33 + 1, 70)
    return Segment.whole(f"w{row}", shape)


def assert_same(actual: Tensor, expected: Tensor, name: str) -> None:
    """The same bits, but for those of NaN, of which backends may choose."""
    actual = actual.cpu()
    assert torch.equal(actual.isnan(), expected.isnan()), name
    bits = {4: torch.int32, 2: torch.int16, 1: torch.int8}[expected.element_size()]
    finite = ~expected.isnan()
    assert torch.equal(actual[finite].view(bits), expected[finite].view(bits)), f"{name} of {tuple(expected.shape)}"


def columns_of(operands: Operands) -> dict[str, Column]:
    extra = {f"extra {index}": column for index, column in enumerate(operands.extra)}
    state = {f"state {index}": column for index, column in enumerate(operands.state)}
    return {"param": operands.param, **extra, **state, "grad": operands.grad}


def assert_same_update(
    backend: Backend,
    case: Case,
    *,
    group: dict[str, Any] = GROUP,
    proceed: bool | None = None,
    grad_scale: float | None = None,
    steps: int = 1,
) -> Operands:
    """Step the case with a backend and with the eager one; gives what the first made."""
    results = []
    for each in (eager.BACKEND, backend):
        operands = case.operands()
        keys = case.keys(operands)
        for step in range(steps):
            each.update(
                case.algorithm,
                operands,
                case.coefficients(operands, group, step + 1),
                None if proceed is None else torch.tensor(proceed),
                None if grad_scale is None else torch.tensor(grad_scale),
                None if keys is None else keys + step,
            )
        results.append(operands)
    expected, actual = results
    for (name, column), other in zip(columns_of(actual).items(), columns_of(expected).values(), strict=True):
        for a, e in zip(column.tensors, other.tensors, strict=True):
            assert_same(a, e, name)
    return actual


def assert_same_observation(
    backend: Backend, case: Case, *, group: dict[str, Any] = GROUP, grad_scale: float | None = None, sums: bool = True
) -> Tensor:
    """Observe the case with a backend and with the eager one, and write nothing; gives which operands are not finite."""
    statistic = STATISTIC if sums else None
    assert STATISTIC is not None
    operands = case.operands()
    count = len(operands)
    coefficients = torch.tensor([STATISTIC.coefficients(group, 3 + row) for row in range(count)], dtype=torch.float64).to(torch.float32)
    limits = torch.full((count,), 1.01 * STATISTIC.bound(group))
    scales = torch.tensor([2.0 ** (44 - 8 * (row % 4)) for row in range(count)])
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    results = [each.observe(statistic, operands, coefficients, limits, scales, scale) for each in (eager.BACKEND, backend)]
    (expected_sums, expected_flags), (actual_sums, actual_flags) = results
    finite = expected_flags == 0
    assert torch.equal(actual_flags == 0, finite)
    assert torch.equal(actual_sums[finite], expected_sums[finite])
    for column, other in zip(columns_of(operands).values(), columns_of(case.operands()).values(), strict=True):
        for a, e in zip(column.tensors, other.tensors, strict=True):
            assert_same(a, e, "what observe must not write")
    return ~finite
