"""Exports have the bits of the checkpoint for other programs; they overwrite nothing, and leave no incomplete files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import safetensors.torch
import torch
import torch.distributed as dist
from deepspeed_models import AWKWARD
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import sharded_optim as so
from benchmarks.given_gradients import Model, Shapes, gradients, two_groups
from sharded_optim import checkpoint
from sharded_optim.checkpoint import export, saving
from sharded_optim.checkpoint.content import Content
from sharded_optim.checkpoint.local_tensor import LocalTensor
from sharded_optim.sharding.segment import Segment

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")

ODD = (*AWKWARD, ((),), ((0, 5),))  # and no dimensions, and no elements
SAVED = 3  # steps
STABLE = partial(so.StableAdamW, lr=1e-2, weight_decay=0.1)
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "Adam": partial(so.Adam, lr=1e-2, weight_decay=0.1),
    "AdamW": partial(so.AdamW, lr=1e-2, weight_decay=0.1),
    "StableAdamW": STABLE,
    "DecoupledAdamW-amsgrad": partial(so.DecoupledAdamW, lr=1e-2, weight_decay=1e-4, amsgrad=True),
    "DecoupledSGDW": partial(so.DecoupledSGDW, lr=1e-2, momentum=0.9),
}


class WithBuffers(Model):
    def __init__(self, layers: Shapes = ODD, *, seed: int = 0) -> None:
        super().__init__(layers, seed=seed)
        self.register_buffer("count", torch.tensor(7 + seed))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def train(model: nn.Module, optimizer: Any, first: int, last: int, layers: Shapes = ODD) -> None:
    for step in range(first, last + 1):
        for param, grad in zip(model.parameters(), gradients(step, layers), strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_model_is_one_safetensors_file_where_it_fits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Parameters, buffers, no dimensions, no elements; none of the optimizer's state."""
    model = WithBuffers().to(dtype)
    optimizer = STABLE(two_groups(model))
    train(model, optimizer, 1, SAVED)
    checkpoint.save(tmp_path / "run", 3, model=model, optimizer=optimizer)
    assert checkpoint.export_safetensors(tmp_path / "run", tmp_path / "model") == ["model.safetensors"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]
    assert_same(safetensors.torch.load_file(tmp_path / "model" / "model.safetensors"), dict(model.state_dict()))
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_larger_model_is_cut_into_numbered_files_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = WithBuffers()
    checkpoint.save(tmp_path / "run", 0, model=model)
    monkeypatch.setattr(export, "FILE_BYTES", 2500)
    names = checkpoint.export_safetensors(tmp_path / "run", tmp_path / "model")
    count = len(names) - 1
    assert count > 2
    assert names == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)] + ["model.safetensors.index.json"]
    index = json.loads((tmp_path / "model" / names[-1]).read_text())
    expected = dict(model.state_dict())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    found: dict[str, Tensor] = {}
    for name in names[:-1]:
        part = safetensors.torch.load_file(tmp_path / "model" / name)
        assert part
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 2500
        assert {tensor: file for tensor, file in index["weight_map"].items() if file == name}.keys() == part.keys()
        found |= part
    assert_same(found, expected)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_checkpoints_and_exports_have_the_permissions_of_the_umask(umask: int, tmp_path: Path) -> None:
    model = WithBuffers()
    before = os.umask(umask)
    try:
        checkpoint.save(tmp_path / "run", 1, model=model)
        checkpoint.export_safetensors(tmp_path / "run", tmp_path / "model")
        checkpoint.export_torch(tmp_path / "run", tmp_path / "model.pt")
        (tmp_path / "file").touch()
        (tmp_path / "folder").mkdir()
    finally:
        os.umask(before)
    modes = {is_file: {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file() == is_file} for is_file in (True, False)}
    assert {is_file: len(found) for is_file, found in modes.items()} == {True: 1, False: 1}, modes


class Tied(nn.Module):
    """A weight and a buffer with two names, one of which comes first in the alphabet and last in the model; and a module with two."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.again = self.layers[1]
        self.a_head = nn.Linear(4, 8, bias=False)
        self.a_head.weight = self.embed.weight
        self.register_buffer("mean", torch.full((3,), float(seed)))
        self.register_buffer("a_mean", self.mean)
        self.register_buffer("scratch", self.mean, persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        return self.a_head(self.again(self.layers[0](self.embed(index)))).square().sum()


ALIASES = {"a_head.weight": "embed.weight", "again.weight": "layers.1.weight", "again.bias": "layers.1.bias", "a_mean": "mean"}


def assert_exports_load(root: Path, model: nn.Module) -> None:
    """By `load_state_dict` with all names; and an export is imported with its ties."""
    expected = model.state_dict()
    checkpoint.export_torch(root, root / "model.pt")
    checkpoint.export_safetensors(root, root / "model")
    for found in (torch.load(root / "model.pt", weights_only=True)["model"], safetensors.torch.load_file(root / "model/model.safetensors")):
        assert_same(dict(found), dict(expected))
        other = Tied(seed=1)
        other.load_state_dict(found)
        assert_same(dict(other.state_dict()), dict(expected))
    for number, source in enumerate((root / "model.pt", root / "model")):
        checkpoint.import_from(source, root / "imported", number, unpickle=True)
        assert checkpoint.describe(root / "imported", number).aliases == ALIASES
        other = Tied(seed=1)
        checkpoint.load(root / "imported", model=other)
        assert_same(dict(other.state_dict()), dict(expected))


def test_exports_of_tied_weights_load_by_all_of_their_names(tmp_path: Path) -> None:
    model = Tied()
    checkpoint.save(tmp_path, 1, model=model, optimizer=so.AdamW(model.parameters(), lr=1e-2))
    assert checkpoint.describe(tmp_path).aliases == ALIASES
    size = (tmp_path / "step-000000001" / "shard-00000-of-00001.safetensors").stat().st_size
    assert size < 1.5 * sum(param.nbytes for param in model.parameters()) + 2500, "each is saved once"
    assert_exports_load(tmp_path, model)


def test_a_tied_weight_of_any_name_leaves_the_format_of_the_file(tmp_path: Path) -> None:
    """Libraries read `format` from the metadata, where the names of tied weights are too."""
    model = nn.Module()
    model.register_parameter("a", nn.Parameter(torch.ones(2)))
    model.register_parameter("format", model.a)
    checkpoint.save(tmp_path, 1, model=model)
    checkpoint.export_safetensors(tmp_path, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {"a", "format"}


def check_tied_weights(folder: str) -> None:
    """Under each wrapper as in one process."""
    whole = Tied()
    for wrapper in ("ddp", "fsdp2", "fsdp1", "fsdp1-flat", "zero"):
        root = Path(folder) / wrapper
        model: Any = Tied()
        if wrapper == "ddp":
            model = DistributedDataParallel(model)
        elif wrapper == "fsdp2":
            fully_shard(model)
        elif wrapper.startswith("fsdp1"):
            model = FullyShardedDataParallel(model, use_orig_params=wrapper == "fsdp1", device_id=torch.device("cpu"))
        else:
            so.ShardedOptimizer(model, so.AdamW, lr=1e-2)
        checkpoint.save(root, 1, model=model)
        if dist.get_rank() == 0:
            assert checkpoint.describe(root).aliases == ALIASES, wrapper
            assert_exports_load_once(root, whole)
        dist.barrier()


def assert_exports_load_once(root: Path, model: nn.Module) -> None:
    checkpoint.export_torch(root, root / "model.pt")
    assert_same(dict(torch.load(root / "model.pt", weights_only=True)["model"]), dict(model.state_dict()))


def test_tied_weights_keep_their_names_under_every_wrapper(tmp_path: Path) -> None:
    ranks.run(check_tied_weights, 2, str(tmp_path))


def save_pieces(root: Path, step: int, held: list[LocalTensor]) -> None:
    saved = Content(tensors=held)
    pending = saving.begin(root, step, lambda: saved)
    saving.finish(pending, pending.content)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_masters_are_exported_in_place_of_rounded_parameters(kind: str, tmp_path: Path) -> None:
    values = {"a": torch.randn(5, 3), "b": torch.randn(7)}
    rounded = {name: value.bfloat16() for name, value in values.items()}
    held = [LocalTensor(kind="model", segment=Segment.whole(name, value.shape), local=value) for name, value in rounded.items()]
    held.append(LocalTensor(kind="master", segment=Segment.whole("a", (5, 3)), local=values["a"]))
    save_pieces(tmp_path / "run", 1, held)
    for masters, expected in ((False, rounded), (True, {"a": values["a"], "b": rounded["b"]})):
        path = tmp_path / f"out{masters}"
        if kind == "safetensors":
            checkpoint.export_safetensors(tmp_path / "run", path, masters=masters)
            assert_same(safetensors.torch.load_file(path / "model.safetensors"), expected)
        else:
            checkpoint.export_torch(tmp_path / "run", path, masters=masters)
            assert_same(torch.load(path, weights_only=True)["model"], expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_torch_file_continues_bitwise_through_load_state_dict(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Loaded with weights_only=True, into the same param groups of an optimizer that was built with other hyperparameters."""
    model = WithBuffers().to(dtype)
    optimizer = OPTIMIZERS[name](two_groups(model))
    train(model, optimizer, 1, SAVED)
    extra = {"epoch": 2, "betas": (0.1, float("inf")), "blob": b"\x00\xff", "t": torch.arange(3), "none": None}
    checkpoint.save(tmp_path / "run", 3, model=model, optimizer=optimizer, extra=extra)
    checkpoint.export_torch(tmp_path / "run", tmp_path / "all.pt")
    loaded = torch.load(tmp_path / "all.pt", weights_only=True)
    assert loaded["step"] == 3
    assert torch.equal(loaded["extra"].pop("t"), extra.pop("t"))
    assert loaded["extra"] == extra
    other = WithBuffers(seed=5).to(dtype)
    other.load_state_dict(loaded["model"])
    groups = [{**group, "lr": 0.5} for group in two_groups(other)]
    taken = OPTIMIZERS[name](groups)
    taken.load_state_dict(loaded["optimizer"])
    names = {param: name for name, param in model.named_parameters()}
    for group, theirs in zip(loaded["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
        assert group["param_names"] == [names[param] for param in theirs["params"]]
    for each, its in ((model, optimizer), (other, taken)):
        train(each, its, SAVED + 1, SAVED + 2)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert_same(taken.state[mine], optimizer.state[theirs])
    for mine, theirs in zip(taken.param_groups, optimizer.param_groups, strict=True):
        assert {key: value for key, value in mine.items() if "param" not in key} == {
            key: value for key, value in theirs.items() if "param" not in key
        }


def save_sharded(folder: str) -> None:
    """On two ranks. FSDP2 takes no parameter without dimensions."""
    model = WithBuffers(AWKWARD)
    fully_shard(model)
    plain = WithBuffers(AWKWARD)
    sharded = so.ShardedOptimizer(two_groups(plain), so.StableAdamW, lr=1e-2, weight_decay=0.1)
    each = {"fsdp2": (model, STABLE(two_groups(model))), "zero": (plain, sharded)}
    for wrapper, (wrapped, optimizer) in each.items():
        for step in range(1, SAVED + 1):
            wrapped(gradients(step, AWKWARD, rank=dist.get_rank(), world_size=2)).backward()
            optimizer.step()
            optimizer.zero_grad()
        checkpoint.save(Path(folder) / wrapper, 3, model=wrapped, optimizer=optimizer)


def test_what_was_saved_sharded_is_exported_whole(tmp_path: Path) -> None:
    """The next step is that of a training that was never sharded."""
    ranks.run(save_sharded, 2, str(tmp_path))
    expected = WithBuffers(AWKWARD)
    train(expected, STABLE(two_groups(expected)), 1, SAVED + 1, AWKWARD)
    for wrapper in ("fsdp2", "zero"):
        checkpoint.export_torch(tmp_path / wrapper, tmp_path / f"{wrapper}.pt")
        loaded = torch.load(tmp_path / f"{wrapper}.pt", weights_only=True)
        model = WithBuffers(AWKWARD, seed=5)
        model.load_state_dict(loaded["model"])
        taken = STABLE(two_groups(model))
        taken.load_state_dict(loaded["optimizer"])
        train(model, taken, SAVED + 1, SAVED + 1, AWKWARD)
        assert_same(dict(model.state_dict()), dict(expected.state_dict()))


# ------------------------------------------------------------------------------------------------------------------------ failures


def exporters() -> list[Callable[..., Any]]:
    return [checkpoint.export_safetensors, checkpoint.export_torch]


@pytest.mark.parametrize("run", exporters(), ids=["safetensors", "torch"])
def test_nothing_that_exists_is_overwritten(run: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "run", 0, model=WithBuffers())
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "dangling"):
        with pytest.raises(FileExistsError, match="overwrites nothing"):
            run(tmp_path / "run", tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "folder", "run"]


@pytest.mark.parametrize("run", exporters(), ids=["safetensors", "torch"])
def test_a_damaged_checkpoint_is_not_exported(run: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "run", 0, model=WithBuffers())
    (shard,) = (tmp_path / "run" / "step-000000000").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(checkpoint.DamagedError, match=shard.name):
        run(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("run", exporters(), ids=["safetensors", "torch"])
def test_an_export_that_fails_leaves_nothing(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "run", 0, model=WithBuffers())

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(export, "sync", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_of_an_optimizer_alone_has_no_model_to_export(tmp_path: Path) -> None:
    model = WithBuffers()
    optimizer = STABLE(list(model.named_parameters()))
    train(model, optimizer, 1, 1)
    checkpoint.save(tmp_path / "run", 1, optimizer=optimizer)
    with pytest.raises(checkpoint.CheckpointError, match="saved without a model"):
        checkpoint.export_safetensors(tmp_path / "run", tmp_path / "out")
    checkpoint.export_torch(tmp_path / "run", tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert loaded["model"] is None
    assert len(loaded["optimizer"]["state"]) == len(list(model.parameters()))


def test_without_safetensors_an_export_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "run", 0, model=WithBuffers())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(checkpoint.CheckpointError, match=r"not installed; pip install safetensors"):
        checkpoint.export_safetensors(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_chosen_step_is_exported(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / "run", step, model=WithBuffers(seed=step))
    checkpoint.export_torch(tmp_path / "run", tmp_path / "1.pt", step=1)
    checkpoint.export_torch(tmp_path / "run", tmp_path / "newest.pt")
    for step, name in ((1, "1.pt"), (2, "newest.pt")):
        assert_same(torch.load(tmp_path / name, weights_only=True)["model"], dict(WithBuffers(seed=step).state_dict()))
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint of step 3 .* there are \[1, 2\]"):
        checkpoint.export_torch(tmp_path / "run", tmp_path / "3.pt", step=3)
