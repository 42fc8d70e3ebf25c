"""A backend is one file and its name in `MODULES`: every optimizer then runs on it, with the bits of the others. See `toy_backend.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
import toy_backend
from torch import nn

import sharded_optim as so
from sharded_optim import backends

SHAPES = [(), (5,), (7, 3), (1,), (0,), (64, 33)]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": partial(so.AdamW, lr=1e-2),
    "StableAdamW": partial(so.StableAdamW, lr=1e-2),
    "DecoupledSGDW": partial(so.DecoupledSGDW, lr=1e-2, momentum=0.9),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file and the line in `backends/__init__.py` would do."""
    monkeypatch.setattr(backends, "MODULES", (*backends.MODULES, "toy_backend"))
    monkeypatch.setitem(sys.modules, "sharded_optim.backends.toy_backend", toy_backend)


def trained(make: Callable[..., torch.optim.Optimizer], backend: str) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make(params, backend=backend)
    for step in range(5):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator) * 10.0 ** (step % 3)
        if step == 3:
            params[1].grad[0] = torch.nan  # StableAdamW takes no such step
        optimizer.step()
    return optimizer, [tensor for param in params for tensor in (param.detach(), *optimizer.state[param].values())]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_it_has_the_bits_of_the_reference(make: Callable[..., torch.optim.Optimizer]) -> None:
    optimizer, values = trained(make, "toy_backend")
    _, expected = trained(make, "eager")
    assert "toy_backend" in repr(optimizer), "it has run"
    assert len(values) == len(expected) > len(SHAPES)
    for value, reference in zip(values, expected, strict=True):
        assert torch.equal(value.nan_to_num(7.0), reference.nan_to_num(7.0))


def test_what_it_does_not_support_is_refused_with_its_reason() -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="toy_backend: it computes with float32 alone"):
        so.AdamW([param], lr=1e-2, backend="toy_backend").step()
