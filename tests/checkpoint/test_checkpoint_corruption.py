"""Every damage to a checkpoint's files is found before anything changes, and reported by file and tensor.

CORRUPTIONS=2000 in the environment makes so many, as `make chaos` does.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

import sharded_optim as so
from benchmarks.given_gradients import Model, Shapes, gradients
from sharded_optim import checkpoint
from sharded_optim.checkpoint import loading
from sharded_optim.checkpoint.live import LiveModel, deepspeed, live_model
from sharded_optim.checkpoint.manifest_json import parse

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")

CASES = int(os.environ.get("CORRUPTIONS", "150"))
LAYERS: Shapes = (((7, 3), (7,)), ((9, 4),), ((9, 4),), ((1,),), ((),), ((33, 17), (33,)))
OLDER, STEP = 2, 4
NAME = f"step-{STEP:09d}"
SHARDS = ("shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors")
Files = dict[str, bytes]


# ------------------------------------------------------------------------------------------------------------------- what is damaged


def train(seed: int, steps: int, rank: int = 0, world_size: int = 1) -> tuple[Model, Any]:
    model = Model(LAYERS, seed=seed)
    options = {"lr": 1e-2, "weight_decay": 0.1, "backend": "eager"}
    optimizer = so.ShardedOptimizer(model, so.StableAdamW, **options) if world_size > 1 else so.StableAdamW(model.parameters(), **options)
    for step in range(1, steps + 1):
        model(gradients(step, LAYERS, seed=seed, rank=rank, world_size=world_size)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save_on_two_ranks(folder: str) -> None:
    for seed in range(2):
        for step in (OLDER, STEP):
            model, optimizer = train(seed, step, dist.get_rank(), 2)
            checkpoint.save(Path(folder) / str(seed), step, model=model, optimizer=optimizer, extra={"step": step})


@dataclass
class Live:
    """A model and an optimizer with other values than any checkpoint, and what they were."""

    model: Model
    optimizer: Any
    before: Mapping[str, Any]

    @classmethod
    def new(cls) -> Live:
        model, optimizer = train(7, 1)
        return cls(model, optimizer, copy.deepcopy(cls.values(model, optimizer)))

    @staticmethod
    def values(model: Model, optimizer: Any) -> Mapping[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def is_unchanged(self) -> bool:
        return _same(self.values(self.model, self.optimizer), self.before)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


@dataclass
class Specimen:
    """A root whose newest checkpoint is damaged again and again.

    Attributes:
        files: of that checkpoint, as they were saved.
        foreign: of another run's, with the same names and shapes.
    """

    root: Path
    files: Files
    foreign: Files
    live: Live

    def damage(self, files: Files) -> None:
        """Make these the checkpoint's."""
        folder = self.root / NAME
        for path in folder.iterdir():
            if path.name not in files:
                path.unlink()
        for name, content in files.items():
            (folder / name).write_bytes(content)

    def error_of(self, act: Callable[[], object]) -> checkpoint.CheckpointError | None:
        try:
            act()
        except checkpoint.CheckpointError as error:
            return error
        return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    ranks.run(save_on_two_ranks, 2, str(folder))
    return folder


@pytest.fixture(scope="module")
def live() -> Live:
    return Live.new()


@pytest.fixture
def specimen(saved: Path, live: Live, tmp_path: Path) -> Specimen:
    shutil.copytree(saved / "0", tmp_path / "run")
    files, foreign = ({path.name: path.read_bytes() for path in (saved / run / NAME).iterdir()} for run in ("0", "1"))
    assert files.keys() == {*SHARDS, "manifest.json", "COMMITTED"}
    return Specimen(tmp_path / "run", files, foreign, live)


def tensor_at(file: bytes, offset: int) -> str | None:
    """The tensor that has a byte of a safetensors file; None: the header has it."""
    size = int.from_bytes(file[:8], "little")
    begin = offset - 8 - size
    header = json.loads(file[8 : 8 + size])
    found = [key for key, entry in header.items() if key != "__metadata__" and entry["data_offsets"][0] <= begin < entry["data_offsets"][1]]
    assert len(found) == (begin >= 0)
    return found[0].rpartition("#")[0] if found else None


# ------------------------------------------------------------------------------------------------------------------------- damages

# Each changes `files`, and returns words that the error must have.
Damage = Callable[[Files, Files, random.Random], list[str]]


def pick(files: Files, chance: random.Random) -> str:
    """A file: mostly shards, but the others often, small as they are."""
    return chance.choice([*SHARDS, *files])


def flip(files: Files, foreign: Files, chance: random.Random) -> list[str]:
    name = pick(files, chance)
    index = chance.randrange(len(files[name]))
    tensor = tensor_at(files[name], index) if name in SHARDS else None
    content = bytearray(files[name])
    content[index] ^= 1 << chance.randrange(8)
    files[name] = bytes(content)
    return [name] if tensor is None else [name, repr(tensor)]


def flip_many(files: Files, foreign: Files, chance: random.Random) -> list[str]:
    """All files, and tensors, that have a flip are named."""
    return [word for _ in range(chance.randint(2, 4)) for word in flip_data(files, chance)]


def flip_data(files: Files, chance: random.Random) -> list[str]:
    name = chance.choice(SHARDS)
    header = 8 + int.from_bytes(files[name][:8], "little")
    index = chance.randrange(header, len(files[name]))
    content = bytearray(files[name])
    content[index] ^= 1 << chance.randrange(8)
    tensor = tensor_at(files[name], index)
    files[name] = bytes(content)
    return [name, repr(tensor)]


def truncate(files: Files, foreign: Files, chance: random.Random) -> list[str]:
    name = pick(files, chance)
    files[name] = files[name][: chance.choice((0, len(files[name]) - 1, chance.randrange(len(files[name]))))]
    return [name]


def append(files: Files, foreign: Files, chance: random.Random) -> list[str]:
    name = pick(files, chance)
    files[name] += chance.choice((b"\0", b"\n", b" ", chance.randbytes(chance.randint(1, 5000))))
    return [name]


def lose(files: Files, foreign: Files, chance: random.Random) -> list[str]:
    name = chance.choice((*SHARDS, "manifest.json"))
    del files[name]
    return [f"{name} is lost"]


def exchange(files: Files, foreign: Files, chance: random.Random) -> list[str]:
    """Two shards, each under the other's name; or one under both."""
    other = chance.choice(SHARDS)
    files[SHARDS[0]], files[SHARDS[1]] = chance.choice(
        ((files[SHARDS[1]], files[SHARDS[0]]), (files[SHARDS[0]],) * 2, (files[SHARDS[1]],) * 2)
    )
    assert len(files[other])
    return ["shard-0000"]


def take_from_another_run(files: Files, foreign: Files, chance: random.Random) -> list[str]:
    """As many bytes, with the same header: only the data are others."""
    name = chance.choice(SHARDS)
    assert len(files[name]) == len(foreign[name])
    files[name] = foreign[name]
    first = next(index for index in range(len(foreign[name])) if tensor_at(foreign[name], index) is not None)
    return [name, repr(tensor_at(foreign[name], first))]


def take_the_manifest_of_another_run(files: Files, foreign: Files, chance: random.Random) -> list[str]:
    files["manifest.json"] = foreign["manifest.json"]
    if chance.random() < 0.5:
        files["COMMITTED"] = foreign["COMMITTED"]
        return [*SHARDS, "'model/layers.5.weight'"]
    return ["manifest.json", "COMMITTED"]


def add_a_shard(files: Files, foreign: Files, chance: random.Random) -> list[str]:
    name = f"shard-{chance.choice((0, 1, 2, 17)):05d}-of-{chance.choice((1, 3, 18)):05d}.safetensors"
    files[name] = foreign[chance.choice(SHARDS)]
    return [f"{name} does not belong to this checkpoint"]


def edit_without_marker(files: Files, foreign: Files, chance: random.Random) -> list[str]:
    """Also where it is read as the same: it is not what was committed."""
    content = json.loads(files["manifest.json"])
    edit = chance.choice((*EDITS, None))
    if edit is not None:
        edit(content, chance)
    files["manifest.json"] = json.dumps(content, indent=1).encode()
    return ["manifest.json", "COMMITTED"]


def edit_with_marker(files: Files, foreign: Files, chance: random.Random) -> list[str]:
    """What contradicts itself, or the data."""
    content = json.loads(files["manifest.json"])
    chance.choice(EDITS)(content, chance)
    files["manifest.json"] = json.dumps(content).encode()
    files["COMMITTED"] = hashlib.sha256(files["manifest.json"]).hexdigest().encode() + b"\n"
    return ["manifest.json"]


DAMAGES: tuple[Damage, ...] = (
    flip,
    flip_many,
    truncate,
    append,
    lose,
    exchange,
    take_from_another_run,
    take_the_manifest_of_another_run,
    add_a_shard,
    edit_without_marker,
    edit_with_marker,
)


# ------------------------------------------------------------------------------------------------------------- edits of a manifest

Content = dict[str, Any]
WRONG = (-1, None, 1.5, "1", True, [], {}, 10**30, 2**63)
FILE, OFFSET, SIZE, START, RUN, STRIDE, COUNT, DIGEST = range(8)  # of a chunk


def a_tensor(content: Content, chance: random.Random) -> Content:
    return chance.choice([row for row in content["tensors"] if row["chunks"]])


def edit_extent(content: Content, chance: random.Random) -> None:
    chunk = chance.choice(a_tensor(content, chance)["chunks"])
    position = chance.choice((START, RUN, STRIDE, COUNT))
    wrong: list[Any] = [each for each in WRONG if not (position == STRIDE and type(each) is int and each > 0)]  # of one run it says nothing
    if position != STRIDE:
        wrong += [chunk[position] + 1, chunk[position] + 7, chunk[position] * 2 + 1]
    chunk[position] = chance.choice(wrong)


def edit_place(content: Content, chance: random.Random) -> None:
    chunk = chance.choice(a_tensor(content, chance)["chunks"])
    position = chance.choice((FILE, OFFSET, SIZE))
    chunk[position] = chance.choice(
        (1 - chunk[FILE], 2, *WRONG) if position == FILE else (chunk[position] + 4, chunk[position] * 3, *WRONG)
    )


def edit_digest(content: Content, chance: random.Random) -> None:
    rows = [chance.choice(a_tensor(content, chance)["chunks"]), chance.choice(content["files"])]
    row, key = chance.choice(((rows[0], DIGEST), (rows[1], "header_sha256")))
    row[key] = chance.choice((None, "", "0" * 64, row[key].upper(), row[key][:-1] + ("0" if row[key][-1] != "0" else "1")))


def edit_file(content: Content, chance: random.Random) -> None:
    row = chance.choice(content["files"])
    key = chance.choice(("size", "header_size"))
    row[key] = chance.choice((row[key] + 8, row[key] - 8, 0, *WRONG))


def edit_file_name(content: Content, chance: random.Random) -> None:
    row = chance.choice(content["files"])
    row["name"] = chance.choice(
        (f"../step-{OLDER:09d}/{row['name']}", f"/tmp/{row['name']}", f"./{row['name']}", "manifest.json", "", None, 3, f"{row['name']}\n")
    )


def edit_dtype(content: Content, chance: random.Random) -> None:
    """To another width."""
    a_tensor(content, chance)["dtype"] = chance.choice(("F64", "BF16", "BOOL", "I64", "F128", "", None, 5))


def edit_shape(content: Content, chance: random.Random) -> None:
    row = a_tensor(content, chance)
    row["shape"] = chance.choice(([math.prod(row["shape"]) + 1], [*row["shape"], 2], [0], None, [None], [-1], 5, [10**30], [2**62, 2], "3"))


def edit_version(content: Content, chance: random.Random) -> None:
    content["version"] = chance.choice(([2, 0], [0, 9], [], None, "1.0", [1], [1, 0, 0], ["1", 0]))


def edit_requirements(content: Content, chance: random.Random) -> None:
    content["requires"] = chance.choice((["compression"], ["a", "b"], None, [3], [[]]))


def edit_format(content: Content, chance: random.Random) -> None:
    content["format"] = chance.choice(("another", "", None, 1))


def edit_step(content: Content, chance: random.Random) -> None:
    content["step"] = chance.choice((OLDER, STEP + 1, *WRONG))


def lose_a_tensor(content: Content, chance: random.Random) -> None:
    content["tensors"].remove(a_tensor(content, chance))


def lose_a_chunk(content: Content, chance: random.Random) -> None:
    chunks = a_tensor(content, chance)["chunks"]
    del chunks[chance.randrange(len(chunks))]


def double_a_tensor(content: Content, chance: random.Random) -> None:
    content["tensors"].append(a_tensor(content, chance))


def double_a_chunk(content: Content, chance: random.Random) -> None:
    chunks = a_tensor(content, chance)["chunks"]
    chunks.append(chance.choice(chunks))


def lose_a_file(content: Content, chance: random.Random) -> None:
    del content["files"][chance.randrange(2)]


def reverse_files(content: Content, chance: random.Random) -> None:
    content["files"].reverse()


def lose_a_key(content: Content, chance: random.Random) -> None:
    row = chance.choice((content, chance.choice(content["files"]), a_tensor(content, chance)))
    del row[chance.choice(sorted(row))]


def spoil_a_value(content: Content, chance: random.Random) -> None:
    """With a mark for a tensor, or for something unknown, that is none."""
    tensor = {"dtype": "F32", "shape": [3], "data": "AAAA"}
    content["extra"] = chance.choice(
        (
            {"$object": 1},
            {"$tensor": tensor},
            {"$tensor": {**tensor, "data": "AAAAAA=="}},
            {"$float": "x"},
            {"$items": [[[], 1]]},
            {"$bytes": 1},
        )
    )


EDITS = (
    edit_extent,
    edit_place,
    edit_digest,
    edit_file,
    edit_file_name,
    edit_dtype,
    edit_shape,
    edit_version,
    edit_requirements,
    edit_format,
    edit_step,
    lose_a_tensor,
    lose_a_chunk,
    double_a_tensor,
    double_a_chunk,
    lose_a_file,
    reverse_files,
    lose_a_key,
    spoil_a_value,
)


# --------------------------------------------------------------------------------------------------------------------------- tests


def test_an_undamaged_checkpoint_loads(specimen: Specimen) -> None:
    assert checkpoint.verify(specimen.root) == STEP
    live = Live.new()
    assert checkpoint.load(specimen.root, model=live.model, optimizer=live.optimizer) == {"step": STEP}
    expected = train(0, STEP)
    assert _same(live.model.state_dict(), expected[0].state_dict())
    assert not live.is_unchanged()


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found_by_name_and_changes_nothing(damage: Damage, specimen: Specimen) -> None:
    for number in range(math.ceil(CASES / len(DAMAGES))):
        chance = random.Random(f"{damage.__name__} {number}")
        files = dict(specimen.files)
        words = damage(files, specimen.foreign, chance)
        specimen.damage(files)
        where = f"{damage.__name__}, case {number}"
        for act in (
            lambda: checkpoint.verify(specimen.root, STEP),
            lambda: checkpoint.load(specimen.root, step=STEP, model=specimen.live.model, optimizer=specimen.live.optimizer),
        ):
            error = specimen.error_of(act)
            assert error is not None, f"{where} was not found"
            told = str(error)
            names = [word for word in words if word not in told]
            if damage is edit_with_marker:  # what is wrong may be in what it says of a shard
                names = [] if any(name in told for name in ("manifest.json", *SHARDS)) else words
            assert not names, f"{where}: {names} not in: {told}"
            assert NAME in told, where
            assert specimen.live.is_unchanged(), where


def test_load_falls_back_to_the_checkpoint_before_with_a_warning(specimen: Specimen) -> None:
    for damage in (flip_many, truncate, lose, take_from_another_run, add_a_shard):
        files = dict(specimen.files)
        words = damage(files, specimen.foreign, random.Random(1))
        specimen.damage(files)
        live = Live.new()
        with pytest.warns(UserWarning, match="Falling back") as caught:
            extra = checkpoint.load(specimen.root, model=live.model, optimizer=live.optimizer)
        assert extra == {"step": OLDER}
        assert all(word in str(caught[0].message) for word in words)
        assert _same(live.model.state_dict(), train(0, OLDER)[0].state_dict())
        with pytest.warns(UserWarning, match=NAME):
            assert checkpoint.latest(specimen.root) == OLDER
        with pytest.warns(UserWarning, match=NAME):  # and the last one that is whole is not pruned
            assert checkpoint.prune(specimen.root, 1) == []
    shutil.rmtree(specimen.root / f"step-{OLDER:09d}")
    with (
        pytest.warns(UserWarning, match="Falling back"),
        pytest.raises(checkpoint.DamagedError, match=r"no checkpoint in .* that verifies"),
    ):
        checkpoint.load(specimen.root, model=specimen.live.model, optimizer=specimen.live.optimizer)
    assert specimen.live.is_unchanged()


def swap_names(content: Content, chance: random.Random) -> None:
    """Of two tensors of one shape and dtype: the headers of the shards say which is which."""
    rows = [row for row in content["tensors"] if (row["kind"], row["shape"]) == ("model", [9, 4])]
    rows[0]["name"], rows[1]["name"] = rows[1]["name"], rows[0]["name"]


def swap_kinds(content: Content, chance: random.Random) -> None:
    rows = [row for row in content["tensors"] if row["name"] == "layers.1.weight" and row["kind"] != "model"]
    rows[0]["kind"], rows[1]["kind"] = rows[1]["kind"], rows[0]["kind"]


def change_dtype(content: Content, chance: random.Random) -> None:
    a_tensor(content, chance)["dtype"] = "I32"


def transpose(content: Content, chance: random.Random) -> None:
    row = chance.choice([row for row in content["tensors"] if len(row["shape"]) == 2 and len(row["chunks"]) == 1])
    row["shape"].reverse()


@pytest.mark.parametrize("edit", [swap_names, swap_kinds, change_dtype, transpose])
def test_a_manifest_that_contradicts_the_headers_of_shards_is_damaged(edit: Callable[..., None], specimen: Specimen) -> None:
    files = dict(specimen.files)
    content = json.loads(files["manifest.json"])
    edit(content, random.Random(0))
    files["manifest.json"] = json.dumps(content).encode()
    files["COMMITTED"] = hashlib.sha256(files["manifest.json"]).hexdigest().encode() + b"\n"
    specimen.damage(files)
    with pytest.raises(checkpoint.DamagedError, match="shard-0000"):
        checkpoint.verify(specimen.root, STEP)


def set_step(value: Any) -> Callable[[Content], None]:
    """Of a parameter."""
    return lambda content: content["parameters"]["steps"].update({"layers.1.weight": value})


def set_extra(value: Any) -> Callable[[Content], None]:
    return lambda content: content.update(extra=value)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def grow_a_header(content: Content) -> None:
    content["files"][0] |= {"size": 2 * 10**9, "header_size": 10**9}


def grow_a_chunk(content: Content) -> None:
    """As large as its tensor and its file."""
    row = content["tensors"][0]
    row |= {"shape": [2**30], "dtype": "F32", "chunks": [[0, 8, 2**32, 0, 2**30, 2**30, 1, "0" * 64]]}


def put_into_two_groups(content: Content) -> None:
    groups = content["parameters"]["groups"]
    groups.append(groups[0])


def put_twice_into_a_group(content: Content) -> None:
    names = content["parameters"]["groups"][0]["params"]
    names.append(names[0])


def add_a_tensor(kind: str, name: str, shape: list[int]) -> Callable[[Content], None]:
    """Without elements."""
    return lambda content: content["tensors"].append({"kind": kind, "name": name, "shape": shape, "dtype": "F32", "chunks": []})


def set_hyperparameter(key: str, value: Any) -> Callable[[Content], None]:
    return lambda content: content["parameters"]["groups"][0]["hyperparameters"].update({key: value})


HYPERPARAMETERS: list[tuple[str, Any]] = [
    ("lr", {"$float": "nan"}),
    ("lr", -1),
    ("lr", []),
    ("lr", None),
    ("lr", "x"),
    ("eps", {"$float": "inf"}),
    ("weight_decay", -0.5),
    ("betas", {"$tuple": [5, 0.9]}),
    ("betas", 0.9),
    ("reference_lr", {"$float": "nan"}),
    ("learns_reference_lr", {"$float": "nan"}),
    ("kahan_sum", "x"),
    ("stochastic_rounding", 2),
    ("rounding_seed", {"$float": "nan"}),
    ("rounding_seed", -5.5),
    ("decay_form", "x"),
    ("decay_form", []),
]


def rename_a_tensor(content: Content) -> None:
    content["tensors"][0]["name"] = "layers.\ud800"


IMPOSSIBLE: dict[str, tuple[Callable[[Content], None], str]] = {
    "a step counter of NaN": (set_step({"$float": "nan"}), r"step counter of 'layers.1.weight' is nan"),
    "an infinite step counter": (set_step({"$float": "inf"}), r"step counter of 'layers.1.weight' is inf"),
    "a step counter beyond all counts": (set_step(1e300), r"step counter of 'layers.1.weight' is 1e\+300"),
    "a step counter that is no float": (set_step(10**400), r"step counter of 'layers.1.weight' is 10000"),
    "half a step": (set_step(0.5), r"step counter of 'layers.1.weight' is 0.5"),
    "a negative step counter": (set_step(-1), r"step counter of 'layers.1.weight' is -1"),
    "a step counter that is text": (set_step("3"), r"step counter of 'layers.1.weight' is '3'"),
    "a step counter that is a truth": (set_step(True), r"step counter of 'layers.1.weight' is True"),
    "no step counter": (set_step(None), r"step counter of 'layers.1.weight' is None"),
    "a literal that is no JSON": (set_extra(math.nan), "NaN, which is not finite"),
    "another": (set_extra([-math.inf]), "-Infinity, which is not finite"),
    "nesting that no stack holds": (set_extra(nested(900)), "nested too deeply"),
    "a header for which there is no memory": (grow_a_header, "header of 1000000000 bytes; the limit is 100000000"),
    "a chunk for which there is no memory": (grow_a_chunk, "has 4294967296 bytes; the limit is 4194304"),
    "a dimension that no tensor has": (lambda content: content["tensors"][0].update(shape=[2**63, 0], chunks=[]), "has shape"),
    "half a character in a name": (rename_a_tensor, "lone surrogate"),
    "a name that is none": (lambda content: content["tensors"][0].update(name=None), "None is not a name"),
    "saved by nobody": (lambda content: content.update(world_size=0), "saved by 0 ranks"),
    "a parameter in two groups": (put_into_two_groups, "is in two param groups"),
    "a dict with a key twice": (set_extra({"$items": [[1, 2], [1, 3]]}), "has a key twice"),
    "a parameter twice in a group": (put_twice_into_a_group, "or twice in one"),
    "a format that there never was": (lambda content: content.update(version=[0, 0]), "which never existed"),
    "a requirement that is no list": (lambda content: content.update(requires="abc"), "not a list"),
    "a shape that no tensor has": (add_a_tensor("model", "new", [2**62, 2**62, 0]), "has shape"),
    "state of no parameter": (add_a_tensor("exp_avg", "new", [0]), "'new' is in no param group"),
    "steps of no parameter": (lambda content: content["parameters"]["steps"].update(new=1), "'new' has a step counter, but is in no"),
    **{f"{key} of {value}": (set_hyperparameter(key, value), key) for key, value in HYPERPARAMETERS},
    "a float that JSON has": (set_extra({"$float": "1.5"}), "marked as a float"),
    "a shape that is to be guessed": (set_extra({"$array": ["<f4", [-1], "AAAAAA=="]}), r"has shape \[-1\]"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_a_manifest_with_impossible_values_is_damaged(what: str, specimen: Specimen) -> None:
    """Before any memory is allocated for it; the checkpoint before it is loaded."""
    edit, words = IMPOSSIBLE[what]
    content = json.loads(specimen.files["manifest.json"])
    edit(content)
    assert_passed_over(json.dumps(content), words, specimen)


TWICE = {
    "the step": ('"step": 4', '"step": 2, "step": 4', "step"),
    "a tensor's name": ('"name": "layers.0.bias"', '"name": "layers.9.bias", "name": "layers.0.bias"', "name"),
    "a step counter": ('"layers.1.weight": 4.0', '"layers.1.weight": 3.0, "layers.1.weight": 4.0', "layers.1.weight"),
    "a number that is infinite": ('"lr": 0.01', '"lr": 1e999', "1e999"),
}


@pytest.mark.parametrize("what", TWICE)
def test_a_manifest_with_duplicate_keys_or_infinite_numbers_is_damaged(what: str, specimen: Specimen) -> None:
    """The last one does not win."""
    was, becomes, word = TWICE[what]
    text = specimen.files["manifest.json"].decode()
    assert was in text
    assert_passed_over(text.replace(was, becomes), word, specimen)


@pytest.mark.timeout(20)
def test_a_duplicate_among_many_keys_is_found_in_linear_time(specimen: Specimen) -> None:
    """Not in a time that grows with the square of their number."""
    keys = ", ".join(f'"k{number}": 1' for number in range(200_000))
    text = specimen.files["manifest.json"].decode().replace('"wrapper": {}', f'"wrapper": {{{keys}, "k199999": 2}}')
    with pytest.raises(checkpoint.DamagedError, match="has the key 'k199999' twice"):
        parse(text.encode(), "manifest.json")


def assert_passed_over(manifest: str, words: str, specimen: Specimen) -> None:
    """A manifest with its marker is found to be damaged, by name, and the checkpoint before it is loaded."""
    marker = hashlib.sha256(manifest.encode()).hexdigest().encode() + b"\n"
    specimen.damage(specimen.files | {"manifest.json": manifest.encode(), "COMMITTED": marker})
    for act in (
        lambda: checkpoint.describe(specimen.root, STEP),
        lambda: checkpoint.verify(specimen.root, STEP),
        lambda: checkpoint.load(specimen.root, step=STEP, model=specimen.live.model, optimizer=specimen.live.optimizer),
    ):
        with pytest.raises(checkpoint.DamagedError, match=rf"manifest.json(.|\n)*{words}"):
            act()
    assert specimen.live.is_unchanged()
    with pytest.warns(UserWarning, match=words):
        assert checkpoint.latest(specimen.root) == OLDER
    live = Live.new()
    with pytest.warns(UserWarning, match="Falling back"):
        assert checkpoint.load(specimen.root, model=live.model, optimizer=live.optimizer) == {"step": OLDER}


COUNTERS = {"global_steps": 4, "global_samples": 8, "skipped_steps": 0, "micro_steps": 4, "loss_scaler": {"cur_scale": 65536.0}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"global_steps": 0.5}, r"global_steps is 0\.5"),
        ({"global_steps": -1}, "global_steps is -1"),
        ({"micro_steps": None}, "micro_steps is None"),
        ({"skipped_steps": {"$float": "nan"}}, "skipped_steps is nan"),
        ({"loss_scaler": {"cur_scale": {"$float": "inf"}}}, "cur_scale of DeepSpeed's loss scaler is inf"),
        ({"loss_scaler": []}, r"loss scaler is \[\]"),
    ],
)
def test_impossible_counters_of_deepspeed_are_damage(
    change: Content, words: str, specimen: Specimen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is found before anything has changed."""
    resumed: list[Any] = []

    def under_deepspeed(model: Any) -> LiveModel:
        return replace(
            live_model(model),
            wrapper_state={"deepspeed": {}},
            check_wrapper_state=deepspeed.check_state,
            restore_wrapper_state=resumed.append,
        )

    monkeypatch.setattr(loading, "live_model", under_deepspeed)
    content = json.loads(specimen.files["manifest.json"]) | {"wrapper": {"deepspeed": COUNTERS}}
    for wrong in (change, {}):
        content["wrapper"] = {"deepspeed": COUNTERS | wrong}
        manifest = json.dumps(content).encode()
        specimen.damage(specimen.files | {"manifest.json": manifest, "COMMITTED": hashlib.sha256(manifest).hexdigest().encode() + b"\n"})
        live = Live.new()
        if wrong:
            with pytest.raises(checkpoint.DamagedError, match=f"manifest.json: .*{words}"):
                checkpoint.load(specimen.root, step=STEP, model=live.model, optimizer=live.optimizer)
            assert live.is_unchanged()
        else:
            checkpoint.load(specimen.root, step=STEP, model=live.model, optimizer=live.optimizer)
            assert resumed == [COUNTERS]


@pytest.mark.parametrize("count", [math.nan, 0.5, -1.0, 2.0**60])
def test_a_step_counter_that_cannot_be_loaded_is_not_saved(count: float, tmp_path: Path) -> None:
    model, optimizer = train(0, 1)
    optimizer.state[model.layers[1].weight]["step"].fill_(count)
    with pytest.raises(checkpoint.CheckpointError, match=r"step counter of 'layers.1.weight' is"):
        checkpoint.save(tmp_path, 1, model=model, optimizer=optimizer)
    assert checkpoint.steps(tmp_path) == []


def test_a_lost_marker_is_reported(specimen: Specimen) -> None:
    files = dict(specimen.files)
    del files["COMMITTED"]
    specimen.damage(files)
    live = Live.new()
    with pytest.warns(UserWarning, match="COMMITTED"):
        assert checkpoint.load(specimen.root, model=live.model, optimizer=live.optimizer) == {"step": OLDER}


# --------------------------------------------------------------------------------------------------------------------- no unpickling

LOAD = """
import pickle, sys, warnings
import torch
warnings.simplefilter("ignore")
sys.path[:0] = {path!r}
from test_checkpoint_corruption import Live, checkpoint

seen = []
watched = ("pickle.", "exec", "compile", "marshal.", "os.system", "os.exec", "os.posix_spawn", "subprocess.", "ctypes.dlopen")


def hook(event, arguments):
    if watching and event.startswith(watched):
        seen.append(event)
        raise RuntimeError(f"{{event}} {{arguments}}")


def refuse(*arguments, **options):
    raise RuntimeError("unpickling")


live = Live.new()
watching = False
sys.addaudithook(hook)
checkpoint.load({root!r}, model=live.model, optimizer=live.optimizer)  # imports what it needs
pickled = pickle.dumps(Live)
pickle.load = pickle.loads = pickle.Unpickler = pickle._Unpickler = torch.load = refuse
live = Live.new()
watching = True
checkpoint.load({root!r}, model=live.model, optimizer=live.optimizer)
checkpoint.verify({root!r})
checkpoint.describe({root!r})
assert not seen and not live.is_unchanged()
import _pickle
try:
    _pickle.loads(pickled)
except RuntimeError:
    print("loaded, and the hook works", seen)
"""


def test_loading_runs_no_code_from_a_file(specimen: Specimen) -> None:
    """An audit hook hears of every class that is unpickled, and of all code that is compiled, imported or run."""
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(so.__file__).parents[1])]
    code = LOAD.format(path=path, root=str(specimen.root))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert result.stdout.strip() == "loaded, and the hook works ['pickle.find_class']", result.stderr


def check_what_ranks_tell_each_other(root: str) -> None:
    """torch pickles what they exchange; but that is parsed: plain values, of which nothing can run."""
    told: list[Any] = []
    gather = dist.all_gather_object

    def recorded(objects: list[Any], value: Any, group: Any = None) -> None:
        told.append(value)
        gather(objects, value, group=group)

    model, optimizer = train(7, 1, dist.get_rank(), 2)
    dist.all_gather_object = recorded
    try:
        checkpoint.load(root, model=model, optimizer=optimizer)
    finally:
        dist.all_gather_object = gather
    assert told
    assert all(map(is_plain, told)), told


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return type(value) is dict and all(map(is_plain, value.keys())) and all(map(is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return type(value) in (list, tuple, set, frozenset) and all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def test_ranks_that_load_exchange_plain_values_only(specimen: Specimen) -> None:
    ranks.run(check_what_ranks_tell_each_other, 2, str(specimen.root))
