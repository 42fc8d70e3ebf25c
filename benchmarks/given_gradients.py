"""A model whose gradients are given, and what an optimizer does with them in one process: the reference for every wrapper.

The gradients are exact whatever the wrapper, the number of ranks and the dtype, so what differs from the reference at the end is the
optimizer's doing. A gradient is 3 times an integer in [-28, 28] times a power of two, which is drawn for each tensor and row in each step:
statistics of a part are not those of the whole. What a rank contributes is an integer, times the number of ranks, times that power of two;
contributions have the gradient's sign, and their mean is the gradient. Sums and quotients of these are exact in bfloat16 up to 4 ranks, and
in float32 for many more, in any order, whether a wrapper divides before or after it adds, and also if every rank contributes the whole
gradient instead.

Start values are representable in bfloat16. A wrapper that trains bfloat16 parameters with float32 masters, such as DeepSpeed, starts its
masters from these very values, and gradients survive the cast: its masters, not its bfloat16 parameters, compare with `unsharded`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "MLP",
    "SPIKES",
    "Groups",
    "Layer",
    "Model",
    "Outcome",
    "Shapes",
    "gradients",
    "one_group",
    "relative_error",
    "two_groups",
    "unsharded",
]

Shapes = Sequence[Sequence[Sequence[int]]]  # of the weight, and of the bias if there is one, of each layer
Groups = list[dict[str, Any]]
MakeOptimizer = Callable[[Groups], torch.optim.Optimizer]

MLP: Shapes = (((33, 17), (33,)), ((29, 33), (29,)), ((5, 29), (5,)))  # layers from 17 features through 33 and 29 to 5
SPIKES: Mapping[int, float] = {3: 128.0, 6: 32.0, 8: 256.0}  # by which all gradients of a step are multiplied; steps count from 1
LARGEST = 28  # 3 ranks' sum of a whole gradient is at most 9 times that, and bfloat16 has the integers up to 256
UNIT = 2.0**-10
PACES = 4  # a row's gradient is multiplied by two powers of two below 2^PACES: its tensor's and its own


class Layer(nn.Module):
    """A leaf module, of which wrappers gather the parameters when it runs: so its part of the loss is computed here."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        super().__init__()
        self.names = ("weight", "bias")[: len(values)]
        for name, value in zip(self.names, values, strict=True):
            self.register_parameter(name, nn.Parameter(value))

    def forward(
        self,
        grads: Sequence[Tensor],  # of the parameters in order; any dtype that holds them
    ) -> Tensor:  # 0-dim
        params = [getattr(self, name) for name in self.names]  # FSDP1 may have put ordinary tensors in the parameters' places
        parts = [(param * grad.to(param.dtype)).sum() for param, grad in zip(params, grads, strict=True)]
        return torch.stack(parts).sum()


class Model(nn.Module):
    """Parameters of given shapes. The gradients of what it returns are the tensors that it is given, exactly."""

    def __init__(self, layers: Shapes = MLP, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draws = ([torch.randn(tuple(shape), generator=generator) for shape in shapes] for shapes in layers)
        self.layers = nn.ModuleList(Layer([(draw / 4).bfloat16().float() for draw in values]) for values in draws)
        self.counts = [len(shapes) for shapes in layers]

    def forward(
        self,
        grads: Sequence[Tensor],  # of all parameters, in the order of `parameters()`
    ) -> Tensor:  # 0-dim; its value means nothing
        remaining = iter(grads)
        parts = [layer([next(remaining) for _ in range(count)]) for layer, count in zip(self.layers, self.counts, strict=True)]
        return torch.stack(parts).sum()


def gradients(step: int, layers: Shapes = MLP, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> list[Tensor]:
    """The gradients of a step, or what one of several ranks contributes to them: their mean over the ranks is the gradient.

    Args:
        step: counts from 1; see `SPIKES`.
        layers: shapes, as the model has them.
        seed: other seeds give other gradients.
        rank, world_size: the ranks contribute unequally, so that a gradient that was not averaged shows.

    Returns:
        New float32 tensors in the order of the model's parameters.
    """
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
    before, after = rank * (rank + 1) // 2, (rank + 1) * (rank + 2) // 2  # shares are as 1 to 2 to 3 and so on
    everything = world_size * (world_size + 1) // 2
    found = []
    for shape in (shape for shapes in layers for shape in shapes):
        whole = 3 * torch.randint(-LARGEST, LARGEST + 1, tuple(shape), generator=generator)
        until, since = (torch.div(whole * part, everything, rounding_mode="trunc") for part in (after, before))
        rows = (*shape[:1], *(1 for _ in shape[1:]))
        pace = torch.randint(PACES, (), generator=generator) + torch.randint(PACES, rows, generator=generator)
        found.append((until - since) * world_size * torch.exp2(pace.float()) * (UNIT * SPIKES.get(step, 1.0)))
    return found


def one_group(model: nn.Module) -> Groups:
    return [{"params": list(model.parameters())}]


def two_groups(model: nn.Module) -> Groups:
    """Weights, and biases without decay and with a learning rate of 5e-3."""
    named = list(model.named_parameters())
    biases = [param for name, param in named if name.endswith("bias")]
    return [
        {"params": [param for name, param in named if not name.endswith("bias")]},
        {"params": biases, "lr": 5e-3, "weight_decay": 0.0},
    ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Whole float32 tensors after some steps, by the names of the parameters."""

    params: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]  # of each parameter, what the optimizer keeps in tensors


def unsharded(
    make_optimizer: MakeOptimizer, steps: int, layers: Shapes = MLP, *, seed: int = 0, groups: Callable[[nn.Module], Groups] = one_group
) -> Outcome:
    """What an optimizer does in one process with ordinary float32 tensors and the same gradients.

    Args:
        make_optimizer: is given param groups.
        steps: how many; the first is step 1.
        layers, seed: of the model and its gradients.
        groups: makes the param groups of a model.
    """
    model = Model(layers, seed=seed)
    optimizer = make_optimizer(groups(model))
    for step in range(1, steps + 1):
        for param, grad in zip(model.parameters(), gradients(step, layers, seed=seed), strict=True):
            param.grad = grad
        optimizer.step()
    return Outcome(
        params={name: param.detach().clone() for name, param in model.named_parameters()},
        state={
            name: {key: value.clone() for key, value in optimizer.state[param].items() if isinstance(value, Tensor)}
            for name, param in model.named_parameters()
        },
    )


def relative_error(params: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The largest over tensors of max |param - reference| / max |reference|; NaN if there is one in either."""
    assert params.keys() == reference.keys(), (sorted(params), sorted(reference))
    errors = [(params[name].double() - value.double()).abs().max() / value.double().abs().max() for name, value in reference.items()]
    return torch.stack(errors).max().item()
