"""The public functions: save, async_save, load, prune, and their errors. Damage and crashes are in other files."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import sharded_optim as so
from sharded_optim.checkpoint import CheckpointError, MismatchError
from sharded_optim.checkpoint.local_store import LocalStore
from sharded_optim.checkpoint.manifest import CHUNK_BYTES
from sharded_optim.checkpoint.url_store import UrlStore

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")


class Net(nn.Module):
    """Buffers of several dtypes, a tied weight, an empty parameter and a scalar, a frozen one, and one that gets no gradient."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(2, 3))
        self.register_buffer("counts", torch.randint(0, 9, (3,)))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens))) * self.scale


STABLE = partial(so.StableAdamW, lr=1e-2)


def trained(steps: int = 3, seed: int = 0, make: Any = STABLE, **sizes: int) -> tuple[Net, Any]:
    torch.manual_seed(seed)
    model = Net(**sizes)
    optimizer = make([param for param in model.parameters() if param.requires_grad])
    for step in range(steps):
        train(model, optimizer, step)
    return model, optimizer


def train(model: nn.Module, optimizer: Any, step: int) -> None:
    torch.manual_seed(1000 + step)
    model(torch.randint(0, 11, (8,))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_same(model: nn.Module, optimizer: Any, other: nn.Module, other_optimizer: Any) -> None:
    scratch = {"scratch"}
    for (name, value), (_, expected) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert name in scratch or torch.equal(value, expected), name
    for (name, param), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        state, reference = optimizer.state.get(param, {}), other_optimizer.state.get(expected, {})
        assert state.keys() == reference.keys(), name
        for key, value in state.items():
            assert value.dtype == reference[key].dtype, (name, key)
            assert torch.equal(value, reference[key]), (name, key)


# ------------------------------------------------------------------------------------------------------------------ what is saved


@pytest.mark.parametrize("url", ["folder", "file://", "memory://"])
def test_a_loaded_run_continues_with_the_same_bits(url: str, tmp_path: Path) -> None:
    """Into a model and an optimizer that have other values, and state where the checkpoint has none."""
    root = {"folder": str(tmp_path / "deep" / "er"), "file://": f"file://{tmp_path}/x", "memory://": f"memory://{tmp_path.name}/run"}[url]
    model, optimizer = trained()
    so.checkpoint.save(root, 3, model=model, optimizer=optimizer)
    other, other_optimizer = trained(steps=1, seed=9)
    for param in other.parameters():
        if param.requires_grad:
            param.grad = torch.ones_like(param)
    other_optimizer.step()  # also the unused one
    assert so.checkpoint.load(root, model=other, optimizer=other_optimizer) is None
    other_optimizer.zero_grad()
    assert_same(other, other_optimizer, model, optimizer)
    assert model.unused not in optimizer.state
    for step in (3, 4):
        train(model, optimizer, step)
        train(other, other_optimizer, step)
    assert_same(other, other_optimizer, model, optimizer)
    so.checkpoint.async_save(root, 5, model=model, optimizer=optimizer, keep=1).wait()
    assert so.checkpoint.steps(root) == [5]


def test_async_save_copies_values_at_the_call_and_reuses_its_buffer(tmp_path: Path) -> None:
    model, optimizer = trained()
    reference, reference_optimizer = trained()
    first = so.checkpoint.async_save(tmp_path, 3, model=model, optimizer=optimizer)
    train(model, optimizer, 3)
    buffer = so.checkpoint.background._buffer.data_ptr()
    second = so.checkpoint.async_save(tmp_path, 4, model=model, optimizer=optimizer)  # waits for the first
    assert first.done()
    assert so.checkpoint.background._buffer.data_ptr() == buffer
    second.wait()
    so.checkpoint.load(tmp_path, step=3, model=model, optimizer=optimizer)
    assert_same(model, optimizer, reference, reference_optimizer)


EXTRA = {
    "floats": [0.1, -0.0, 1e-310, math.inf, 1 / 3],
    "nested": ({"a": (1, (2,))}, None, True, "text \u2028 \U0001f600"),
    3: b"\x00\xff",
    "$marked": 1,
    (1, 2): {"big": 2**80},
}


def test_extra_is_restored_to_the_last_bit(tmp_path: Path) -> None:
    model, _ = trained(0)
    state = torch.get_rng_state()
    extra = EXTRA | {"rng": state, "empty": torch.empty(0, 2), "half": torch.tensor(0.1, dtype=torch.bfloat16), "nan": math.nan}
    so.checkpoint.save(tmp_path, 0, model=model, extra=extra)
    found = so.checkpoint.load(tmp_path, model=model)
    assert repr({key: found[key] for key in EXTRA}) == repr(EXTRA)
    assert torch.equal(found["rng"], state)
    assert (found["empty"].shape, found["half"].dtype, found["half"].item()) == ((0, 2), torch.bfloat16, extra["half"].item())
    assert math.isnan(found["nan"])
    with pytest.raises(CheckpointError, match=r"extra\['of'\]\[1\] is a builtins\.object, which a checkpoint cannot hold; .*state_dict"):
        so.checkpoint.save(tmp_path, 1, model=model, extra={"of": [1, object()]})
    with pytest.raises(CheckpointError, match=r"extra\['large'\] is a Tensor of \d+ bytes; .*make it a buffer"):
        so.checkpoint.save(tmp_path, 1, model=model, extra={"large": torch.zeros(2**19)})
    assert so.checkpoint.steps(tmp_path) == [0]


def test_a_schedule_continues_from_extra(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[Any, ...]:
        model, optimizer = trained(0, seed=seed)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-1, total_steps=9)

    model, optimizer, schedule = build(0)
    for step in range(4):
        train(model, optimizer, step)
        schedule.step()
    so.checkpoint.save(tmp_path, 4, model=model, optimizer=optimizer, extra=schedule.state_dict())
    other, other_optimizer, other_schedule = build(1)
    other_schedule.load_state_dict(so.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer))
    for step in range(4, 9):
        for each in ((model, optimizer, schedule), (other, other_optimizer, other_schedule)):
            train(each[0], each[1], step)
            each[2].step()
    assert_same(other, other_optimizer, model, optimizer)


def test_shard_files_are_safetensors_and_the_manifest_is_json(tmp_path: Path) -> None:
    model, optimizer = trained(width=300)
    so.checkpoint.save(tmp_path, 3, model=model, optimizer=optimizer)
    folder = tmp_path / "step-000000003"
    assert sorted(path.name for path in folder.iterdir()) == ["COMMITTED", "manifest.json", "shard-00000-of-00001.safetensors"]
    with safe_open(folder / "shard-00000-of-00001.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model/embedding.weight#0"), model.embedding.weight)
        assert torch.equal(file.get_tensor("exp_avg/embedding.weight#0"), optimizer.state[model.embedding.weight]["exp_avg"])
        assert torch.equal(file.get_tensor("model/counts#0"), model.counts)
        assert not any("scratch" in key or "head" in key for key in file.keys())  # noqa: SIM118  # it is no dict
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["version"] == [1, 0]
    assert manifest["parameters"]["steps"]["scale"] == 3.0


def test_names_are_those_of_the_model_without_wrappers(tmp_path: Path) -> None:
    """And without the model those that the optimizer was given, or positions."""
    model, _ = trained(0)
    optimizer = so.AdamW([("other name", model.scale)], lr=1e-3)
    model.scale.grad = torch.ones(())
    optimizer.step()
    so.checkpoint.save(tmp_path / "a", 0, model=torch.compile(model), optimizer=optimizer)
    assert {"exp_avg/scale", "model/scale", "model/norm.running_mean"} <= so.checkpoint.describe(tmp_path / "a").tensors.keys()
    so.checkpoint.save(tmp_path / "b", 0, optimizer=optimizer)
    assert so.checkpoint.describe(tmp_path / "b").tensors.keys() == {"exp_avg/other name", "exp_avg_sq/other name"}
    assert so.checkpoint.describe(tmp_path / "b") == so.checkpoint.describe(tmp_path / "b"), "manifests compare by value"
    model, optimizer = trained()
    so.checkpoint.save(tmp_path / "c", 0, optimizer=optimizer)
    assert "exp_avg/param_groups[0].params[0]" in so.checkpoint.describe(tmp_path / "c").tensors
    other, other_optimizer = trained(0)
    so.checkpoint.load(tmp_path / "c", optimizer=other_optimizer)
    assert torch.equal(other_optimizer.state[other.scale]["exp_avg_sq"], optimizer.state[model.scale]["exp_avg_sq"])


# ------------------------------------------------------------------------------------------------------------ what loading demands


def everything(model: nn.Module, optimizer: Any) -> tuple[Any, ...]:
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    state = {name: {k: v.clone() for k, v in optimizer.state.get(p, {}).items()} for name, p in model.named_parameters()}
    return {name: value.clone() for name, value in model.state_dict().items()}, state, groups


def test_all_mismatches_are_in_one_error_and_nothing_changes(tmp_path: Path) -> None:
    model, optimizer = trained()
    so.checkpoint.save(tmp_path, 3, model=model, optimizer=optimizer)
    torch.manual_seed(5)
    other = Net()
    other.scale = nn.Parameter(torch.randn(2))
    other.unused = nn.Parameter(torch.randn(2, 3, dtype=torch.bfloat16))
    other.norm = nn.Identity()
    other.own = nn.Parameter(torch.randn(3))
    other_optimizer = so.DecoupledSGDW([param for param in other.parameters() if param.requires_grad], lr=0.5, momentum=0.9)
    before = everything(other, other_optimizer)
    with pytest.raises(MismatchError) as caught:
        so.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer)
    for told in (
        "'model/scale' has shape (2,), in the checkpoint ()",
        "'model/unused' is of torch.bfloat16, in the checkpoint of torch.float32",
        "'model/own' is not in the checkpoint",
        "parameter 'own' is in no param group of the checkpoint",
        "'model/norm.running_var' of the checkpoint is in nothing that is being loaded",
        "'exp_avg_sq/scale' of the checkpoint is in nothing that is being loaded",
        "param_groups[0] has the hyperparameter 'momentum', the checkpoint has not",
        "param_groups[0] has no hyperparameter 'betas', the checkpoint has (0.9, 0.99)",
    ):
        assert told in str(caught.value)
    assert repr(everything(other, other_optimizer)) == repr(before)


def test_lenient_names_need_not_match(tmp_path: Path) -> None:
    """A new head is left as it is, with a warning that names it; what was not chosen is still an error."""
    model, optimizer = trained()
    so.checkpoint.save(tmp_path, 3, model=model, optimizer=optimizer)
    other, _ = trained(0, seed=1)
    other.unused = nn.Parameter(torch.randn(4, 4))
    other.extra_head = nn.Linear(2, 2)
    kept = other.unused.clone()
    other_optimizer = so.StableAdamW([param for param in other.parameters() if param.requires_grad], lr=1e-2)
    with pytest.raises(MismatchError, match=r"'model/extra_head\.weight' is not in") as caught:
        so.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer, strict=False, lenient=["unused"])
    assert "unused" not in str(caught.value)
    with pytest.warns(UserWarning, match=r"(?s)does not fit completely, as strict=False allows:\n.*'model/unused' has shape \(4, 4\)"):
        so.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer, strict=False, lenient=["unused", "extra_*"])
    assert torch.equal(other.unused, kept)
    assert torch.equal(other.embedding.weight, model.embedding.weight)
    assert torch.equal(other_optimizer.state[other.scale]["exp_avg"], optimizer.state[model.scale]["exp_avg"])


def test_hyperparameters_are_the_checkpoints_unless_the_live_ones_are_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = trained(make=partial(so.StableAdamW, lr=1e-2, weight_decay=0.25, betas=(0.8, 0.9)))
    so.checkpoint.save(tmp_path, 3, model=model, optimizer=optimizer)
    make = partial(so.StableAdamW, lr=torch.tensor(0.5), weight_decay=0.125)
    other, other_optimizer = trained(0, make=make)
    with caplog.at_level(logging.INFO):
        so.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer, hyperparameters="live")
    assert "param_groups[0]['weight_decay'] is 0.125, in the checkpoint 0.25 (hyperparameters='live')" in caplog.text
    (group,) = other_optimizer.param_groups
    assert (float(group["lr"]), group["weight_decay"]) == (0.5, 0.125)
    lr = group["lr"]
    so.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer)
    assert (group["weight_decay"], group["betas"], group["reference_lr"]) == (0.25, (0.8, 0.9), 1e-2)
    assert group["lr"] is lr  # a tensor stays the tensor that a compiled step or a scheduler holds
    assert float(lr) == float(torch.tensor(1e-2))


VALUES_OF_GROUPS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.tensor([1.0, 2.0]),
    "array": lambda: np.array([1.0, 2.0]),
    "list of tensors": lambda: [torch.tensor([1.0, 2.0])],
    "NaN": lambda: float("nan"),
}


@pytest.mark.parametrize("kind", VALUES_OF_GROUPS)
@pytest.mark.parametrize("live", ["same", "other kind", "absent"])
def test_values_of_a_group_that_have_no_truth_value_are_loaded(kind: str, live: str, tmp_path: Path) -> None:
    """A comparison of two tensors is a tensor: it must not fail when half of a load is done."""
    value = VALUES_OF_GROUPS[kind]
    param = nn.Parameter(torch.ones(3))
    optimizer = so.AdamW([{"params": [("w", param)], "tag": value()}], lr=1e-3, backend="eager")
    so.checkpoint.save(tmp_path, 1, optimizer=optimizer)
    group = optimizer.param_groups[0]
    if live == "absent":
        del group["tag"]
    elif live == "other kind":
        group["tag"] = VALUES_OF_GROUPS["array" if kind == "tensor" else "tensor"]()
    so.checkpoint.load(tmp_path, optimizer=optimizer)
    assert repr(group["tag"]) == repr(value())


def test_groups_of_a_checkpoint_with_equal_tensors_may_be_joined(tmp_path: Path) -> None:
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    tags = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    for step, tag in enumerate(tags):
        groups = [{"params": [("a", first)], "tag": tags[0]}, {"params": [("b", second)], "tag": tag}]
        so.checkpoint.save(tmp_path, step, optimizer=so.AdamW(groups, lr=1e-3, backend="eager"))
    joined = so.AdamW([("a", first), ("b", second)], lr=1e-3, backend="eager")
    so.checkpoint.load(tmp_path, step=0, optimizer=joined)
    with pytest.raises(MismatchError, match="with different tag"):
        so.checkpoint.load(tmp_path, step=1, optimizer=joined)


def test_groups_are_matched_by_the_names_in_them(tmp_path: Path) -> None:
    """Split into more groups a saved one gives each its hyperparameters; two that differ cannot become one."""
    model, _ = trained(0)
    names = dict(model.named_parameters())
    two = [{"params": [names["scale"]], "lr": 0.5}, {"params": [names["unused"], names["embedding.weight"]]}]
    optimizer = so.AdamW(two, lr=1e-3)
    train(model, optimizer, 0)
    so.checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer)
    apart = so.AdamW([{"params": [names[name]]} for name in ("unused", "scale", "embedding.weight")], lr=1.0)
    so.checkpoint.load(tmp_path, model=model, optimizer=apart)
    assert [group["lr"] for group in apart.param_groups] == [1e-3, 0.5, 1e-3]
    together = so.AdamW([names[name] for name in ("unused", "scale", "embedding.weight")], lr=1.0)
    with pytest.raises(
        MismatchError, match=r"param_groups\[0\] has parameters that were in several groups .* with different lr, reference_lr"
    ):
        so.checkpoint.load(tmp_path, model=model, optimizer=together)


def test_state_continues_in_another_class_of_the_family_and_maxima_and_compensations_begin(tmp_path: Path) -> None:
    model, optimizer = trained(make=partial(so.AdamW, lr=1e-2))
    so.checkpoint.save(tmp_path, 3, model=model, optimizer=optimizer)
    other, stable = trained(0, seed=1)
    so.checkpoint.load(tmp_path, model=other, optimizer=stable)
    assert_same(other, stable, model, optimizer)
    so.checkpoint.save(tmp_path, 4, model=other, optimizer=trained(1, make=so.DecoupledAdamW)[1])
    _, sgd = trained(0, make=partial(so.DecoupledSGDW, lr=1e-2))
    with pytest.raises(MismatchError, match=r"'exp_avg/"):
        so.checkpoint.load(tmp_path, step=3, model=other, optimizer=sgd)


@pytest.mark.parametrize("options", [{}, {"kahan_sum": True}, {"stochastic_rounding": True}, {"state_dtype": torch.bfloat16}])
def test_low_precision_parameters_are_restored_with_their_compensations(options: dict[str, Any], tmp_path: Path) -> None:
    def build(steps: int, seed: int) -> tuple[nn.Module, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(13, 7, dtype=torch.bfloat16)
        optimizer = so.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), **options)
        for _ in range(steps):
            model(torch.randn(4, 13, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    model, optimizer = build(3, 0)
    so.checkpoint.save(tmp_path, 3, model=model, optimizer=optimizer)
    other, other_optimizer = build(1, 1)
    so.checkpoint.load(tmp_path, model=other, optimizer=other_optimizer)
    assert_same(other, other_optimizer, model, optimizer)
    wide = nn.Linear(13, 7)
    with pytest.raises(MismatchError, match=r"'model/weight' is of torch\.float32, in the checkpoint of torch\.bfloat16"):
        so.checkpoint.load(tmp_path, model=wide)
    with pytest.warns(UserWarning, match="strict=False"):
        so.checkpoint.load(tmp_path, model=wide, strict=False)
    assert torch.equal(wide.weight, model.weight.float())


def test_a_single_pattern_is_one_and_choices_are_checked(tmp_path: Path) -> None:
    model, optimizer = trained()
    so.checkpoint.save(tmp_path, 3, model=model, optimizer=optimizer)
    other, _ = trained(0, seed=1)
    other.unused, other.scale = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(5))
    with pytest.raises(MismatchError, match="model/scale"):
        so.checkpoint.load(tmp_path, model=other, strict=False, lenient="unused*")
    with pytest.raises(CheckpointError, match="hyperparameters must be 'checkpoint' or 'live', got 'Live'"):
        so.checkpoint.load(tmp_path, model=model, optimizer=optimizer, hyperparameters="Live")


def test_tensors_without_memory_of_their_own_are_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    so.checkpoint.save(tmp_path, 3, model=model, optimizer=optimizer)
    with torch.device("meta"):
        hollow = Net()
    with pytest.raises(MismatchError, match=r"'model/scale' has no memory \(device meta\) and cannot be loaded into; materialize it"):
        so.checkpoint.load(tmp_path, model=hollow)
    with pytest.raises(CheckpointError, match=r"has no memory \(device meta\); materialize the model before it is saved"):
        so.checkpoint.save(tmp_path, 4, model=hollow)
    model.counts = torch.zeros(1, dtype=torch.int64).expand(3)
    with pytest.raises(MismatchError, match=r"'model/counts' has elements that share memory \(expanded\)"):
        so.checkpoint.load(tmp_path, model=model)


def test_an_optimizer_of_another_model_or_without_all_parameters_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained(make=partial(so.DecoupledSGDW, lr=1e-2))
    so.checkpoint.save(tmp_path, 3, model=model, optimizer=optimizer)
    partly = so.DecoupledSGDW([model.scale], lr=1e-2)
    with pytest.raises(MismatchError, match=r"parameter 'unused' of the checkpoint's optimizer is in no param group"):
        so.checkpoint.load(tmp_path, model=model, optimizer=partly)
    stale = so.AdamW([("scale", nn.Parameter(torch.ones(4)))], lr=1e-2)
    with pytest.raises(CheckpointError, match=r"the optimizer's parameter 'scale' is not the model's of that name; build the optimizer"):
        so.checkpoint.save(tmp_path, 4, model=model, optimizer=stale)


def test_tensors_that_are_not_contiguous_are_saved_and_loaded(tmp_path: Path) -> None:
    model = nn.Module()
    model.columns = nn.Parameter(torch.arange(12.0).view(3, 4).t())
    model.every_other = nn.Parameter(torch.arange(10.0)[::2])
    so.checkpoint.save(tmp_path, 1, model=model)
    expected = {name: param.clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.data.zero_()
    so.checkpoint.load(tmp_path, model=model)
    assert all(torch.equal(param, expected[name]) for name, param in model.named_parameters())
    assert not any(param.is_contiguous() for param in model.parameters())


def test_a_save_in_the_background_is_committed_when_the_process_ends_without_waiting(tmp_path: Path) -> None:
    code = "import sys, torch, sharded_optim as so\nso.checkpoint.async_save(sys.argv[1], 7, model=torch.nn.Linear(3000, 3000), keep=1)\n"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == ""
    assert so.checkpoint.latest(tmp_path) == 7


def test_errors_of_wrong_use_name_the_way_out(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    cases: list[tuple[Any, str]] = [
        (lambda: so.checkpoint.save(tmp_path, 1), r"nothing to save; pass model=, optimizer= or both"),
        (lambda: so.checkpoint.save(tmp_path, -1, model=model), r"step must be a whole number >= 0, got -1"),
        (lambda: so.checkpoint.save(tmp_path, 1, model=model, keep=0), r"keep must be a whole number >= 1, or None, got 0"),
        (lambda: so.checkpoint.save(tmp_path, 1, model=model.state_dict()), r"model must be a torch\.nn\.Module.*got OrderedDict"),
        (
            lambda: so.checkpoint.save(tmp_path, 1, model=model, optimizer=torch.optim.SGD(model.parameters())),
            r"optimizer must be one of this library.*got SGD; .*checkpoint import",
        ),
        (lambda: so.checkpoint.load(tmp_path, model=model), r"there is no checkpoint in .*give the folder that holds the step-"),
        (lambda: so.checkpoint.load(tmp_path, model=model, step=3), r"step-000000003 is no committed checkpoint"),
        (lambda: so.checkpoint.verify(tmp_path), r"there is no checkpoint in"),
        (lambda: so.checkpoint.describe(tmp_path, 7), r"there is no checkpoint of step 7 in .*; there are none"),
    ]
    for call, message in cases:
        with pytest.raises(CheckpointError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []
    so.checkpoint.save(tmp_path, 1, model=model)
    with pytest.raises(MismatchError, match="was saved without an optimizer; load it without optimizer="):
        so.checkpoint.load(tmp_path, model=model, optimizer=optimizer)
    with pytest.raises(CheckpointError, match="step 1 is committed already, and a committed checkpoint is never overwritten"):
        so.checkpoint.save(tmp_path, 1, model=model)
    assert so.checkpoint.latest(tmp_path) == 1
    assert so.checkpoint.latest(tmp_path / "nowhere") is None


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    model, _ = trained(0)
    for step in (5, 10, 1000000007, 20):
        so.checkpoint.save(tmp_path, step, model=model)
    assert so.checkpoint.prune(tmp_path, 2) == [5, 10]
    assert so.checkpoint.prune(tmp_path, 2) == []
    assert so.checkpoint.steps(tmp_path) == [20, 1000000007]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000020", "step-1000000007"]


def test_a_store_without_renames_commits_by_its_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's local file system, used as an object store: without COMMITTED there is no checkpoint, and what is left is replaced."""
    for module in (so.checkpoint, so.checkpoint.saving):
        monkeypatch.setattr(module, "open_store", lambda root: UrlStore(f"file://{root}"))
    model, optimizer = trained()
    so.checkpoint.save(tmp_path / "run", 3, model=model, optimizer=optimizer)
    folder = tmp_path / "run" / "step-000000003"
    other, other_optimizer = trained(0, seed=4)
    so.checkpoint.load(tmp_path / "run", step=3, model=other, optimizer=other_optimizer)
    assert_same(other, other_optimizer, model, optimizer)
    (folder / "COMMITTED").unlink()
    (folder / "shard-00001-of-00002.safetensors").write_bytes(b"of an attempt that died")
    with pytest.raises(CheckpointError, match="is no committed checkpoint"):
        so.checkpoint.load(tmp_path / "run", step=3, model=other, optimizer=other_optimizer)
    so.checkpoint.save(tmp_path / "run", 3, model=model, optimizer=optimizer)
    assert sorted(path.name for path in folder.iterdir()) == ["COMMITTED", "manifest.json", "shard-00000-of-00001.safetensors"]
    so.checkpoint.load(tmp_path / "run", step=3, model=other, optimizer=other_optimizer)


# ------------------------------------------------------------------------------------------------------------------------- ranks


def check_ranks(folder: Path) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Linear(1000, 3 * CHUNK_BYTES // 4000 + 1, bias=False)  # several chunks
    optimizer = so.ShardedOptimizer(model, so.AdamW, lr=1e-3)
    model(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    so.checkpoint.save(folder, 1, model=model, optimizer=optimizer, extra={"only": "here"} if rank == 1 else None)

    sizes = {name: size for name, (size, _) in LocalStore(str(folder)).files("step-000000001").items()}
    shards = [size for name, size in sizes.items() if name.startswith("shard")]
    assert len(shards) == 2
    assert max(shards) - min(shards) <= CHUNK_BYTES + 2**16, "replicas are spread over the ranks"
    total = 3 * model.weight.numel() * 4
    assert sum(shards) - total < 2**16, "every element is written once"

    read: list[int] = []
    before = LocalStore.read

    def count(self: LocalStore, folder: str, file: str, offset: int, into: memoryview) -> int:
        read.append(len(into))
        return before(self, folder, file, offset, into)

    LocalStore.read = count
    try:
        extra = so.checkpoint.load(folder, optimizer=optimizer, model=model)
        everything_read = sum(read)
        read.clear()
        only_optimizer = nn.Linear(1000, model.weight.shape[0], bias=False)
        so.checkpoint.load(folder, optimizer=so.ShardedOptimizer(only_optimizer, so.AdamW, lr=1e-3), strict=False)
    finally:
        LocalStore.read = before
    assert extra == {"only": "here"}
    moments, weights = total * 2 // 3, total // 3
    needed = weights + moments // 2  # by this rank
    assert everything_read <= 2 * needed + moments // 2 + 3 * CHUNK_BYTES, "a pass that verifies and one that loads, of what intersects"

    for what, problem, extra in (
        ("extra is not the same on ranks 0 and 1", None, {"rank": rank}),
        ("param_groups\\[0\\] has lr=0.5 on rank 1, 0.001 on rank 0", ("lr", 0.5), None),
    ):
        if problem is not None and rank == 1:
            optimizer.param_groups[0][problem[0]] = problem[1]
        with pytest.raises(CheckpointError, match=what):
            so.checkpoint.save(folder, 2, model=model, optimizer=optimizer, extra=extra)
    optimizer.param_groups[0]["lr"] = 1e-3
    with pytest.raises(CheckpointError, match=r"has shape .* on one rank, and shape .* on rank 1; different tensors need different names"):
        so.checkpoint.save(folder, 2, model=nn.Linear(3, 2 + rank))
    with pytest.raises(MismatchError, match=r"rank 1: |'model/bias' is not in the checkpoint"):
        so.checkpoint.load(folder, model=nn.Linear(1000, model.weight.shape[0], bias=rank == 1))
    assert so.checkpoint.steps(folder) == [1]

    check_replicas(folder / "replicas")
    check_gathered_parameters(folder / "gathered")
    check_arguments(folder, model, optimizer)
    group = dist.new_group([1])  # ranks that save alone
    if rank == 1:
        so.checkpoint.save(folder / "alone", 1, model=model, process_group=group)
        assert so.checkpoint.verify(folder / "alone") == 1


def check_replicas(folder: Path) -> None:
    """Tensors that have a name in common are one tensor; buffers may differ, and are the first rank's, all of them."""
    rank = dist.get_rank()
    model = nn.BatchNorm1d(5)
    for buffer in (model.running_mean, model.running_var):
        buffer.add_(rank)
    so.checkpoint.save(folder, 1, model=model)
    so.checkpoint.load(folder, model=model)
    assert torch.equal(model.running_mean, torch.zeros(5))
    assert torch.equal(model.running_var, torch.ones(5))
    stage = nn.Linear(3, 3)
    nn.init.constant_(stage.weight, rank)
    with pytest.raises(CheckpointError, match=r"ranks 0 and 1 both hold 'model/weight', with different values: they are not replicas"):
        so.checkpoint.save(folder, 2, model=stage)


def check_gathered_parameters(folder: Path) -> None:
    """FSDP2 leaves gathered copies in the parameters' places after a forward pass without a backward pass: not they are loaded into."""
    model, other = nn.Linear(5, 3), nn.Linear(5, 3)
    nn.init.constant_(model.weight, 2.0)
    nn.init.constant_(model.bias, 1.0)
    for each in (model, other):
        fully_shard(each)
    optimizer = so.AdamW(other.named_parameters(), lr=1e-3)
    so.checkpoint.save(folder, 1, model=model)
    with torch.no_grad():
        other(torch.ones(1, 5))
        so.checkpoint.load(folder, model=other)
        assert torch.equal(other(torch.ones(1, 5)), torch.full((1, 3), 11.0))
    so.checkpoint.save(folder, 2, model=other, optimizer=optimizer)
    for param in other.parameters():
        assert (param.to_local() == param.ndim).all()


def check_arguments(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """What only one rank gives, or waits for, leaves none waiting."""
    rank = dist.get_rank()
    for options, message in (
        ({"strict": rank == 0}, "strict is False on rank 1, True on rank 0"),
        ({"step": 1 if rank else None}, "step is 1 on rank 1, None on rank 0"),
        ({"optimizer": optimizer if rank else None}, "optimizer is True on rank 1, False on rank 0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            so.checkpoint.load(folder, **{"model": model, **options})
    before = so.checkpoint.saving.write_shard
    so.checkpoint.saving.write_shard = lambda *_: 1 / 0
    handle = so.checkpoint.async_save(folder / "failing", 1, model=model)
    if rank == 0:
        with pytest.raises(CheckpointError, match="ZeroDivisionError"):
            handle.wait()  # the other rank has not heard of it
    handle._thread.join()
    so.checkpoint.saving.write_shard = before
    with pytest.raises(CheckpointError, match=r"rank 1: .*ZeroDivisionError"):
        so.checkpoint.save(folder / "failing", 1, model=model)
    so.checkpoint.save(folder / "failing", 1, model=model)


def test_ranks_write_each_element_once_and_read_what_they_hold(tmp_path: Path) -> None:
    """And agree on what is wrong."""
    ranks.run(check_ranks, 2, tmp_path)
