"""`muon_param_groups` sorts a model: hidden matrices to Muon, the rest to AdamW or StableAdamW."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import sharded_optim as so

MATRICES = {"layers.0.attention.in_proj_weight", "layers.0.attention.out_proj.weight", "layers.0.output.weight", "layers.0.experts"}
MATRICES |= {"layers.0.conv.weight", "layers.0.conv1d.weight"}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((2, 4))
        self.attention = nn.MultiheadAttention(8, 2)
        self.output = nn.Linear(8, 8)  # a layer's own, not the model's
        self.router = nn.Linear(8, 3, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 8, 6))
        self.conv = nn.Conv2d(4, 2, 3)
        self.conv1d = nn.Conv1d(4, 2, 3)


class Model(nn.Module):
    def __init__(self, *, tied: bool = False, head: str = "lm_head") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Layer()])
        self.scalar = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)
        setattr(self, head, nn.Linear(8, 11, bias=False))
        if tied:
            getattr(self, head).weight = self.embedding.weight


def names_by_algorithm(groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for group in groups:
        found.setdefault(group["algorithm"], set()).update(name for name, _ in group["params"])
    return found


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"head": "to_tokens"}], ids=str)
def test_hidden_matrices_go_to_muon_and_all_else_to_the_rest(options: dict[str, Any]) -> None:
    model = Model(**options)
    found = names_by_algorithm(so.muon_param_groups(model, rest="stable_adamw"))
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    assert found == {"muon": MATRICES, "stable_adamw": trainable - MATRICES}


def test_modules_tell_how_their_matrices_lie() -> None:
    """A fused projection is split, the weight of a one-dimensional convolution is no stack; and vectors do not decay."""
    groups = so.muon_param_groups(Model(), split={"layers.0.output": [3, 5]}, muon_options={"lr": 0.1}, rest_options={"lr": 0.2})
    by_name = {name: group for group in groups for name, _ in group["params"]}
    assert by_name["layers.0.attention.in_proj_weight"]["split"] == 8
    assert by_name["layers.0.output.weight"]["split"] == [3, 5]
    assert by_name["layers.0.conv1d.weight"]["stacked"] is False
    assert by_name["layers.0.experts"].keys() == {"params", "algorithm", "lr"}
    assert (by_name["layers.0.experts"]["lr"], by_name["embedding.weight"]["lr"]) == (0.1, 0.2)
    assert by_name["scalar"]["weight_decay"] == 0.0
    assert "weight_decay" not in by_name["embedding.weight"]
    optimizer = so.Muon(groups)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


def test_names_and_functions_override_and_the_text_says_why() -> None:
    texts: list[str] = []
    groups = so.muon_param_groups(Model(), to_muon="router", to_rest=lambda name, param: param.ndim == 4, show=texts.append)
    assert names_by_algorithm(groups)["muon"] == MATRICES - {"layers.0.conv.weight"} | {"layers.0.router.weight"}
    (text,) = texts
    for line in (
        "muon: 4 tensors",
        "muon (split=8): 1 tensors, 192 elements",
        "  layers.0.router.weight (3, 8)\n",
        "  layers.0.conv.weight (2, 4, 3, 3): to_rest",
        "  embedding.weight (11, 8): embedding",
        "  lm_head.weight (11, 8): output head",
        "  layers.0.norm.weight (2, 4): norm",
        "adamw (weight_decay=0.0)",
    ):
        assert line in f"{text}\n", text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to_muon": "attention.wq"}, "to_muon has 'attention.wq', which is part of the name of no trainable parameter"),
        ({"to_rest": ["frozen"]}, "to_rest has 'frozen'"),
        ({"split": {"qkv": 3}}, "split has 'qkv'"),
        ({"to_rest": ["conv"], "to_muon": ["conv1d.weight"]}, "to_muon and to_rest both fit 'layers.0.conv1d.weight'"),
        ({"to_rest": lambda name, param: True}, "no parameter of the model is a hidden matrix"),
    ],
    ids=["to_muon of nobody", "to_rest of nobody", "split of nobody", "both", "none left"],
)
def test_overrides_that_fit_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        so.muon_param_groups(Model(), **options)


def check_wrapped() -> None:
    expected = names_by_algorithm(so.muon_param_groups(Model()))
    sharded = Model()
    fully_shard(sharded.layers[0])
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), ignored_params={sharded.scalar})
    assert names_by_algorithm(so.muon_param_groups(sharded)) == expected
    replicated = names_by_algorithm(so.muon_param_groups(DistributedDataParallel(Model())))
    assert replicated == {algorithm: {f"module.{name}" for name in names} for algorithm, names in expected.items()}
    model = Model()
    flat = FullyShardedDataParallel(model, ignored_states=[model.scalar], use_orig_params=True, device_id=torch.device("cpu"))
    of_fsdp1 = names_by_algorithm(so.muon_param_groups(flat))
    assert of_fsdp1 == {algorithm: {f"_fsdp_wrapped_module.{name}" for name in names} for algorithm, names in expected.items()}
    model = Model()
    model.frozen.requires_grad_()
    flat = FullyShardedDataParallel(model, ignored_states=[model.scalar], device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"has flattened .* with \d+ others into one parameter.*use_orig_params=True.*fully_shard"):
        so.muon_param_groups(flat)


def test_a_wrapped_model_is_sorted_as_a_plain_one() -> None:
    """FSDP2, DDP, and FSDP1 with the original parameters; where it makes one of several, it is refused."""
    ranks.run(check_wrapped, 2)


def test_a_zero_dimensional_model_is_refused() -> None:
    class Scalars(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain: Tensor = nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="no parameter of the model is a hidden matrix"):
        so.muon_param_groups(Scalars())


def test_hidden_layers_with_as_many_outputs_as_there_are_positions_go_to_muon() -> None:
    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(50, 8), nn.Embedding(16, 8)
            self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 50)])
            self.decoder = nn.Linear(8, 50, bias=False)

    groups = so.muon_param_groups(Positioned())
    to_muon = {name for group in groups if group["algorithm"] == "muon" for name, _ in group["params"]}
    assert to_muon == {"layers.0.weight", "layers.1.weight", "layers.2.weight"}
