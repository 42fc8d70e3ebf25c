"""Other libraries' checkpoints continue in this one; code in pickles is not run; ambiguous names are refused."""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import composer_formulas as composer
import deepspeed_models
import optimi
import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deepspeed_models import AWKWARD, NEEDS_DEEPSPEED
from test_deepspeed_checkpoints import CELLS, MAKERS, engine_of
from test_foreign_state import (
    COMPOSER,
    OPTIMI,
    SAVED,
    STEPS,
    TORCH,
    Case,
    Saved,
    assert_same,
    our_decoupled,
    said,
    schedule,
    set_grads,
    taken_over,
    train,
    train_theirs,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

import sharded_optim as so
from benchmarks.given_gradients import Model, gradients, two_groups, unsharded
from sharded_optim import checkpoint
from sharded_optim.checkpoint import export

pytestmark = pytest.mark.filterwarnings(
    "ignore:weight_decay", "ignore:the state dict may be from torch", "ignore::FutureWarning", "ignore:torch.distributed is disabled"
)

OURS = {"lr": 0.5, "betas": (0.3, 0.6), "eps": 1e-2, "weight_decay": 0.3}  # that must all be replaced
load = partial(checkpoint.import_from, unpickle=True)


class Listed(nn.Module):
    """Given parameters, as a model."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        for index, param in enumerate(params):
            self.register_parameter(f"p{index}", param)


def names_in_groups(params: list[nn.Parameter]) -> list[str]:
    """Of `test_foreign_state.two_groups`."""
    return [f"p{index}" for index in [*range(0, len(params), 2), *range(1, len(params), 2)]]


# ------------------------------------------------------------------------------------------------------------------ torch files


def with_amsgrad(case: Case) -> Case:
    """Of our classes only one has the hyperparameter from the beginning."""
    if "amsgrad" not in case.name:
        return case
    replaces_composer = case.name.startswith("composer")
    return replace(case, ours=our_decoupled if replaces_composer else said(our_decoupled, "l2" if "l2" in case.name else "coupled"))


@pytest.mark.parametrize("case", [with_amsgrad(case) for case in TORCH + OPTIMI + COMPOSER], ids=lambda case: case.name)
def test_a_file_continues_as_its_state_dict_does(case: Case, tmp_path: Path) -> None:
    """Of torch, optimi or Composer, the last in Composer's form. How near the state dict continues: see `test_foreign_state.py`."""
    theirs = train_theirs(case)
    names = names_in_groups(theirs.params)
    model, state_dict = Listed(theirs.params).state_dict(), copy.deepcopy(theirs.optimizer.state_dict())
    expected = taken_over(case, theirs, copy.deepcopy(state_dict))
    replaces_composer = case.name.startswith("composer")
    if replaces_composer:
        for group in state_dict["param_groups"]:
            group["params"] = [names[number] for number in group["params"]]
        state_dict["state"] = {names[number]: values for number, values in state_dict["state"].items()}
        content = {"model": model, "optimizers": {type(theirs.optimizer).__qualname__: state_dict}, "run_name": "x"}
        torch.save({"state": content, "rng": []}, tmp_path / "theirs.pt")
    else:
        torch.save({"model": model, "optimizer": state_dict}, tmp_path / "theirs.pt")
    name = type(expected.optimizer).__name__
    load(tmp_path / "theirs.pt", tmp_path / "run", 10, param_names=None if replaces_composer else names, optimizer=name)
    params = [nn.Parameter(torch.zeros_like(param)) for param in theirs.params]
    optimizer = case.ours([{"params": params[::2]}, {"params": params[1::2]}])
    scheduler = LambdaLR(optimizer, schedule)
    extra = checkpoint.load(tmp_path / "run", model=Listed(params), optimizer=optimizer)
    assert extra == ({"run_name": "x", "rng": []} if replaces_composer else None)
    scheduler.load_state_dict(copy.deepcopy(theirs.scheduler.state_dict()))
    found = Saved(params=params, optimizer=optimizer, scheduler=scheduler)
    for mine, its in zip(params, expected.params, strict=True):
        assert_same(mine.detach(), its.detach())
        assert_same(in_order(optimizer.state[mine]), in_order(expected.optimizer.state[its]))
    for group, other in zip(optimizer.param_groups, expected.optimizer.param_groups, strict=True):
        for key in group.keys() - {"params", "reference_lr"}:
            assert group[key] == other[key], key
        assert group["decay_form"] != "decoupled" or group["reference_lr"] == other["reference_lr"]
    for each in (found, expected):
        train(each.params, each.optimizer, each.scheduler, range(SAVED, STEPS))
    for mine, its in zip(params, expected.params, strict=True):
        assert_same(mine.detach(), its.detach())


def in_order(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(state.items()))


@pytest.mark.parametrize("cls", [optimi.Adam, optimi.AdamW, optimi.StableAdamW])
def test_bf16_parameters_bring_their_kahan_compensation(cls: type, tmp_path: Path) -> None:
    """Moments in float32, into which optimi's bf16 ones go exactly but for the rounding of the debiasing."""
    model = nn.Linear(7, 3).bfloat16()
    theirs = cls(model.parameters(), lr=1e-2, foreach=False, triton=False)
    for step in range(5):
        set_grads(list(model.parameters()), step)
        theirs.step()
    torch.save({"model": model.state_dict(), "optimizer": theirs.state_dict()}, tmp_path / "theirs.pt")
    load(tmp_path / "theirs.pt", tmp_path / "run", 5)
    other = nn.Linear(7, 3).bfloat16()
    ours = getattr(so, cls.__name__)(other.parameters(), **OURS)
    expected = getattr(so, cls.__name__)(model.parameters(), **OURS)
    expected.load_state_dict(theirs.state_dict())
    checkpoint.load(tmp_path / "run", model=other, optimizer=ours)
    for mine, its in zip(other.parameters(), model.parameters(), strict=True):
        assert_same(in_order(ours.state[mine]), in_order(expected.state[its]))
        assert ours.state[mine]["kahan_comp"].any()


def trained(optimizer_class: Callable[..., Any] = torch.optim.AdamW, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = optimizer_class(model.parameters(), lr=1e-2, **options)
    for step in range(3):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    return model, optimizer


def loaded(root: Path) -> tuple[nn.Module, Any, Any]:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = so.AdamW(model.parameters(), **OURS)
    extra = checkpoint.load(root, model=model, optimizer=optimizer)
    return model, optimizer, extra


def assert_like(root: Path, model: nn.Module, optimizer: Any) -> Any:
    """A checkpoint holds a model and an optimizer of torch's; returns the extra."""
    mine, ours, extra = loaded(root)
    for (name, param), other in zip(mine.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(param, other), name
        for key, value in optimizer.state[other].items():
            assert torch.equal(ours.state[param][key], value), (name, key)
    assert ours.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    return extra


def renamed(state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in state_dict.items()}


def test_the_usual_keys_are_found_and_the_rest_is_extra(tmp_path: Path) -> None:
    model, optimizer = trained()
    m, o = model.state_dict(), optimizer.state_dict()
    files = {
        "plain": {"model": m, "optimizer": o, "epoch": 3, "best": (0.5, None), "args": argparse.Namespace(lr=1)},
        "suffixed": {"model_state_dict": m, "optimizer_state_dict": o, "epoch": 3, "best": (0.5, None)},
        "lightning": {"state_dict": m, "optimizer_states": [o], "epoch": 3, "best": (0.5, None)},
        "ddp": {"model": renamed(m, "module."), "optimizer": o, "epoch": 3, "best": (0.5, None)},
        "compiled": {"model": renamed(m, "module._orig_mod."), "optim": o, "epoch": 3, "best": (0.5, None)},
    }
    for step, (name, content) in enumerate(files.items()):
        torch.save(content, tmp_path / name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(tmp_path / name, tmp_path / "run", step)
        assert [("holds args" in str(each.message)) for each in caught if "left out" in str(each.message)] == (
            [True] if name == "plain" else []
        )
        assert assert_like(tmp_path / "run", model, optimizer) == {"epoch": 3, "best": (0.5, None)}, name


def test_other_keys_can_be_named(tmp_path: Path) -> None:
    model, optimizer = trained()
    torch.save({"a": {"net": model.state_dict()}, "b": optimizer.state_dict()}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"has the keys a, b, none of which is known .* --model-key"):
        load(tmp_path / "file", tmp_path / "run", 0)
    with pytest.raises(ValueError, match=r"has no key 'a.model'; it has a, b"):
        load(tmp_path / "file", tmp_path / "run", 0, model_key="a.model", optimizer_key="b")
    load(tmp_path / "file", tmp_path / "run", 0, model_key="a.net", optimizer_key="b")
    torch.save({"a": {"net": model.state_dict(), "b": optimizer.state_dict()}}, tmp_path / "file")
    load(tmp_path / "file", tmp_path / "run", 1, model_key="a.net", optimizer_key="a.b")
    for step in (0, 1):
        shutil.copytree(tmp_path / "run" / f"step-{step:09d}", tmp_path / str(step) / f"step-{step:09d}")
        assert assert_like(tmp_path / str(step), model, optimizer) is None


def test_a_model_beside_the_optimizer_is_known_by_the_optimizers_names(tmp_path: Path) -> None:
    """As torchtitan saves with DCP."""
    model, optimizer = trained()
    _, state = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    dcp.save({**model.state_dict(), "optimizer": state, "train_state": {"step": 3}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    load(tmp_path / "dcp", tmp_path / "run", 3)
    assert assert_like(tmp_path / "run", model, optimizer) == {"train_state": {"step": 3}}


def test_a_bare_model_is_imported_and_a_tied_parameter_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.BatchNorm1d(3), nn.Linear(3, 7, bias=False))
    model[2].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    load(tmp_path / "bare.pt", tmp_path / "run", 0)
    other = nn.Sequential(nn.Embedding(7, 3), nn.BatchNorm1d(3), nn.Linear(3, 7, bias=False))
    other[2].weight = other[0].weight
    checkpoint.load(tmp_path / "run", model=other)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    assert "model/2.weight" not in checkpoint.describe(tmp_path / "run").tensors


# --------------------------------------------------------------------------------------------------------------------- names


def test_numbered_parameters_get_the_models_names_only_if_the_order_is_certain(tmp_path: Path) -> None:
    """Three layers of which two have the same shapes: in another order they would change places."""
    model, optimizer = trained()
    halves = trained(lambda params, lr: torch.optim.AdamW([{"params": part} for part in zip(*[iter(params)] * 3, strict=True)], lr=lr))[1]
    backwards = trained(lambda params, lr: torch.optim.AdamW(list(params)[::-1], lr=lr))[1]
    with_buffer = {**model.state_dict(), "buffer": torch.zeros(3)}
    cases = {
        r"numbers the parameters of 2 param groups without names; give the names": (model.state_dict(), halves.state_dict()),
        r"not in the model's order: exp_avg of number 0 has shape \(3,\), '0.weight' \(3, 5\)": (
            model.state_dict(),
            backwards.state_dict(),
        ),
        r"numbers 6 parameters of the optimizer without names, and its model has 7 tensors": (with_buffer, optimizer.state_dict()),
    }
    for message, (m, o) in cases.items():
        torch.save({"model": m, "optimizer": o}, tmp_path / "file")
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "file", tmp_path / "run", 0)
    torch.save({"model": model.state_dict(), "optimizer": backwards.state_dict()}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"2 parameter names were given, and the optimizer's state .* has 6"):
        load(tmp_path / "file", tmp_path / "run", 0, param_names=["a", "b"])
    with pytest.raises(ValueError, match="the optimizer has a parameter 'z', and the model has not"):
        load(tmp_path / "file", tmp_path / "run", 0, param_names=["z", *list(model.state_dict())[1:]])
    assert not (tmp_path / "run").exists()
    load(tmp_path / "file", tmp_path / "run", 0, param_names=list(model.state_dict())[::-1])
    assert checkpoint.steps(tmp_path / "run") == [0]


def test_names_in_the_param_groups_are_used(tmp_path: Path) -> None:
    """As torch writes them of an optimizer that was built with named_parameters()."""
    model, optimizer = trained()
    named = list(model.named_parameters())
    theirs = torch.optim.AdamW([{"params": named[3:]}, {"params": named[:3]}], lr=1e-2)
    theirs.load_state_dict({**theirs.state_dict()})
    for _, param in named:
        theirs.state[param] = optimizer.state[param]
    torch.save({"model": model.state_dict(), "optimizer": theirs.state_dict()}, tmp_path / "file")
    load(tmp_path / "file", tmp_path / "run", 0)
    assert_like(tmp_path / "run", model, optimizer)


# ------------------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize(
    ("theirs", "options", "message"),
    [
        (torch.optim.RAdam, {}, "from an optimizer of torch that is not continued here"),
        (torch.optim.AdamW, {"maximize": True}, "maximize=True, which is not continued here"),
        (torch.optim.AdamW, {"amsgrad": True}, None),
        (torch.optim.Rprop, {}, "from an optimizer of torch that is not continued here"),
    ],
)
def test_state_that_no_optimizer_of_ours_continues_is_refused(
    theirs: type, options: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    model, optimizer = trained(theirs, **options)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "file")
    if message is None:
        load(tmp_path / "file", tmp_path / "run", 0)
        assert checkpoint.describe(tmp_path / "run").parameters.optimizer == "DecoupledAdamW"
        message = r"amsgrad=True, which AdamW does not support; choose the optimizer that continues it"
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "file", tmp_path / "run", 1, optimizer="AdamW")
        return
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "file", tmp_path / "run", 0)


@pytest.mark.parametrize(
    ("theirs", "options", "name", "form"),
    [
        (torch.optim.Adam, {"weight_decay": 0.1}, "Adam", "l2"),
        (torch.optim.AdamW, {}, "AdamW", "coupled"),
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, "DecoupledSGDW", "l2"),
        (composer.DecoupledAdamW, {"weight_decay": 1e-5}, "DecoupledAdamW", "decoupled"),
        (partial(optimi.AdamW, foreach=False, triton=False), {}, "AdamW", "coupled"),
        (partial(optimi.StableAdamW, foreach=False, triton=False), {}, "StableAdamW", "coupled"),
        (so.DecoupledAdamW, {}, "DecoupledAdamW", "decoupled"),
        (so.Adam, {"weight_decay": 0.1}, "Adam", "l2"),
    ],
)
def test_the_nearest_optimizer_is_chosen(theirs: Callable[..., Any], options: dict[str, Any], name: str, form: str, tmp_path: Path) -> None:
    model, optimizer = trained(theirs, **options)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "file")
    load(tmp_path / "file", tmp_path / "run", 0, decay_form="decoupled" if theirs is composer.DecoupledAdamW else None)
    parameters = checkpoint.describe(tmp_path / "run").parameters
    assert (parameters.optimizer, parameters.groups[0]["decay_form"]) == (name, form)


@pytest.mark.parametrize("decay_form", [None, "l2"])
def test_deepspeeds_own_adams_are_continued(decay_form: str | None, tmp_path: Path) -> None:
    """FusedAdam counts by param group, DeepSpeedCPUAdam by parameter; neither says how it decays."""
    model, optimizer = trained()
    for step, counts_by_group in enumerate((True, False)):
        state_dict = copy.deepcopy(optimizer.state_dict())
        (group,) = state_dict["param_groups"]
        kept = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "params")}
        state_dict["param_groups"] = [{**kept, "bias_correction": True, "amsgrad": False} | ({"step": 3} if counts_by_group else {})]
        for state in state_dict["state"].values():
            state["step"] = 3
            if counts_by_group:
                del state["step"]
        torch.save({"model": model.state_dict(), "optimizer": state_dict}, tmp_path / "file")
        load(tmp_path / "file", tmp_path / "run", step, decay_form=decay_form)
        parameters = checkpoint.describe(tmp_path / "run", step).parameters
        assert set(parameters.steps.values()) == {3.0}
        assert parameters.groups[0]["decay_form"] == (decay_form or "coupled")
        assert "bias_correction" not in parameters.groups[0]
        assert parameters.optimizer == ("AdamW" if decay_form is None else "Adam")
        if decay_form is None:
            assert_like(tmp_path / "run", model, optimizer)
    state_dict["param_groups"][0]["bias_correction"] = False
    torch.save({"model": model.state_dict(), "optimizer": state_dict}, tmp_path / "file")
    with pytest.raises(ValueError, match="bias_correction=False, which is not continued here"):
        load(tmp_path / "file", tmp_path / "run", 9)


# --------------------------------------------------------------------------------------------------------------------- pickles


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


class Evaluated(Bomb):
    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').mkdir({self.path!r})",)


@pytest.mark.parametrize("bomb", [Bomb, Evaluated])
def test_code_in_a_pickle_is_not_run(bomb: type, tmp_path: Path) -> None:
    """In every file of every format that is read."""
    model, optimizer = trained()
    trap = bomb(tmp_path / "boom")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "extra": trap}, tmp_path / "file.pt")
    sources = [tmp_path / "file.pt"]
    dcp.save({"model": model.state_dict(), "trap": trap}, checkpoint_id=tmp_path / "item", no_dist=True)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "metadata", no_dist=True)
    (tmp_path / "metadata" / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": trap}))
    sources += [tmp_path / "item", tmp_path / "metadata"]
    for name, states in {"zero": {"module": {}}, "model": {"module": trap}}.items():
        (tmp_path / name / "zero").mkdir(parents=True)
        torch.save({"param_shapes": [], **states}, tmp_path / name / "mp_rank_00_model_states.pt")
        torch.save({"param_groups": trap}, tmp_path / name / "zero" / "optimizer_state.pt")
        shutil.copytree(tmp_path / name, tmp_path / f"rigid {name}")
        shutil.rmtree(tmp_path / f"rigid {name}" / "zero")
        torch.save({"optimizer_state_dict": trap}, tmp_path / f"rigid {name}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        sources += [tmp_path / name, tmp_path / f"rigid {name}"]
    for source in sources:
        with pytest.raises(ValueError, match=r"(posix.mkdir|eval|nt.mkdir).*might run code, and is not loaded"):
            load(source, tmp_path / "run", 0)
        assert not (tmp_path / "boom").exists(), source
    assert not (tmp_path / "run").exists()
    pickle.loads(pickle.dumps(trap))
    assert (tmp_path / "boom").exists(), "the trap works"


def test_pickled_formats_are_refused_without_unpickle(tmp_path: Path) -> None:
    model, _ = trained()
    torch.save(model.state_dict(), tmp_path / "file.pt")
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "rigid").mkdir()
    (tmp_path / "universal" / "zero").mkdir(parents=True)
    torch.save({}, tmp_path / "rigid" / "mp_rank_00_model_states.pt")
    for name, source_format in {"file.pt": "torch", "dcp": "dcp", "rigid": "deepspeed", "universal": "universal"}.items():
        with pytest.raises(checkpoint.CheckpointError, match=f"is read as {source_format}, whose files are pickled.*--unpickle"):
            checkpoint.import_from(tmp_path / name, tmp_path / "run", 0)
    assert not (tmp_path / "run").exists()


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"model": trained()[0].state_dict()}, tmp_path / "cut")
    content = (tmp_path / "cut").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    for name, message in {"text": "cannot be loaded", "list": "holds a list", "cut": "cannot be loaded"}.items():
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name, tmp_path / "run", 0)


# ------------------------------------------------------------------------------------------------------------------------- DCP


def save_dcp(folder: str) -> None:
    """Two ranks: torch's AdamW under FSDP2, nested and flat, and our ShardedOptimizer."""
    model = Model(AWKWARD)
    fully_shard(model)
    optimizer = torch.optim.AdamW(two_groups(model), lr=1e-2)
    plain = Model(AWKWARD)
    sharded = so.ShardedOptimizer(two_groups(plain), so.AdamW, lr=1e-2, weight_decay=0.1)
    for step in range(1, SAVED + 1):
        for each, its in ((model, optimizer), (plain, sharded)):
            each(gradients(step, AWKWARD, rank=dist.get_rank(), world_size=2)).backward()
            its.step()
            its.zero_grad()
    for name, each, its in (("nested", model, optimizer), ("flat", model, optimizer), ("zero", plain, sharded)):
        options = StateDictOptions(flatten_optimizer_state_dict=name == "flat")
        state, optimizer_state = get_state_dict(each, its, options=options)
        content = {"model": state, "optimizer": optimizer_state, "epoch": 2, "sampler": {"seeds": [1, {"a": 0.1}]}}
        dcp.save(content, checkpoint_id=f"{folder}/{name}")


def test_a_folder_of_dcp_is_imported_whole(tmp_path: Path) -> None:
    ranks.run(save_dcp, 2, str(tmp_path))
    for wrapper, theirs in {
        "nested": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        "flat": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        "zero": lambda groups: so.AdamW(groups, lr=1e-2, weight_decay=0.1),
    }.items():
        load(tmp_path / wrapper, tmp_path / "run" / wrapper, 10)
        expected = Model(AWKWARD)
        optimizer = theirs(two_groups(expected))
        for step in range(1, SAVED + 1):
            for param, grad in zip(expected.parameters(), gradients(step, AWKWARD), strict=True):
                param.grad = grad
            optimizer.step()
        model = Model(AWKWARD, seed=5)
        ours = so.AdamW(two_groups(model), **OURS)
        assert checkpoint.load(tmp_path / "run" / wrapper, model=model, optimizer=ours) == {
            "epoch": 2,
            "sampler": {"seeds": [1, {"a": 0.1}]},
        }
        groups = ours.param_groups
        assert [group["weight_decay"] for group in groups] == [group["weight_decay"] for group in optimizer.param_groups], wrapper
        assert [group["lr"] for group in groups] == [group["lr"] for group in optimizer.param_groups]
        continued = Model(AWKWARD)
        continued.load_state_dict(expected.state_dict())
        reference = so.AdamW(two_groups(continued), **OURS)
        reference.load_state_dict(optimizer.state_dict())
        for mine, its in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(mine, its), wrapper
            assert_same(in_order(ours.state[mine]), in_order(optimizer.state[its]))
        for each, its in ((model, ours), (continued, reference)):
            for param, grad in zip(each.parameters(), gradients(SAVED + 1, AWKWARD), strict=True):
                param.grad = grad
            its.step()
        assert_same(dict(model.state_dict()), dict(continued.state_dict()))
    metadata = (tmp_path / "flat" / ".metadata").read_bytes()
    (tmp_path / "flat" / ".metadata").write_bytes(metadata.replace(b"__1_0.distcp", b"../10.distcp"))
    with pytest.raises(ValueError, match=r"names a file outside of the folder: '../10.distcp'"):
        load(tmp_path / "flat", tmp_path / "run" / "flat", 11)
    (lost,) = (tmp_path / "zero").glob("__1_0.distcp")
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=r"__1_0.distcp"):
        load(tmp_path / "zero", tmp_path / "run" / "zero", 11)


def test_dcp_keeps_tensors_without_dimensions_or_elements(tmp_path: Path) -> None:
    model = Model((*AWKWARD, ((),), ((0, 5),)))
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    load(tmp_path / "dcp", tmp_path / "run", 0)
    other = Model((*AWKWARD, ((),), ((0, 5),)), seed=5)
    assert checkpoint.load(tmp_path / "run", model=other) is None
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


# ----------------------------------------------------------------------------------------------------------------- safetensors


def save_hugging_face(folder: str) -> None:
    """Two ranks, FSDP2, in parts."""
    model = Model(AWKWARD)
    fully_shard(model)
    dcp.save(model.state_dict(), storage_writer=dcp.HuggingFaceStorageWriter(f"{folder}/parts", save_distributed=True))


def test_safetensors_need_no_unpickling_and_chunks_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported, one file and several, and DCP's Hugging Face storage."""
    ranks.run(save_hugging_face, 2, str(tmp_path))
    parts = tmp_path / "parts"
    expected = Model(AWKWARD)
    checkpoint.save(tmp_path / "ours", 0, model=expected)
    checkpoint.export_safetensors(tmp_path / "ours", tmp_path / "one")
    monkeypatch.setattr(export, "FILE_BYTES", 2500)
    checkpoint.export_safetensors(tmp_path / "ours", tmp_path / "several")
    for step, source in enumerate(("parts", "one", "several", "one/model.safetensors")):
        checkpoint.import_from(tmp_path / source, tmp_path / "run", step)
        model = Model(AWKWARD, seed=5)
        checkpoint.load(tmp_path / "run", model=model, step=step)
        assert_same(dict(model.state_dict()), dict(expected.state_dict()))
    checkpoint.import_from(tmp_path / "one", tmp_path / "run", 9, model_key="layers.0")
    assert sorted(checkpoint.describe(tmp_path / "run", 9).tensors) == ["model/bias", "model/weight"]
    sorted(parts.rglob("*.safetensors"))[0].unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"do not tile it|is missing|does not fit|is in none of the files"):
        checkpoint.import_from(parts, tmp_path / "run", 10)
    second = sorted((tmp_path / "several").glob("model-00002-*"))[0]
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"{second.name} is missing"):
        checkpoint.import_from(tmp_path / "several", tmp_path / "run", 10)


# ------------------------------------------------------------------------------------------------------------------- DeepSpeed


def save_deepspeed(folder: str) -> None:
    """Two ranks; stages 0 to 3, of which some are converted to Universal, and stage 3 with a frozen parameter and a buffer."""
    from deepspeed.checkpoint import ds_to_universal

    for label in DEEPSPEED:
        path = f"{folder}/{label}"
        engine = torchs_engine() if label == TORCHS else engine_of(label)
        deepspeed_models.train(engine, 1, 3)
        engine.save_checkpoint(path, tag="saved", client_state={"epoch": 2})
        engine.destroy()
        dist.barrier()
        if dist.get_rank() == 0 and label in CONVERTED:
            folders = {"input_folder": f"{path}/saved", "output_folder": f"{path}/universal", "keep_temp_folder": False}
            workers = {"num_extract_workers": 1, "num_merge_workers": 1}
            ds_to_universal.main(argparse.Namespace(**folders, **workers, strict=True, inject_missing_state=True))
        dist.barrier()


class PartlyFrozen(Model):
    def __init__(self) -> None:
        super().__init__(AWKWARD)
        self.layers[3].weight.requires_grad_(False)
        self.register_buffer("count", torch.tensor([7.0, 8.0, 9.0]))


def torchs_engine() -> Any:
    """Stage 3 with torch's own AdamW, as DeepSpeed takes it."""
    import deepspeed

    model = PartlyFrozen()
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    config = deepspeed_models.config_of(3, torch.bfloat16, top={"zero_allow_untested_optimizer": True})
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


TORCHS = "stage 3 torch"
DEEPSPEED = ("stage 0 bf16", "stage 1", "stage 2 round robin", "stage 3 sub-groups", TORCHS)
CONVERTED = ("stage 1", "stage 3 sub-groups")


def check_deepspeed(label: str, source: Path, root: Path) -> None:
    load(source, root, 3)
    optimizer, _, _, _, groups = CELLS[label]
    before, after = (unsharded(MAKERS[optimizer], steps, AWKWARD, groups=groups) for steps in (3, 4))
    model = Model(AWKWARD, seed=5)
    ours = getattr(so, optimizer)(groups(model), **OURS)
    extra = checkpoint.load(root, model=model, optimizer=ours)
    assert (extra["epoch"], extra["global_steps"]) == (2, 3)
    for name, param in model.named_parameters():
        assert torch.equal(param, before.params[name]), (label, name)
        assert_same(in_order(ours.state[param]), in_order(before.state[name]))
    for param, grad in zip(model.parameters(), gradients(4, AWKWARD), strict=True):
        param.grad = grad
    ours.step()
    for name, param in model.named_parameters():
        assert torch.equal(param, after.params[name]), (label, name)
    rounded = Model(AWKWARD, seed=5).bfloat16()
    checkpoint.load(root, model=rounded)
    for name, param in rounded.named_parameters():
        assert torch.equal(param, before.params[name].bfloat16()), (label, name)


def check_torchs(source: Path, root: Path) -> None:
    """Frozen parameters and buffers are in stage 3's files too."""
    load(source, root, 3, source_format="deepspeed")
    model = PartlyFrozen()
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    for step in range(1, 4):
        for param, grad in zip(model.parameters(), gradients(step, AWKWARD), strict=True):
            param.grad = grad
        optimizer.step()
    other = PartlyFrozen().float()
    other.layers[3].weight.detach().zero_()
    other.count.zero_()
    ours = so.AdamW([param for param in other.parameters() if param.requires_grad], **OURS)
    checkpoint.load(root, model=other, optimizer=ours, strict=False, lenient=("count", "layers.3.weight"))  # bf16 there
    assert other.count.tolist() == [7.0, 8.0, 9.0]
    for (name, mine), its in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, its.bfloat16().float() if name == "layers.3.weight" else its), name
        if its in optimizer.state:
            assert_same(in_order(ours.state[mine]), in_order(optimizer.state[its]))
    assert ours.param_groups[0]["decay_form"] == "coupled"


@NEEDS_DEEPSPEED[0]
@NEEDS_DEEPSPEED[1]
@pytest.mark.filterwarnings("ignore")
def test_deepspeeds_ordinary_and_universal_folders_are_imported(tmp_path: Path) -> None:
    """What the float32 masters are after 3 steps, and the step after that, is what one process without DeepSpeed has."""
    deepspeed_models.run(save_deepspeed, 2, str(tmp_path), timeout=200)
    for label in DEEPSPEED[:-1]:
        check_deepspeed(label, tmp_path / label / "saved", tmp_path / "run" / label)
    for label in CONVERTED:
        check_deepspeed(label, tmp_path / label / "universal", tmp_path / "universal" / label)
    with pytest.raises(ValueError, match="a `latest_universal` and a `latest`, of which either may be the older"):
        load(tmp_path / "stage 1", tmp_path / "run" / "stage 1", 4)
    load(tmp_path / "stage 1", tmp_path / "universal" / "stage 1", 4, source_format="universal")
    check_torchs(tmp_path / TORCHS, tmp_path / "run" / TORCHS)  # through the file `latest`
    assert_lost_files_are_named(tmp_path)


def assert_lost_files_are_named(folder: Path) -> None:
    rank = folder / "stage 1" / "saved" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    rank.unlink()
    with pytest.raises(ValueError, match="was saved on 2 ranks and has the optimizer states of 1; files are lost"):
        load(rank.parent, folder / "run" / "stage 1", 4)
    (folder / "stage 1" / "saved" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").rename(rank)
    with pytest.raises(FileNotFoundError, match="not those of rank 0; files are lost"):
        load(rank.parent, folder / "run" / "stage 1", 4)
    values = folder / "stage 1" / "universal" / "zero" / "layers.3.bias" / "fp32.pt"
    values.unlink()
    with pytest.raises(FileNotFoundError, match=r"layers.3.bias.fp32.pt is missing"):
        load(folder / "stage 1" / "universal", folder / "universal" / "stage 1", 5)
    path = folder / "stage 2 round robin" / "saved" / "mp_rank_00_model_states.pt"
    states: dict[str, Any] = torch.load(path, weights_only=True)
    states["module"]["layers.2.weight"] += 1
    torch.save(states, path)
    with pytest.raises(ValueError, match=r"float32 values of 'layers.2.weight' are not those"):
        load(path.parent, folder / "run" / "stage 2 round robin", 4)


def test_tensors_of_other_parallelism_are_refused(tmp_path: Path) -> None:
    states: dict[str, Tensor | dict[str, Tensor]] = {"module": {}}
    for name, message in {
        "mp_rank_01_model_states.pt": "tensor parallelism; convert",
        "layer_01-model_00-model_states.pt": "pipeline or expert parallelism",
        "layer_0_expert_0_mp_rank_00_model_states.pt": "pipeline or expert parallelism",
    }.items():
        folder = tmp_path / name.removesuffix(".pt")
        folder.mkdir()
        torch.save(states, folder / "mp_rank_00_model_states.pt")
        torch.save(states, folder / name)
        with pytest.raises(ValueError, match=message):
            load(folder, tmp_path / "run", 0)
