"""Find the most likely cause of differences, from evidence that was collected while ranks trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharded_optim.tools.verify.report import Difference, Reason

__all__ = ["Evidence", "reasons_of"]

CLIPPING_TOLERANCE = 1e-3  # relative, of a norm
EARLY_SHARE = 0.1  # share of a tensor's largest error: smaller errors before the checkpoint may be rounding


@dataclass
class Evidence:
    """Observations of a verification.

    Attributes:
        errors: relative errors of each parameter, one after each step.
        unknown: the number of the optimizer's parameters that are not the model's.
        unmoved: parameters that were never changed.
        idle: parameters that never had a nonzero gradient.
        stuck: parameters that one process does not change either.
        apart: parameters that ranks have initialized differently, and that sharding has not replaced by rank 0's.
        copies_equal: whether on each rank an optimizer that has local tensors alone gave the same bits; None: not tried.
        is_elementwise: whether, in one process, tensors cut in halves are stepped as whole tensors are; None: not tried.
        lost: names of the optimizer's state that saving and loading has changed.
        groups: relative errors of one optimizer for each parameter against one of all, where a gradient was missing once.
        without_first_gradient: the parameter whose gradient was missing in that test.
        clipped: the record of clipping: the returned norm, the expected norm, or the refusal.
    """

    errors: dict[str, list[float]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    storage: dict[str, str] = field(default_factory=dict)
    unknown: int = 0
    unmoved: set[str] = field(default_factory=set)
    idle: set[str] = field(default_factory=set)
    stuck: set[str] = field(default_factory=set)
    apart: list[str] = field(default_factory=list)
    copies_equal: bool | None = None
    is_elementwise: bool | None = None
    resumed_at: int | None = None
    lost: list[str] = field(default_factory=list)
    lost_weights: list[str] = field(default_factory=list)
    groups: dict[str, float] = field(default_factory=dict)
    without_first_gradient: str = ""
    clipped: Mapping[str, Any] | None = None
    failure: str | None = None
    notes: list[str] = field(default_factory=list)
    _params: dict[str, Tensor] = field(default_factory=dict)  # after the last step

    @property
    def compared(self) -> int:
        return len(next(iter(self.errors.values()), []))

    def is_early(self, name: str, tolerance: float) -> bool:
        """Return whether a tensor differed before the checkpoint by more than rounding."""
        errors = self.errors[name]
        before = errors if self.resumed_at is None else errors[: self.resumed_at]
        return max(before, default=0.0) > min(tolerance, EARLY_SHARE * max(errors))

    def begin(self, params: Mapping[str, Tensor], storage: dict[str, str], unknown: int, apart: list[str]) -> None:
        self.shapes = {name: tuple(param.shape) for name, param in params.items()}
        self.errors = {name: [] for name in params}
        self.storage, self.unknown, self.apart, self._params = storage, unknown, apart, dict(params)
        self.unmoved, self.idle, self.stuck = set(params), set(params), set(params)

    def step(self, params: Mapping[str, Tensor], errors: Mapping[str, float], grads: Mapping[str, Tensor], moved: set[str]) -> None:
        for name, error in errors.items():
            self.errors[name].append(error)
        self.stuck -= moved
        self.idle -= {name for name, grad in grads.items() if grad.any()}
        self.unmoved = {name for name in self.unmoved if torch.equal(params[name], self._params[name])}
        self._params = dict(params)

    def loaded(self, lost: list[str], params: Mapping[str, Tensor]) -> None:
        self.lost, self.resumed_at = lost, self.compared
        self.lost_weights = [name for name, param in params.items() if not torch.equal(param, self._params[name])]
        self._params = dict(params)

    def differences(self, tolerance: float) -> Iterator[Difference]:
        for name, errors in self.errors.items():
            if max(errors, default=0.0) > tolerance:
                first = next(step for step, error in enumerate(errors) if error > tolerance)
                storage = self.storage.get(name, "whole on every rank")
                yield Difference(name=name, shape=self.shapes[name], storage=storage, step=first, error=max(errors))


def reasons_of(evidence: Evidence, tolerance: float) -> Iterator[Reason]:
    """Yield faults, and the likely cause of differences. Adds notes to the evidence."""
    differences = list(evidence.differences(tolerance))
    yield from _of_the_start(evidence)
    yield from _of_differences(evidence, differences, tolerance)
    yield from _of_groups(evidence, tolerance)
    yield from _of_clipping(evidence)


def _of_the_start(evidence: Evidence) -> Iterator[Reason]:
    if evidence.apart:
        yield Reason(
            kind="replicas apart",
            text=f"ranks initialize {_some(evidence.apart)} differently, though torch's seed is the same on all",
            way_out="draw all weights from torch's random numbers, seeded alike on every rank, or broadcast them before sharding",
        )
    unmoved = sorted(evidence.unmoved - evidence.idle - evidence.stuck)
    if evidence.unknown:
        yield Reason(
            kind="built before sharding",
            text=f"{evidence.unknown} of the optimizer's parameters are not the model's"
            + (f"; {_some(unmoved)} never changed" if unmoved else ""),
            way_out="build the optimizer after the model is wrapped: fully_shard replaces parameters by others",
        )
    elif unmoved and evidence.compared:
        yield Reason(
            kind="no effect",
            text=f"{_some(unmoved)} never changed, though the gradients are not zero",
            way_out="see whether the optimizer is given these parameters, and whether it finds their gradients",
        )


def _of_differences(evidence: Evidence, differences: list[Difference], tolerance: float) -> Iterator[Reason]:
    if evidence.failure is not None and evidence.lost and not differences:
        yield _lost(evidence)
    if not differences or evidence.unknown:
        return
    early = [each for each in differences if evidence.is_early(each.name, tolerance)]
    cut = [each.name for each in early if each.name in evidence.storage]
    if cut and evidence.copies_equal and not evidence.is_elementwise:
        yield Reason(
            kind="slice",
            text=f"of {_some(cut)} each rank's optimizer uses the local part as though it were the whole tensor: a second optimizer that "
            "knows the local parts alone does the same, bit for bit",
            way_out="use an optimizer that computes statistics and matrices of whole tensors on shards",
        )
    elif early:
        if evidence.apart:  # already yielded, and reason enough
            return
        yield Reason(
            kind="unknown",
            text=f"{_some([each.name for each in early])} differ before anything is saved; {_not_sliced(evidence)}",
            way_out="compare the wrapper's options with the optimizer's needs; the first step that differs is named below",
        )
    elif evidence.lost_weights:
        yield Reason(
            kind="weights lost on load",
            text=f"{_some(evidence.lost_weights)} are not what was saved",
            way_out="save and load the model's state dict together with the optimizer's",
        )
    else:
        yield _lost(evidence)


def _lost(evidence: Evidence) -> Reason:
    states = _some(evidence.lost) if evidence.lost else "none of the tensors in its state, but something that is not in its state dict"
    return Reason(
        kind="state lost on load",
        text=f"all steps before the checkpoint are right, those after it are not; different from what was saved: {states}",
        way_out="see that the optimizer's state_dict has all of its state, and that load_state_dict takes it",
    )


def _not_sliced(evidence: Evidence) -> str:
    if evidence.is_elementwise:
        return "the optimizer treats every element alike, so what differs is how it is called: hyperparameters, gradients or scales"
    if evidence.copies_equal is None:
        return "whether it is by local parts alone could not be tried"
    return "an optimizer that knows local parts alone does not do the same"


def _of_groups(evidence: Evidence, tolerance: float) -> Iterator[Reason]:
    differing = [name for name, error in evidence.groups.items() if error > tolerance]
    if differing:
        worst = max(evidence.groups.values())
        yield Reason(
            kind="groups",
            text=f"the result depends on how parameters are grouped, by {worst:.1e}: where {evidence.without_first_gradient!r} has no "
            f"gradient in the first step, one optimizer, and one for each parameter, give other values of {_some(differing)}: as "
            "with a step counter per group",
            way_out="use an optimizer with a step counter per parameter; wrappers that flatten or split groups change the result otherwise",
        )


def _of_clipping(evidence: Evidence) -> Iterator[Reason]:
    clipped = evidence.clipped
    if clipped is None:
        return
    if clipped["refusal"] is not None:
        evidence.notes.append(f"torch.nn.utils.clip_grad_norm_ is refused: {clipped['refusal']}")
    elif abs(clipped["norm"] - clipped["expected"]) > CLIPPING_TOLERANCE * clipped["expected"]:
        yield Reason(
            kind="clipping",
            text=f"torch.nn.utils.clip_grad_norm_ returns {clipped['norm']:.4g}, the gradients' norm is {clipped['expected']:.4g}: it "
            "clips nothing, or by another norm on each rank",
            way_out="use so.clip_grad_norm_, FSDP1's own clip_grad_norm_, or gradient_clipping in DeepSpeed's config",
        )


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(map(str, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
