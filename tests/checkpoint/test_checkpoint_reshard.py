"""A checkpoint that one wrapper has saved on some ranks is the same training under every other, on any other number of ranks, bit for bit.

Parameters are compared after loading, and again two steps later, into which moments, step counters and hyperparameters go.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import deepspeed_models
import pytest
import ranks
import torch
import torch.distributed as dist
from every_wrapper import RECIPES, WRAPPERS, Trained, recipes_of, worlds_of

import sharded_optim as so

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")

SAVED_AT = 3  # steps
MORE = 2
EXTRA = {"tokens": 12345, "lr_scale": 0.1}
Case = tuple[str, int]  # a wrapper, and on how many ranks
HAS_DEEPSPEED = find_spec("deepspeed") is not None

EVERYTHING = [(name, world) for name in WRAPPERS for world in worlds_of(name)]
SOME: list[Case] = [
    ("plain", 1),
    ("ddp", 2),
    ("fsdp2", 3),
    ("hsdp", 4),
    ("fsdp2_tp", 4),
    ("fsdp1", 3),
    ("fsdp1_flat", 2),
    ("zero1", 2),
    ("zero2_bf16", 3),
    ("deepspeed1", 2),
    ("deepspeed3_bf16", 4),
]


def folder_of(root: Path, case: Case, recipe: str) -> Path:
    return root / f"{case[0]}-{case[1]}-{recipe}"


def built(wrappers: Sequence[str], seed: int) -> Iterator[tuple[str, str, Trained]]:
    """Every wrapper, with each recipe, one after the other."""
    for name in wrappers:
        for recipe in recipes_of(name):
            trained = WRAPPERS[name](RECIPES[recipe], seed)
            yield name, recipe, trained
            if hasattr(trained.model, "destroy"):
                trained.model.destroy()
            del trained
            gc.collect()


def check_saving(root: Path, wrappers: Sequence[str]) -> None:
    for name, recipe, trained in built(wrappers, seed=0):
        for step in range(1, SAVED_AT + 1):
            trained.step(step)
        folder = folder_of(root, (name, dist.get_world_size()), recipe)
        so.checkpoint.save(folder, SAVED_AT, model=trained.model, optimizer=trained.optimizer, extra=EXTRA)


def check_loading(root: Path, sources: Sequence[Case], wrappers: Sequence[str], everything: bool) -> None:
    """Unless everything is asked for, a pair takes one recipe, and its neighbours in the table the others."""
    outcomes = {
        (recipe, steps): RECIPES[recipe].in_one_process(steps).params for recipe in RECIPES for steps in (SAVED_AT, SAVED_AT + MORE)
    }
    for name, recipe, trained in built(wrappers, seed=1):  # other values, that have to go
        trained.step(1)
        for place, source in enumerate(sources, start=list(WRAPPERS).index(name)):
            possible = [each for each in recipes_of(name) if each in recipes_of(source[0])]
            if recipe not in (possible if everything else [possible[place % len(possible)]]):
                continue
            where = f"{source} -> {name} on {dist.get_world_size()}, {recipe}"
            folder = folder_of(root, source, recipe)
            extra = so.checkpoint.load(folder, model=trained.model, optimizer=trained.optimizer)
            assert extra == EXTRA, where
            compare(trained, outcomes[recipe, SAVED_AT], f"{where}, loaded")
            for step in range(SAVED_AT + 1, SAVED_AT + MORE + 1):
                trained.step(step)
            compare(trained, outcomes[recipe, SAVED_AT + MORE], f"{where}, {MORE} steps later")


def check_model_alone(root: Path) -> None:
    """DeepSpeed steps masters of the parameters: they are loaded with them, or the next step would undo it."""
    for name in ("deepspeed2", "deepspeed3_bf16", "deepspeed1_bf16"):
        source = WRAPPERS[name](RECIPES["two groups"], 0)
        expected = source.whole()
        so.checkpoint.save(root / name, 0, model=source.model)
        source.model.destroy()
        trained = WRAPPERS[name](RECIPES["two groups"], 1)
        so.checkpoint.load(root / name, model=trained.model)
        for group in trained.optimizer.param_groups:
            group["lr"] = 0.0
        trained.step(1)
        compare(trained, expected, f"{name}, the model alone")
        trained.model.destroy()


def compare(trained: Trained, expected: dict[str, torch.Tensor], where: str) -> None:
    for name, value in trained.whole().items():
        assert torch.equal(value, expected[name]), f"{where}: {name}, by {(value - expected[name]).abs().max()}"


def check(root: Path, sources: Sequence[Case], targets: Sequence[Case], everything: bool) -> int:
    """Save and load all pairs; returns how many."""
    run = deepspeed_models.run if HAS_DEEPSPEED else ranks.run
    if not HAS_DEEPSPEED:
        sources, targets = ([case for case in cases if "deepspeed" not in case[0]] for cases in (sources, targets))
    worlds = (1, 2, 3, 4)
    for world in worlds:
        wrappers = [name for name, ranks in sources if ranks == world]
        if wrappers:
            run(check_saving, world, root, wrappers, timeout=600.0)
    for world in worlds:
        wrappers = [name for name, ranks in targets if ranks == world]
        if wrappers:
            run(check_loading, world, root, sources, wrappers, everything, timeout=3000.0)
    return len(sources) * len(targets)


@pytest.mark.timeout(400)
def test_a_checkpoint_is_the_same_training_under_other_wrappers_and_on_other_numbers_of_ranks(
    tmp_path: Path, everything: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if not everything:
        check(tmp_path, SOME, SOME, everything)
        return
    began = time.perf_counter()
    pairs = check(tmp_path, EVERYTHING, EVERYTHING, everything)
    with capsys.disabled():
        print(f"{pairs} pairs of {len(EVERYTHING)} wrappers and numbers of ranks: bitwise the same, {time.perf_counter() - began:.0f} s")


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed (the extra `deepspeed`)")
@pytest.mark.timeout(400)
def test_a_model_that_deepspeed_trains_is_loaded_without_its_optimizer(tmp_path: Path) -> None:
    deepspeed_models.run(check_model_alone, 2, tmp_path)
