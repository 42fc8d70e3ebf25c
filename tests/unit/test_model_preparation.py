"""Preparing a model gives what optimi's functions of the same names give, and more where optimi's would be wrong."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import optimi
import pytest
import torch
from torch import nn

import sharded_optim as so

FUNCTIONS = ["param_groups_weight_decay", "to_low_precision"]


class RotaryEmbedding(nn.Module):
    """Frequencies that bfloat16 would spoil, and a position counter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10_000.0 ** -(torch.arange(width) / width))
        self.register_buffer("cached", torch.linspace(0, 700, 9), persistent=False)
        self.register_buffer("position", torch.arange(5))
        self.register_buffer("unused", None)


class Block(nn.Module):
    """Attention-like: parameters of its own, norms, a rotary submodule."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rotary_emb = RotaryEmbedding(width)
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, 3, bias=False)
        self.gate = nn.Parameter(torch.randn(()))
        self.bias = nn.Parameter(torch.randn(2, 3))  # of two dimensions, and exempt by its name
        self.biased = nn.Parameter(torch.randn(3, 2))


class Model(nn.Module):
    """Embeddings, blocks, batch statistics, integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.blocks = nn.ModuleList(Block(7) for _ in range(2))
        self.conv = nn.Sequential(nn.Conv1d(3, 5, 2), nn.BatchNorm1d(5))
        self.head = nn.Linear(7, 11)
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool))
        self.register_buffer("scale", torch.rand(3))


def frozen() -> nn.Module:
    model = Model()
    model.embed.weight.requires_grad_(False)
    model.blocks[1].requires_grad_(False)
    return model


def tied() -> nn.Module:
    """Two linear layers of one weight."""
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    return model


def with_grads() -> nn.Module:
    model = Model()
    for param in list(model.parameters())[::2]:
        param.grad = torch.randn_like(param)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 1),
    "vectors alone": lambda: nn.BatchNorm1d(3),
    "matrices alone": lambda: nn.Linear(3, 5, bias=False),
    "no parameters": lambda: nn.Sequential(nn.ReLU(), RotaryEmbedding(3)),
    "model": Model,
    "frozen": frozen,
    "tied": tied,
    "with gradients": with_grads,
}
every_model = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> tuple[nn.Module, nn.Module]:
    """Two equal models."""
    torch.manual_seed(0)
    model = MODELS[name]()
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_signatures_and_defaults_are_optimis(function: str) -> None:
    ours, theirs = (inspect.signature(getattr(library, function)).parameters.values() for library in (so, optimi))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


# -------------------------------------------------------------------------------------------------------------------- param groups


@every_model
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.3},
        {"additional_layers": ["embed", "blocks.1."]},
        {"additional_layers": {"weight"}},
        {"additional_layers": ()},
    ],
    ids=str,
)
def test_param_groups_are_optimis_without_the_empty_ones(name: str, options: dict) -> None:
    model, _ = make(name)
    ours = so.param_groups_weight_decay(model, **options)
    theirs = [group for group in optimi.param_groups_weight_decay(model, **options) if group["params"]]
    assert [(group["weight_decay"], list(map(id, group["params"]))) for group in ours] == [
        (group["weight_decay"], list(map(id, group["params"]))) for group in theirs
    ]
    assert [set(group) for group in ours] == [{"params", "param_names", "weight_decay"}] * len(ours)


def test_biases_norms_scalars_and_named_layers_do_not_decay() -> None:
    model = frozen()
    names = {id(param): name for name, param in model.named_parameters()}
    without, decaying = so.param_groups_weight_decay(model, 0.2, additional_layers=iter(["head", "conv.0"]))
    assert (without["weight_decay"], decaying["weight_decay"]) == (0.0, 0.2)
    assert [names[id(param)] for param in decaying["params"]] == ["blocks.0.biased", "blocks.0.proj.weight"]
    assert [names[id(param)] for param in without["params"]] == [
        "blocks.0.gate",
        "blocks.0.bias",
        "blocks.0.norm.weight",
        "blocks.0.norm.bias",
        "conv.0.weight",
        "conv.0.bias",
        "conv.1.weight",
        "conv.1.bias",
        "head.weight",
        "head.bias",
    ]


def test_groups_keep_the_names_of_the_model() -> None:
    """In ours, in ShardedOptimizer, in torch's; and beside a group without names, which torch would refuse."""
    model = frozen()
    names = {id(param): name for name, param in model.named_parameters()}
    groups = so.param_groups_weight_decay(model, 1e-4)
    for group in groups:
        assert group["param_names"] == [names[id(param)] for param in group["params"]]
    extra = nn.Parameter(torch.ones(2))
    for given, expected in (([*groups, {"params": [extra]}], 2), ([{"params": [extra]}, *groups], 0)):
        optimizer = so.StableAdamW(given, lr=1e-2)
        assert optimizer.param_groups[expected]["param_names"] == [f"param_groups[{expected}].params[0]"]
        for param in [extra, *model.parameters()]:
            param.grad = torch.ones_like(param) if param.requires_grad else None
        optimizer.step()
        assert "rms/head.weight" in optimizer.metrics()
        optimizer.load_state_dict(optimizer.state_dict())
    torch.optim.AdamW(groups, lr=1e-2)
    sharded = so.ShardedOptimizer(groups, so.StableAdamW, lr=1e-2)
    sharded.step()
    assert "rms/head.weight" in sharded.metrics()


def test_groups_that_would_be_empty_are_left_out() -> None:
    assert [group["weight_decay"] for group in so.param_groups_weight_decay(nn.LayerNorm(3))] == [0.0]
    assert [group["weight_decay"] for group in so.param_groups_weight_decay(nn.Linear(3, 2, bias=False), 0.1)] == [0.1]
    assert so.param_groups_weight_decay(nn.ReLU()) == []
    assert so.param_groups_weight_decay(nn.Linear(3, 2).requires_grad_(False)) == []


@pytest.mark.parametrize("cls", [so.Adam, so.AdamW, so.DecoupledAdamW, so.DecoupledSGDW, so.StableAdamW], ids=lambda cls: cls.__name__)
def test_every_optimizer_takes_the_groups(cls: type) -> None:
    model = frozen()
    optimizer = cls(so.param_groups_weight_decay(model, 1e-4), lr=1e-2)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 1e-4]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(param.requires_grad for param in model.parameters())


# ------------------------------------------------------------------------------------------------------------------- low precision


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model, ties included."""
    found = {f"param {name}": param.detach() for name, param in model.named_parameters(remove_duplicate=False)}
    return found | {f"buffer {name}": buffer for name, buffer in model.named_buffers(remove_duplicate=False)}


@every_model
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float16},
        {"device": "cpu"},
        {"fp32_modules": None},
        {"fp32_modules": (nn.LayerNorm, nn.BatchNorm1d)},
        {"fp32_buffers": None},
        {"fp32_buffers": ("rotary",)},
        {"fp32_buffers": ["blocks.1", "conv"]},
        {"fp32_buffers": ("r",), "fp32_modules": nn.Linear},
        {"fp32_buffers": RotaryEmbedding},
        {"fp32_buffers": (nn.BatchNorm1d, RotaryEmbedding), "fp32_modules": ()},
    ],
    ids=str,
)
def test_casts_are_optimis_bit_for_bit(name: str, options: dict) -> None:
    model, other = make(name)
    ours, theirs = contents(so.to_low_precision(model, **options)), contents(optimi.to_low_precision(other, **options))
    assert {key: value.dtype for key, value in ours.items()} == {key: value.dtype for key, value in theirs.items()}
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert [param.requires_grad for param in model.parameters()] == [param.requires_grad for param in other.parameters()]
    assert list(model.state_dict()) == list(other.state_dict())


def test_by_default_embeddings_and_rotary_buffers_stay_in_float32_and_integers_as_they_are() -> None:
    model = so.to_low_precision(with_grads())
    kept = {name.split(" ")[1] for name, value in contents(model).items() if value.dtype == torch.float32}
    rotary = {f"blocks.{block}.rotary_emb.{buffer}" for block in range(2) for buffer in ("inv_freq", "cached")}
    assert kept == {"embed.weight"} | rotary
    other = {value.dtype for name, value in contents(model).items() if name.split(" ")[1] not in kept}
    assert other == {torch.bfloat16, torch.bool, torch.int64}


def test_gradients_are_cast_like_their_parameters() -> None:
    """optimi leaves them in float32."""
    model = with_grads()
    before = [None if param.grad is None else param.grad.clone() for param in model.parameters()]
    so.to_low_precision(model)
    for param, grad in zip(model.parameters(), before, strict=True):
        if grad is None:
            assert param.grad is None
        else:
            assert param.grad.dtype == param.dtype
            assert torch.equal(param.grad, grad.to(param.dtype))


def test_one_string_is_one_name_and_a_list_of_modules_is_taken() -> None:
    """optimi takes a string for its letters, and fails on a list."""
    model = nn.ModuleDict({"rotary": RotaryEmbedding(3), "tray": RotaryEmbedding(3), "norm": nn.LayerNorm(3), "linear": nn.Linear(3, 3)})
    so.to_low_precision(model, fp32_buffers="rotary", fp32_modules=[nn.LayerNorm, nn.Embedding])
    kept = {name for name, value in contents(model).items() if value.dtype == torch.float32}
    assert kept == {"param norm.weight", "param norm.bias", "buffer rotary.inv_freq", "buffer rotary.cached"}


@every_model
def test_the_model_and_its_parameters_keep_their_identity(name: str) -> None:
    model, _ = make(name)
    before = [id(param) for param in model.parameters()]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert so.to_low_precision(model) is model
    assert [id(param) for param in model.parameters()] == before
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == names


def test_an_optimizer_built_before_steps_the_cast_parameters() -> None:
    model = nn.Linear(3, 2)
    optimizer = so.AdamW(model.parameters(), lr=0.1)
    so.to_low_precision(model)
    before = model.weight.detach().clone()
    model(torch.ones(4, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert model.weight.grad.dtype == torch.bfloat16
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_weight_tied_to_an_embedding_keeps_float32_bits_in_either_order(embedding_first: bool) -> None:
    """optimi casts it with the last module that holds it, and may round it on the way."""
    embed, head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
    head.weight = embed.weight
    before = embed.weight.detach().clone()
    so.to_low_precision(nn.Sequential(embed, head) if embedding_first else nn.Sequential(head, embed))
    assert head.weight is embed.weight
    assert embed.weight.dtype == torch.float32
    assert torch.equal(embed.weight, before)


def test_a_buffer_of_two_names_in_one_module_is_cast_under_both() -> None:
    models = [nn.Module(), nn.Module()]
    for model in models:
        model.register_buffer("first", torch.linspace(0, 1, 7))
        model.register_buffer("second", model.get_buffer("first"))
    so.to_low_precision(models[0])
    optimi.to_low_precision(models[1])
    for model in models:
        assert (model.get_buffer("first").dtype, model.get_buffer("second").dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("name", ["RoPE", "ROPE", "Rotary_Emb", "my_rope2"])
@pytest.mark.parametrize("given", [("rope", "rotary"), ["ROPE", "Rotary"]])
def test_names_of_buffers_modules_match_in_any_case(name: str, given: object) -> None:
    model = nn.Module()
    model.add_module(name, RotaryEmbedding(5))
    model.add_module("other", RotaryEmbedding(5))
    so.to_low_precision(model, fp32_buffers=given)
    assert model.get_submodule(name).inv_freq.dtype == torch.float32
    assert model.get_submodule("other").inv_freq.dtype == torch.bfloat16


def test_parameters_below_a_kept_name_are_cast_all_the_same() -> None:
    """`fp32_buffers` is of buffers alone."""
    model = nn.ModuleDict({"rope": nn.BatchNorm1d(3)})
    so.to_low_precision(model)
    assert (model["rope"].weight.dtype, model["rope"].running_mean.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fp32_modules": "embed"}, r"fp32_modules must hold subclasses of torch.nn.Module, got 'e'"),
        ({"fp32_modules": [nn.Linear, "embed"]}, r"fp32_modules must hold subclasses of torch.nn.Module, got 'embed'"),
        ({"fp32_modules": int}, r"fp32_modules must hold subclasses of torch.nn.Module, got <class 'int'>"),
        ({"fp32_modules": [nn.Linear(1, 1)]}, r"fp32_modules must hold subclasses of torch.nn.Module, got Linear"),
        ({"fp32_buffers": ["rope", 3]}, r"fp32_buffers must hold strings and subclasses of torch.nn.Module, got \['rope', 3\]"),
        ({"fp32_buffers": int}, r"fp32_buffers must hold strings and subclasses of torch.nn.Module, got <class 'int'>"),
        ({"fp32_buffers": [nn.Linear, None]}, r"fp32_buffers must hold strings and subclasses of torch.nn.Module"),
    ],
)
def test_anything_else_is_refused_before_the_model_is_touched(options: dict, words: str) -> None:
    """With TypeError, as in optimi."""
    model = Model()
    before = {key: value.clone() for key, value in contents(model).items()}
    with pytest.raises(TypeError, match=words):
        so.to_low_precision(model, **options)
    assert all(value.dtype == before[key].dtype and torch.equal(value, before[key]) for key, value in contents(model).items())
    with pytest.raises(TypeError):
        optimi.to_low_precision(copy.deepcopy(model), **options)
