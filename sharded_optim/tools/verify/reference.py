"""Step the same optimizer in one process, on ordinary tensors, with the gradients of the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sharded_optim.tools.verify.making import MakeOptimizer, named, rebuilt, seed_all

__all__ = ["Probes", "Reference", "relative_error"]


class Reference:
    """The user's optimizer in one process, on the whole model.

    Args:
        model: the model, built as on the ranks.
        initial: the ranks' parameters before the first step.
        build: makes the optimizer.

    Attributes:
        moved: names of the parameters that a step has changed.
    """

    def __init__(self, model: nn.Module, initial: Mapping[str, Tensor], build: Callable[[nn.Module], Any]) -> None:
        self.params = named(model)
        self.initial = initial
        self.moved: set[str] = set()
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(initial[name])
        self.optimizer = build(model)

    def step(self, grads: Mapping[str, Tensor], number: int) -> None:
        for name, param in self.params.items():
            grad = grads.get(name)
            param.grad = None if grad is None else grad.clone()  # some optimizers write to it
        seed_all(number)
        self.optimizer.step()
        self.moved |= {name for name, param in self.params.items() if not torch.equal(param, self.initial[name])}

    def errors(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the relative error of each of the ranks' parameters; see `relative_error`."""
        return {name: relative_error(params[name].detach(), param.detach()) for name, param in self.params.items()}


class Probes:
    """Variants of the reference, whose parameters are grouped or cut in other ways.

    alone: an optimizer for each parameter.
    halves: each parameter in two halves, along its first dimension.
    incomplete, incomplete_alone: one optimizer, and one for each parameter, where a parameter lacks a gradient in the first step, as in a
        frozen or unused layer. Its own optimizer does not step then, so a step counter of a whole group is one step ahead of its own.

    Args:
        reference: the reference, before its first step.
        make: the maker of its optimizer.

    Raises:
        Exception: any error of the optimizer about such parameters.
    """

    def __init__(self, reference: Reference, make: MakeOptimizer) -> None:
        self._reference = reference
        self.without_first_gradient = max(reference.params, key=lambda name: reference.params[name].numel())
        self._alone, self._halves, self._incomplete, self._incomplete_alone = (
            _Variant(reference, make, alone=alone, pieces=pieces) for alone, pieces in ((True, 1), (False, 2), (False, 1), (True, 1))
        )

    def step(self, grads: Mapping[str, Tensor], number: int) -> Probes:
        """Step all variants, and return this object."""
        for variant in (self._alone, self._halves, self._incomplete, self._incomplete_alone):
            is_incomplete = variant in (self._incomplete, self._incomplete_alone) and number == 0
            variant.step(
                {name: grad for name, grad in grads.items() if not (is_incomplete and name == self.without_first_gradient)}, number
            )
        return self

    @property
    def of_cutting(self) -> float:
        """Return the largest relative error of parameters stepped in halves, against whole ones: 0 for an elementwise optimizer."""
        return max(self._reference.errors(self._halves.whole()).values())

    @property
    def of_grouping(self) -> float:
        """Return the largest relative error of parameters stepped by an optimizer each, against one optimizer of all."""
        return max(self._reference.errors(self._alone.whole()).values())

    @property
    def of_counting(self) -> dict[str, float]:
        """Return the relative errors by parameter of an optimizer each, against one of all, where a gradient was missing once."""
        together, alone = self._incomplete.whole(), self._incomplete_alone.whole()
        return {name: relative_error(alone[name], value) for name, value in together.items()}


class _Variant:
    """Copies of a reference's parameters, each cut into `pieces`, with one optimizer for all or one for each parameter."""

    def __init__(self, reference: Reference, make: MakeOptimizer, *, alone: bool, pieces: int) -> None:
        self.pieces = {
            name: [nn.Parameter(piece.clone()) for piece in (param.detach().chunk(pieces) if param.ndim else (param.detach(),))]
            for name, param in reference.params.items()
        }
        names = {id(param): name for name, param in reference.params.items()}
        groups = [[names[id(param)] for param in group["params"]] for group in reference.optimizer.param_groups]
        one_each = [[[name] if name in group else [] for group in groups] for group in groups for name in group]
        self._optimizers = [
            (
                set().union(*each),
                rebuilt(reference.optimizer, make, [[piece for name in group for piece in self.pieces[name]] for group in each]),
            )
            for each in (one_each if alone else [groups])
        ]

    def step(self, grads: Mapping[str, Tensor], number: int) -> None:
        for name, pieces in self.pieces.items():
            grad = grads.get(name)
            of_pieces = [None] * len(pieces) if grad is None else grad.chunk(len(pieces)) if grad.ndim else [grad]
            for piece, of_piece in zip(pieces, of_pieces, strict=True):
                piece.grad = None if of_piece is None else of_piece.clone()
        for names, optimizer in self._optimizers:
            if names & grads.keys():
                seed_all(number)
                optimizer.step()

    def whole(self) -> dict[str, Tensor]:
        return {name: torch.cat([*pieces]).detach() if len(pieces) > 1 else pieces[0].detach() for name, pieces in self.pieces.items()}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return max |value - reference| / max |reference|: 0.0 if they are equal; else inf if one is not finite, or reference is 0."""
    if value.numel() == 0 or torch.equal(value, reference):
        return 0.0
    if torch.equal(value.isnan(), reference.isnan()) and torch.equal(value.nan_to_num(), reference.nan_to_num()):
        return 0.0
    difference, scale = (value.double() - reference.double()).abs().max().item(), reference.double().abs().max().item()
    if not (difference < float("inf") and scale < float("inf")):
        return float("inf")
    return difference / scale if scale else float("inf")
