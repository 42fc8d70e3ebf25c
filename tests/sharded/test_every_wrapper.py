"""Under every wrapper and on every number of ranks, an optimizer has the bits, and the metrics, of one process with the same gradients."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from importlib.util import find_spec

import deepspeed_models
import pytest
import ranks
import torch
from every_wrapper import RECIPES, WRAPPERS, Trained, recipes_of, worlds_of

import sharded_optim as so

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")

STEPS = 20
HAS_DEEPSPEED = find_spec("deepspeed") is not None


def trained_alone(recipe: str) -> Trained:
    trained = WRAPPERS["plain"](RECIPES[recipe], 0)
    for step in range(1, STEPS + 1):
        trained.step(step)
    return trained


def metrics_of(trained: Trained) -> list[tuple[str, float]]:
    """Kinds and values of what the last step did to all tensors; without their names, which some wrappers know and others do not."""
    return sorted((name.partition("/")[0], value) for name, value in so.metrics(trained.optimizer).items())


def check(cases: Sequence[tuple[str, str]]) -> None:
    outcomes = {recipe: RECIPES[recipe].in_one_process(STEPS).params for recipe in {recipe for _, recipe in cases}}
    metrics = {recipe: metrics_of(trained_alone(recipe)) for recipe in outcomes}
    for wrapper, recipe in cases:
        trained = WRAPPERS[wrapper](RECIPES[recipe], 0)
        for step in range(1, STEPS + 1):
            trained.step(step)
        for name, value in trained.whole().items():
            expected = outcomes[recipe][name]
            assert torch.equal(value, expected), f"{wrapper}, {recipe}: {name}, by {(value - expected).abs().max()}"
        found, expected = metrics_of(trained), metrics[recipe]
        assert found == expected, f"{wrapper}, {recipe}: {[each for each in (*found, *expected) if (each in found) != (each in expected)]}"
        if hasattr(trained.model, "destroy"):
            trained.model.destroy()
        del trained
        gc.collect()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_parameters_have_the_bits_of_one_process(world_size: int, everything: bool) -> None:
    """20 spiky steps. Without --matrix Muon alone, and some wrappers on each number of ranks; the others are tested by wrapper."""
    cases = [
        (wrapper, recipe)
        for number, wrapper in enumerate(WRAPPERS)
        for recipe in recipes_of(wrapper)
        if world_size in worlds_of(wrapper)
        and (HAS_DEEPSPEED or "deepspeed" not in wrapper)
        and (everything or (recipe == "muon" and (world_size == 3 or number % 4 == world_size % 4)))
    ]
    run = deepspeed_models.run if HAS_DEEPSPEED else ranks.run
    run(check, world_size, cases, timeout=3000.0 if everything else 300.0)
