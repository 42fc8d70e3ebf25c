"""What a manifest says of values is JSON, and comes back as it was: types, bits, keys and order."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
)
keys = st.one_of(
    st.text(max_size=5), st.sampled_from(["$float", "$tensor"]), st.integers(), st.booleans(), st.none(), st.tuples(st.integers())
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=12,
)


def assert_same(found: Any, value: Any) -> None:
    assert type(found) is type(value)
    if isinstance(value, float):
        assert struct.pack("d", found) == struct.pack("d", value) or (math.isnan(found) and math.isnan(value))
    elif isinstance(value, dict):
        assert len(found) == len(value)
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
def test_a_value_comes_back_through_json_as_it_was(value: Any) -> None:
    text = json.dumps(encode(value, "extra"), allow_nan=False)
    assert_same(decode(json.loads(text)), value)


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (2, 3)])
def test_a_tensor_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    size = math.prod(shape) * dtype.itemsize
    content = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    tensor = content.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    for each in (tensor, tensor.mT if tensor.ndim > 1 else tensor):
        found = decode(json.loads(json.dumps(encode({"a": [each]}, "extra"))))["a"][0]
        assert found.dtype == dtype
        assert found.shape == each.shape
        assert torch.equal(found.contiguous().view(-1).view(torch.uint8), each.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, 1j, torch.device("cpu"), torch.zeros(2**19), torch.float32, range(3), {"a": [{"b": len}]}]
)
def test_what_a_manifest_cannot_hold_is_refused_by_its_place(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^extra.*(which a checkpoint cannot hold|a checkpoint holds ordinary tensors up to 1048576 bytes)"
    ):
        encode(value, "extra")


@pytest.mark.parametrize("value", [{"$object": 1}, {"$": 1}, {"$float": "x"}, [{"$pickle": "gASVAAAA"}]])
def test_an_unknown_mark_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"marked|convert"):
        decode(value)


def test_a_hyperparameter_that_numpy_has_computed_is_saved() -> None:
    """A float by inheritance, which optimizers take."""
    found = decode(json.loads(json.dumps(encode({"lr": np.float64(0.1)}, "param_groups[0]"))))
    assert found == {"lr": 0.1}
