"""Values in manifests are JSON, and are restored exactly: types, bits, keys and order."""

from __future__ import annotations

import enum
import json
import math
import random
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler, swa_utils

import sharded_optim as so
from sharded_optim.checkpoint.dtypes import DTYPES
from sharded_optim.checkpoint.values import decode, encode

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from(["$", "$float", "$tuple", "$items"]),
    st.binary(max_size=40),
    st.floats().map(np.float64),
    st.floats(width=32).map(np.float32),
    st.integers(0, 255).map(np.uint8),
    st.booleans().map(np.bool_),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4).map(lambda numbers: np.array(numbers, dtype=np.int64)),
)
keys = st.one_of(
    st.text(max_size=5), st.sampled_from(["$float", "$tensor"]), st.integers(), st.booleans(), st.none(), st.tuples(st.integers())
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.dictionaries(keys, inner, max_size=4).map(lambda content: defaultdict(list, content)),
        st.dictionaries(keys, st.integers(), max_size=4).map(Counter),
    ),
    max_leaves=12,
)


def assert_same(found: Any, value: Any) -> None:
    assert type(found) is type(value)
    if isinstance(value, np.ndarray | np.generic):
        assert (found.dtype, found.shape, found.tobytes()) == (value.dtype, value.shape, value.tobytes())
    elif isinstance(value, float):
        assert struct.pack("d", found) == struct.pack("d", value) or (math.isnan(found) and math.isnan(value))
    elif isinstance(value, dict):
        assert len(found) == len(value)
        if isinstance(value, defaultdict):
            assert found.default_factory is value.default_factory
        for (one, inner), (other, expected) in zip(found.items(), value.items(), strict=True):
            assert_same(one, other)
            assert_same(inner, expected)
    elif isinstance(value, list | tuple):
        assert len(found) == len(value)
        for inner, expected in zip(found, value, strict=True):
            assert_same(inner, expected)
    else:
        assert found == value


@settings(deadline=None, max_examples=200)
@given(values)
def test_a_value_is_restored_from_json(value: Any) -> None:
    text = json.dumps(encode(value, "extra"), allow_nan=False)
    assert_same(decode(json.loads(text)), value)


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (2, 3)])
def test_a_tensor_is_restored_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    size = math.prod(shape) * dtype.itemsize
    content = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    tensor = content.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    for each in (tensor, tensor.mT if tensor.ndim > 1 else tensor):
        found = decode(json.loads(json.dumps(encode({"a": [each]}, "extra"))))["a"][0]
        assert found.dtype == dtype
        assert found.shape == each.shape
        assert torch.equal(found.contiguous().view(-1).view(torch.uint8), each.contiguous().view(-1).view(torch.uint8))


class Color(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


class Text(str, enum.Enum):
    A = "a"


class Names(list):
    """A list with a type of its own."""


class Table(dict):
    """A dict with a type of its own."""


Pair = namedtuple("Pair", "a b")
contains_itself: list[Any] = []
contains_itself.append(contains_itself)

REFUSED = [
    object(),
    {1, 2},
    frozenset(),
    1j,
    torch.device("cpu"),
    torch.zeros(2**19),
    torch.float32,
    torch.Size((1, 2)),
    range(3),
    {"a": [{"b": len}]},
    deque([1]),
    bytearray(b"a"),
    Color.RED,
    Number.ONE,
    Text.A,
    Names("ab"),
    Table(a=1),
    Pair(1, 2),
    defaultdict(lambda: 0),
    {"a": defaultdict(set)},
    {Pair(1, 2): 3},
    np.str_("a"),
    np.datetime64("2026-01-01"),
    np.array(["a"], dtype=object),
    np.zeros(2**18 + 1, dtype=np.float32),
    contains_itself,
    2**20_000,
]


UNNAMED: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "a tensor of torch.sparse_coo"),
    "meta": (lambda: torch.ones(2, device="meta"), "a tensor on the device meta"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a tensor nested"),
    "conjugate": (lambda: torch.ones(2, dtype=torch.complex64).conj(), "torch.complex64"),
    "an attribute": (lambda: with_attribute(Counter("a"), "note", 1), "a Counter with the attribute 'note'"),
    "a large int": (lambda: 2**10_000, "an int of 10001 bits"),
}


def with_attribute(value: Any, name: str, content: Any) -> Any:
    setattr(value, name, content)
    return value


@pytest.mark.parametrize("kind", UNNAMED)
@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_an_unsupported_value_is_refused_with_its_type(kind: str) -> None:
    make, words = UNNAMED[kind]
    with pytest.raises(ValueError, match=rf"^extra\[0\] is (a|an|of) ?.*{words.removeprefix('a ').removeprefix('an ')}"):
        encode([make()], "extra")


def test_state_dicts_and_parameters_keep_their_types() -> None:
    """A module's state dict has the versions of its modules as an attribute."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state: Any = model.state_dict()
    value = {"ema": state, "free": nn.Parameter(torch.ones(2)), "frozen": nn.Parameter(torch.ones(2), requires_grad=False)}
    found = decode(json.loads(json.dumps(encode(value, "extra"))))
    assert list(found["ema"]) == list(state)
    assert_same(found["ema"]._metadata, state._metadata)
    model.load_state_dict(found["ema"])
    assert [(type(found[key]), found[key].requires_grad) for key in ("free", "frozen")] == [(nn.Parameter, True), (nn.Parameter, False)]
    negative = torch._neg_view(torch.ones(2))
    assert torch.equal(decode(encode(negative, "extra")), negative)


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_an_unsupported_value_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^(a key of )?extra.*(which a checkpoint cannot hold|a checkpoint holds ordinary tensors up to 1048576 bytes)"
    ):
        encode(value, "extra")


NOT_KNOWN = [{"$array": ["|O", [1], "AAAAAA=="]}, {"$defaultdict": ["eval", []]}]


@pytest.mark.parametrize("value", [{"$object": 1}, {"$": 1}, {"$float": "x"}, [{"$pickle": "gASVAAAA"}], *NOT_KNOWN])
def test_an_unknown_mark_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"marked|convert"):
        decode(value)


def test_a_hyperparameter_that_numpy_has_computed_is_saved() -> None:
    """A float by inheritance, which optimizers take."""
    found = decode(json.loads(json.dumps(encode({"lr": np.float64(0.1)}, "param_groups[0]"))))
    assert found == {"lr": 0.1}


def test_hyperparameters_are_saved_as_plain_numbers(tmp_path: Path) -> None:
    """Ranks may have computed them in different ways, and a checkpoint needs no NumPy."""
    optimizer = so.AdamW([nn.Parameter(torch.ones(2))], lr=np.float64(0.1), betas=(np.float64(0.9), 0.99), backend="eager")
    so.checkpoint.save(tmp_path, 1, optimizer=optimizer)
    parameters = so.checkpoint.describe(tmp_path).parameters
    assert parameters is not None
    (group,) = parameters.groups
    assert (type(group["lr"]), group["lr"]) == (float, 0.1)
    assert list(map(type, group["betas"])) == [float, float]


class Float(float):
    """A float with a type of its own, as configurations have them."""


Betas = namedtuple("Betas", "first second")


def test_hyperparameters_of_classes_that_inherit_from_numbers_are_saved_as_these(tmp_path: Path) -> None:
    """Optimizers take them, so the first save does."""
    groups = [
        {"params": [nn.Parameter(torch.ones(2))], "tag": Text.A, "rank": Number.ONE, "names": Names("ab"), "table": Table(a=Float(1))}
    ]
    optimizer = so.AdamW(groups, lr=Float(0.1), betas=Betas(Float(0.9), np.float32(0.5)), backend="eager")
    so.checkpoint.save(tmp_path, 1, optimizer=optimizer)
    so.checkpoint.load(tmp_path, optimizer=optimizer)
    (group,) = optimizer.param_groups
    expected = {"lr": 0.1, "betas": (0.9, 0.5), "tag": "a", "rank": 1, "names": ["a", "b"], "table": {"a": 1.0}}
    for key, value in expected.items():
        assert_same(group[key], value)
    with pytest.raises(so.checkpoint.CheckpointError, match=r"extra\['lr'\] is a .*Float, which a checkpoint cannot hold"):
        so.checkpoint.save(tmp_path, 2, optimizer=optimizer, extra={"lr": Float(0.1)})


# ---------------------------------------------------------------------------------------------------------------- in `extra`

Optimizer = torch.optim.Optimizer
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7, 7, 12]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=30),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=7),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=8), lr_scheduler.MultiStepLR(o, [3, 5])], milestones=[8]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.MultiStepLR(o, [3, 5, 9])], optimizer=o
    ),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    assert {name for name in lr_scheduler.__all__ if name != "LRScheduler"} | {"SWALR"} == SCHEDULERS.keys()


def scheduled(name: str) -> tuple[so.AdamW, Any]:
    optimizer = so.AdamW([("w", nn.Parameter(torch.ones(3)))], lr=0.1, backend="eager")
    return optimizer, SCHEDULERS[name](optimizer)


def advance(optimizer: so.AdamW, scheduler: Any, steps: int) -> list[float]:
    """The learning rates of the steps."""
    lrs = []
    for _ in range(steps):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        lrs.append(optimizer.param_groups[0]["lr"])
    return lrs


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_state_of_a_scheduler_is_restored_and_continues(name: str, tmp_path: Path) -> None:
    """Past its milestones."""
    optimizer, scheduler = scheduled(name)
    advance(optimizer, scheduler, 5)
    state = scheduler.state_dict()
    so.checkpoint.save(tmp_path, 5, optimizer=optimizer, extra=state)
    resumed, its_scheduler = scheduled(name)
    found = so.checkpoint.load(tmp_path, optimizer=resumed)
    assert_same(found, state)
    its_scheduler.load_state_dict(found)
    assert advance(resumed, its_scheduler, 15) == advance(optimizer, scheduler, 15)


def test_the_states_of_random_number_generators_are_restored(tmp_path: Path) -> None:
    """Of Python, NumPy (both ways) and torch, and what a loader of data may keep of where it is."""
    model, generator = nn.Linear(1, 1), np.random.default_rng(0)
    extra = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "generator": generator.bit_generator.state,
        "mt19937": np.random.MT19937(1).state,
        "torch": torch.get_rng_state(),
        "loader": {"_snapshot": {"worker_0": {"position": np.int64(7), "seen": Counter("aab"), "rest": OrderedDict(a=[(1, None)])}}},
    }
    so.checkpoint.save(tmp_path, 1, model=model, extra=extra)
    expected = random.random(), np.random.random(), generator.random(), torch.rand(3).tolist()
    found = so.checkpoint.load(tmp_path)
    state = found.pop("torch")
    assert torch.equal(state, extra.pop("torch"))
    assert_same(found, extra)
    random.setstate(found["python"])
    np.random.set_state(found["numpy"])
    generator.bit_generator.state = found["generator"]
    torch.set_rng_state(state)
    assert (random.random(), np.random.random(), generator.random(), torch.rand(3).tolist()) == expected
