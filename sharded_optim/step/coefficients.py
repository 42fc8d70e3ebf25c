"""Compute the table of coefficients that a backend reads, from hyperparameters, step counters and learning-rate scales.

Nothing here waits for a device. What the host knows is computed in Python floats, what only the device knows there in float64: in one
launch by a backend that compiles formulas, else as tensors. All give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharded_optim.backends import Backend, Operands
from sharded_optim.formulas import Coefficients
from sharded_optim.formulas.recording import Formula, Number, Recorded, Recorder
from sharded_optim.formulas.scalars import Sums, host_value, known_on_host

__all__ = ["GroupRows", "LrScale", "coefficient_table", "host_numbers", "host_value", "known_on_host", "next_steps"]


@dataclass(frozen=True, kw_only=True)
class GroupRows:
    """The hyperparameters of param groups, and the rows of the operands of each.

    Attributes:
        groups: hyperparameters of each, as `host_numbers` gives them.
        rows: the operands of each: int64; or None for all, if there is one group.
        group_of: which group is each operand's: int64 (operands,); None if there is one.
    """

    groups: Sequence[Mapping[str, Any]]
    rows: Sequence[Tensor | None]
    group_of: Tensor | None

    @classmethod
    def one(cls, group: Mapping[str, Any]) -> GroupRows:
        return cls(groups=[group], rows=[None], group_of=None)


@dataclass(frozen=True, kw_only=True)
class LrScale:
    """The factor for the learning rate of each operand, computed from the sums over ranks."""

    of_mean: Callable[[Mapping[str, Any], Number], Number]  # see `Statistic.lr_scale`
    sums: Sums

    def values(self, groups: Sequence[Mapping[str, Any]]) -> list[Number]:
        """Compute the factors of all operands with each group's hyperparameters: float64 (operands,).

        Or the one value of all, where the host knows it: that is computed with faster, and to the same bits.
        """
        means = self.sums.mean()
        if len(groups) == 1:
            return [_one_if_known(self.of_mean(groups[0], means))]
        computed: list[tuple[Mapping[str, Any], Number]] = []  # with the hyperparameters that it was computed with
        values = []
        for group in groups:
            value = next((value for used, value in computed if _has(group, used)), None)
            if value is None:
                noted = _Noted(group)
                value = _one_if_known(self.of_mean(noted, means))
                computed.append((noted.used, value))
            values.append(value)
        return values

    def recorded(self, group: Mapping[str, Any], recorder: Recorder) -> Number:
        return self.of_mean(group, self.sums.recorded_mean(recorder))


class _Noted(Mapping[str, Any]):
    """Hyperparameters that record which of them are read, so that groups which differ in others share a scale."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self._group = group
        self.used: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        self.used[name] = self._group[name]
        return self.used[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)


def _has(group: Mapping[str, Any], used: Mapping[str, Any]) -> bool:
    """Return whether a group certainly has these values."""
    pairs = [(group[name], value) for name, value in used.items()]
    return all(own is value or (isinstance(own, int | float) and isinstance(value, int | float) and own == value) for own, value in pairs)


def _one_if_known(values: Number) -> Number:
    known = set(values.tolist()) if isinstance(values, Tensor) and known_on_host(values) else ()
    return known.pop() if len(known) == 1 else values


def host_numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """Convert hyperparameters to floats, also host tensors. A learning rate on a device stays a tensor."""
    found = {name: host_value(value) if isinstance(value, Tensor) and known_on_host(value) else value for name, value in group.items()}
    if "betas" in group:
        found["betas"] = tuple(map(float, group["betas"]))
    return found if isinstance(found["lr"], Tensor) else found | {"lr": float(found["lr"])}


def coefficient_table(
    coefficients: Callable[..., Coefficients],  # (hyperparameters, step) or (hyperparameters, step, lr_scale)
    members: GroupRows,
    steps: Tensor,  # fp32 (operands,), taken so far by each
    lr_scale: float | LrScale | None = None,  # passed on where given
    *,
    backend: Backend,
    operands: Operands,
) -> Tensor:
    """Compute a row of coefficients for each operand: fp32 (operands, coefficients), computed in float64 and rounded once."""
    if backend.tabulate is not None and not known_on_host(steps):
        formulas = [_formula(coefficients, group, lr_scale) for group in members.groups]
        sums = lr_scale.sums if isinstance(lr_scale, LrScale) else None
        return backend.tabulate(operands, formulas, members.group_of, steps, sums, _lr_on_device(members.groups, steps.device))
    groups = [{**group, "lr": _double(group["lr"], steps.device)} if isinstance(group["lr"], Tensor) else group for group in members.groups]
    scales = lr_scale.values(groups) if isinstance(lr_scale, LrScale) else [lr_scale] * len(groups)
    table = None
    for group, scale, rows in zip(groups, scales, members.rows, strict=True):
        own_steps = steps if rows is None else steps[rows]
        arguments: list[Any] = [group, _next_step(own_steps)]
        if scale is not None:
            arguments.append(scale[rows] if isinstance(scale, Tensor) and rows is not None else scale)
        part = _columns(coefficients(*arguments), len(own_steps), steps.device)
        if rows is None:
            return part
        if table is None:
            table = torch.empty(len(steps), part.shape[1], dtype=torch.float32, device=steps.device)
        table[rows] = part
    assert table is not None, "a batch has a group"
    return table


def _formula(coefficients: Callable[..., Coefficients], group: Mapping[str, Any], lr_scale: float | LrScale | None) -> Formula:
    """Record the formula of the coefficients of one group."""
    recorder = Recorder()
    numbers = {**group, "lr": recorder.input("lr")} if isinstance(group["lr"], Tensor) else group
    arguments: list[Any] = [numbers, recorder.input("step")]
    if lr_scale is not None:
        arguments.append(lr_scale.recorded(numbers, recorder) if isinstance(lr_scale, LrScale) else lr_scale)
    return recorder.formula(coefficients(*arguments))


def _lr_on_device(groups: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor | None:
    """Stack the learning rates that are tensors on a device: float64 (groups,), 0 for the others; None if there are none."""
    rates = [group["lr"] for group in groups]
    if not any(isinstance(lr, Tensor) for lr in rates):
        return None
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([_double(lr, device) if isinstance(lr, Tensor) else zero for lr in rates])


def _double(lr: Tensor, device: torch.device) -> Tensor:
    return lr.detach().to(device).double().reshape(())


def _columns(values: Coefficients, rows: int, device: torch.device) -> Tensor:
    if device.type == "cpu" and not any(isinstance(value, Tensor) for value in values):
        return torch.tensor([values], dtype=torch.float32, device="cpu").expand(rows, -1).contiguous()
    # Not copied to a device but filled in there: a copy would have to wait, and a CUDA graph could not record it.
    columns = []
    for value in values:
        assert not isinstance(value, Recorded)
        filled = isinstance(value, Tensor)
        columns.append(value.expand(rows) if filled else torch.full((rows,), value, dtype=torch.float64, device=device))
    return torch.stack(columns, dim=1).to(torch.float32)


def _next_step(steps: Tensor) -> int | Tensor:
    """Return the number of the coming step, from 1: an int if the host knows it and all operands share it, else int64 (operands,)."""
    if known_on_host(steps):
        known = set(steps.tolist())
        if len(known) == 1:
            return int(known.pop()) + 1
    return next_steps(steps)


def next_steps(steps: Tensor) -> Tensor:
    """Return the number of the coming step of each operand, from 1: int64 (operands,)."""
    return steps.to(torch.int64) + 1
