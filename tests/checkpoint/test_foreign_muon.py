"""State of other libraries' Muon continues in ours: torch's, dion's and DeepSpeed's, as state dicts and as checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import deepspeed_models
import pytest
import torch
import torch.distributed as dist
from deepspeed_models import NEEDS_DEEPSPEED, config_of, model, train, whole
from torch import Tensor, nn

import sharded_optim as so
from sharded_optim import checkpoint

SHAPES = ((20, 12), (12, 20), (9,))  # in the order in which DeepSpeed sorts them
MU = 0.95


def values(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * (30.0 if seed == 3 else 1.0) for shape in SHAPES]


def ours(**options: Any) -> so.Muon:
    """Two matrices, and a vector that AdamW steps."""
    params = list(map(nn.Parameter, values(0)))
    return so.Muon([{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}], **{"lr": 0.02, **options})


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def step(optimizer: torch.optim.Optimizer, *steps: int) -> None:
    for number in steps:
        for param, grad in zip(params_of(optimizer), values(number), strict=True):
            param.grad = grad
        optimizer.step()


def dions_state_dict(optimizer: so.Muon, momentums: list[Tensor], **options: Any) -> dict[str, Any]:
    """What dion has after the same steps: its momentum is a sum, and it counts steps by group."""
    common = {"lr": 0.02, "mu": MU, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "cautious_wd": False, "step": 3, "epsilon": 1e-8}
    common |= {"nesterov": True, "flatten": False, "adjust_lr": "spectral_norm", **options}
    matrices, (vector,) = params_of(optimizer)[:2], params_of(optimizer)[2:]
    adam = optimizer.state[vector]
    state = {number: {"momentum": momentum} for number, momentum in enumerate(momentums)}
    state[2] = {"momentum": adam["exp_avg"].clone(), "variance": adam["exp_avg_sq"].clone(), "step_dev": torch.tensor(3.0)}
    groups = [{**common, "algorithm": "muon", "params": [0, 1]}, {**common, "algorithm": "adamw", "params": [2]}]
    assert len(matrices) == len(momentums)
    return {"state": state, "param_groups": groups}


def test_dions_state_continues() -> None:
    """Its momentum is ours divided by 1 - mu, in a sum that is computed here."""
    optimizer = ours(adjust_lr_fn="spectral_norm", eps=1e-8)
    momentums = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES[:2]]
    for number in (1, 2, 3):
        step(optimizer, number)
        for momentum, grad in zip(momentums, values(number), strict=False):
            momentum.mul_(MU).add_(grad.double())
    taken = ours(lr=0.5, momentum=0.5, betas=(0.3, 0.6), weight_decay=0.7)
    with torch.no_grad():
        for param, other in zip(params_of(taken), params_of(optimizer), strict=True):
            param.copy_(other)
    taken.load_state_dict(dions_state_dict(optimizer, [momentum.float() for momentum in momentums]))
    step(optimizer, 4, 5, 6)
    step(taken, 4, 5, 6)
    for number, (param, other) in enumerate(zip(params_of(taken), params_of(optimizer), strict=True)):
        torch.testing.assert_close(param, other, rtol=0.0, atol=2e-3 if number < 2 else 1e-6)
        assert taken.state[param]["step"] == 6
    for param, other in zip(params_of(taken)[:2], params_of(optimizer)[:2], strict=True):
        torch.testing.assert_close(taken.state[param]["momentum_buffer"], optimizer.state[other]["momentum_buffer"])


def tagged(state_dict: dict[str, Any]) -> dict[str, Any]:
    """With the tag that users give param groups, as Keller Jordan's Muon wants them."""
    groups = [{**group, "use_muon": number == 0} for number, group in enumerate(state_dict["param_groups"])]
    return {**copy.deepcopy(state_dict), "param_groups": groups}


def test_a_tag_of_the_users_does_not_make_our_state_anothers() -> None:
    optimizer = ours(adjust_lr_fn="match_rms_adamw", nesterov=False, decay_form="decoupled", weight_decay=1e-4)
    step(optimizer, 1)
    taken = ours()
    taken.load_state_dict(tagged(optimizer.state_dict()))
    group = taken.param_groups[0]
    assert (group["adjust_lr_fn"], group["nesterov"], group["decay_form"]) == ("match_rms_adamw", False, "decoupled")


def test_a_tag_of_the_users_does_not_make_torchs_state_anothers() -> None:
    params = [nn.Parameter(values(0)[0])]
    optimizer = torch.optim.Muon(params, nesterov=False, adjust_lr_fn="match_rms_adamw")
    params[0].grad = values(1)[0]
    optimizer.step()
    taken = so.Muon([nn.Parameter(values(0)[0])])
    taken.load_state_dict(tagged(optimizer.state_dict()))
    assert (taken.param_groups[0]["adjust_lr_fn"], taken.param_groups[0]["nesterov"]) == ("match_rms_adamw", False)
    adam = torch.optim.AdamW([nn.Parameter(values(0)[0])], weight_decay=0.3)
    loaded = so.AdamW([nn.Parameter(values(0)[0])])
    loaded.load_state_dict(tagged(adam.state_dict()))
    assert (loaded.param_groups[0]["weight_decay"], loaded.param_groups[0]["decay_form"]) == (0.3, "coupled")


def test_groups_with_further_options_are_not_taken_for_deepspeeds() -> None:
    """As other libraries' Muon with other defaults: nesterov, steps, scale."""
    optimizer = ours()
    step(optimizer, 1)
    state_dict = optimizer.state_dict()
    group = {"params": [0, 1], "use_muon": True, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": False, "ns_steps": 7}
    adam = {"params": [2], "use_muon": False, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    without_steps = {number: {key: value for key, value in state.items() if key != "step"} for number, state in state_dict["state"].items()}
    with pytest.raises(ValueError, match="'step'"):
        ours().load_state_dict({"state": without_steps, "param_groups": [group, adam]})


@pytest.mark.parametrize("whose", ["dion", "DeepSpeed"])
def test_convolutions_that_are_other_matrices_there_are_refused(whose: str) -> None:
    param = nn.Parameter(torch.ones(4, 3, 2, 2))
    common = {"lr": 0.1, "weight_decay": 0.1, "params": [0]}
    group = {**common, "use_muon": True, "momentum": MU}
    if whose == "dion":
        group = {**common, "algorithm": "muon", "mu": MU, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "cautious_wd": False, "step": 1}
        group |= {"nesterov": True, "flatten": False, "adjust_lr": "rms_norm"}
    name = "momentum" if whose == "dion" else "momentum_buffer"
    with pytest.raises(ValueError, match=f"from {whose}.*more than three dimensions"):
        so.Muon([param]).load_state_dict({"state": {0: {name: torch.zeros_like(param)}}, "param_groups": [group]})


@pytest.mark.parametrize("options", [{"cautious_wd": True}, {"adjust_lr": None}, {"num_heads": 4}])
def test_what_dion_does_that_we_do_not_is_refused(options: dict[str, Any]) -> None:
    optimizer = ours()
    step(optimizer, 1)
    (name,) = options
    with pytest.raises(ValueError, match=f"is from dion, with {name}=.* which is not continued here"):
        optimizer.load_state_dict(dions_state_dict(optimizer, [torch.zeros(shape) for shape in SHAPES[:2]], **options))


def test_dions_lion_is_refused() -> None:
    optimizer = ours()
    step(optimizer, 1)
    state_dict = dions_state_dict(optimizer, [torch.zeros(shape) for shape in SHAPES[:2]])
    state_dict["param_groups"][1]["algorithm"] = "lion"
    with pytest.raises(ValueError, match="algorithm='lion'"):
        optimizer.load_state_dict(state_dict)


def test_a_file_of_torchs_muon_continues_as_its_state_dict_does(tmp_path: Path) -> None:
    params = [nn.Parameter(values(0)[0])]
    optimizer = torch.optim.Muon(params, lr=0.02, adjust_lr_fn="match_rms_adamw")
    for number in (1, 2, 3):
        params[0].grad = values(number)[0]
        optimizer.step()
    module = nn.Module()
    module.weight = params[0]
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "theirs.pt")
    checkpoint.import_from(tmp_path / "theirs.pt", tmp_path / "run", 3, unpickle=True, param_names=["weight"])
    found, expected = ([nn.Parameter(params[0].detach().clone())] for _ in range(2))
    taken, loaded = (so.Muon(each, lr=0.5) for each in (found, expected))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    module.weight = found[0]
    checkpoint.load(tmp_path / "run", model=module, optimizer=taken)
    assert (taken.param_groups[0]["lr"], taken.param_groups[0]["adjust_lr_fn"]) == (0.02, "match_rms_adamw")
    for each in (found, expected):
        each[0].grad = values(4)[0]
    taken.step()
    loaded.step()
    assert torch.equal(found[0], expected[0])


# ----------------------------------------------------------------------------------------------------------------------- DeepSpeed


@pytest.mark.skipif(NEEDS_DEEPSPEED[0].args[0], reason="deepspeed is not installed (the extra `deepspeed`)")
def test_deepspeeds_state_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon for a part of the parameters, its own AdamW for the rest, as MuonWithAuxAdam in one process."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    torch.compiler.set_stance("force_eager")
    try:
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

        params = list(map(nn.Parameter, values(0)))
        muon = {"params": params[:2], "use_muon": True, "lr": 0.02, "weight_decay": 0.1, "ns_method": "standard"}
        theirs = MuonWithAuxAdam([muon, {"params": params[2:], "use_muon": False}])
        step(theirs, 1, 2, 3)
        taken = ours(lr=0.5, momentum=0.5)
        with torch.no_grad():
            for param, other in zip(params_of(taken), params_of(theirs), strict=True):
                param.copy_(other)
        taken.load_state_dict(theirs.state_dict())
        for optimizer in (theirs, taken):
            step(optimizer, 4, 5, 6)
    finally:
        torch.compiler.set_stance("default")
    for param, other in zip(params_of(taken), params_of(theirs), strict=True):
        torch.testing.assert_close(param, other, rtol=0.0, atol=2e-3)


MATRICES = [name for name, param in model().named_parameters() if param.ndim > 1]


def save_deepspeeds(folder: str) -> None:
    """Checkpoints of DeepSpeed's Muon and of ours, as DeepSpeed saves them, with what they hold as whole tensors."""
    import deepspeed

    torch.compiler.set_stance("force_eager")
    theirs = {"optimizer": {"type": "Muon", "params": {"lr": 0.02, "momentum": MU, "ns_method": "standard"}}}
    for stage in (2, 3):
        for whose in ("ours", "theirs"):
            module = model()
            if whose == "ours":
                optimizer = so.Muon(so.muon_param_groups(module), lr=0.02)
                engine, *_ = so.deepspeed.initialize(model=module, optimizer=optimizer, config=config_of(stage))
            else:
                engine, *_ = deepspeed.initialize(model=module, config=config_of(stage, reduce_scatter=False, top=theirs))
            train(engine, 1, 3)
            path = str(Path(folder) / f"{whose}{stage}")
            engine.save_checkpoint(path, tag="saved")
            held = {"params": whole(engine)}
            if stage == 3 or whose == "ours":  # in stage 2 DeepSpeed's own has buffers of other sizes on each rank
                held["momentum_buffer"] = whole(engine, "momentum_buffer", lambda name: name in MATRICES)
            if dist.get_rank() == 0:
                torch.save(held, f"{path}.pt")
            engine.destroy()


@pytest.mark.skipif(NEEDS_DEEPSPEED[0].args[0], reason="deepspeed is not installed (the extra `deepspeed`)")
@pytest.mark.timeout(400)
def test_deepspeeds_checkpoints_of_its_muon_and_of_ours_are_imported(tmp_path: Path) -> None:
    deepspeed_models.run(save_deepspeeds, 2, str(tmp_path), timeout=200.0)
    momentums = {}
    for name in ("ours2", "theirs2", "ours3", "theirs3"):
        checkpoint.import_from(tmp_path / name, tmp_path / f"{name}-run", 3, unpickle=True)
        module = model()
        optimizer = so.Muon(so.muon_param_groups(module), lr=0.5)
        checkpoint.load(tmp_path / f"{name}-run", model=module, optimizer=optimizer)
        held = torch.load(tmp_path / f"{name}.pt")
        params = dict(module.named_parameters())
        for key, param in params.items():
            assert torch.equal(param, held["params"][key]), f"{name} {key}"
        momentums[name] = {key: optimizer.state[params[key]]["momentum_buffer"] for key in MATRICES}
        for key, momentum in held.get("momentum_buffer", {}).items():
            assert torch.equal(momentums[name][key], momentum), f"{name} momentum of {key}"
        assert {group["lr"] for group in optimizer.param_groups} == {0.02}
    for key in MATRICES:
        torch.testing.assert_close(momentums["theirs2"][key], momentums["theirs3"][key])
