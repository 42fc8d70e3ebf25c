"""Models by their Hugging Face configs, as `plan` and `verify` take them. Needs transformers, which `make recipes` has."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sharded_optim.cli.commands import app
from sharded_optim.tools.plan import Attention, Setup, measure, plan
from sharded_optim.tools.shapes import Model, load

pytest.importorskip("transformers", reason="transformers is not installed; make recipes runs this file")

GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}


def llama_like(
    model_type: str, width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **others: Any
) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": model_type, **sizes, "num_key_value_heads": kv_heads, "vocab_size": vocabulary, **others}


def gpt_neox(width: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "gpt_neox", **sizes, "vocab_size": vocabulary}


PUBLISHED = {
    "gpt2": (GPT2, 124_439_808),
    "Llama-2-7B": (llama_like("llama", 4096, 11008, 32, 32, 32, 32000), 6_738_415_616),
    "Llama-3-8B": (llama_like("llama", 4096, 14336, 32, 32, 8, 128256), 8_030_261_248),
    "Llama-3-70B": (llama_like("llama", 8192, 28672, 80, 64, 8, 128256), 70_553_706_496),
    "Llama-3.2-1B": (llama_like("llama", 2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True, head_dim=64), 1_235_814_400),
    "Mistral-7B-v0.1": (llama_like("mistral", 4096, 14336, 32, 32, 8, 32000), 7_241_732_096),
    "Mixtral-8x7B": (llama_like("mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2), 46_702_792_704),
    "Qwen2.5-0.5B": (llama_like("qwen2", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True), 494_032_768),
    "Qwen2.5-7B": (llama_like("qwen2", 3584, 18944, 28, 28, 4, 152064), 7_615_616_512),
    "Qwen3-8B": (llama_like("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128), 8_190_735_360),
    "Phi-3-mini": (llama_like("phi3", 3072, 8192, 32, 32, 32, 32064), 3_821_079_552),
    "Gemma-2-2B": (llama_like("gemma2", 2304, 9216, 26, 8, 4, 256000, head_dim=256), 2_614_341_888),
    "Gemma-2-9B": (llama_like("gemma2", 3584, 14336, 42, 16, 8, 256000, head_dim=256), 9_241_705_984),
    "pythia-70m": (gpt_neox(512, 6, 8, 50304), 70_426_624),
    "GPT-NeoX-20B": (gpt_neox(6144, 44, 64, 50432), 20_554_567_680),
}


def of_config(config: dict[str, Any], folder: Path) -> Model:
    (folder / "config.json").write_text(json.dumps(config))
    return load(str(folder))  # as of a downloaded model


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_gives_as_many_parameters_as_are_published(name: str, tmp_path: Path) -> None:
    config, published = PUBLISHED[name]
    assert of_config(config, tmp_path).numel == published


def test_experts_that_a_token_does_not_use_do_not_compute_for_it(tmp_path: Path) -> None:
    model = of_config(PUBLISHED["Mixtral-8x7B"][0], tmp_path)
    assert model.numel - model.idle == 12_879_925_248  # published as 12.9B active parameters
    assert plan(model, "none", Setup()).flops_per_token == 6 * 12_879_925_248


@pytest.mark.parametrize(
    ("name", "layers", "heads", "head_dim"),
    [("gpt2", 12, 12, 64), ("Llama-3-8B", 32, 32, 128), ("Mixtral-8x7B", 32, 32, 128), ("Qwen3-8B", 36, 32, 128), ("pythia-70m", 6, 8, 64)],
)
def test_operations_of_attention_are_those_of_the_config(name: str, layers: int, heads: int, head_dim: int, tmp_path: Path) -> None:
    workload = measure(of_config(PUBLISHED[name][0], tmp_path), Setup(dtype="bf16"), sequence_length=256)
    assert workload.attention == Attention(layers=layers, heads=heads, head_dim=head_dim).flops(256)


@pytest.mark.parametrize("name", ["gpt2", "Qwen2.5-0.5B", "pythia-70m"])
def test_embeddings_that_are_the_head_too_are_multiplied_with(name: str, tmp_path: Path) -> None:
    """GPT-2's of positions, and pythia's, are not."""
    model = of_config(PUBLISHED[name][0], tmp_path)
    looked_up = {"gpt2": 1024 * 768, "Qwen2.5-0.5B": 0, "pythia-70m": 50304 * 512}[name]
    assert measure(model, Setup(), sequence_length=256).parameters == 6 * (model.numel - looked_up)


def test_more_checkpointing_keeps_less_of_a_config(tmp_path: Path) -> None:
    """A block that keeps keys and values for later tokens could not be recomputed."""
    model = of_config(PUBLISHED["Qwen2.5-0.5B"][0] | {"vocab_size": 1000}, tmp_path)
    profiles = [
        measure(model, Setup(dtype="bf16"), tokens=512, sequence_length=256, checkpointing=each, activations="profile").activations
        for each in ("none", "selective", "full")
    ]
    assert profiles == sorted(set(profiles), reverse=True)
    assert len(profiles) == 3


def test_what_experts_recompute_is_unknown(tmp_path: Path) -> None:
    """torch has no formula for their grouped products."""
    config = llama_like("mixtral", 64, 128, 2, 4, 2, 97, num_local_experts=4, num_experts_per_tok=2)
    workload = measure(of_config(config, tmp_path), Setup(dtype="bf16"), sequence_length=64, checkpointing="full")
    assert workload.recomputed is None
    assert "_grouped_mm" in workload.unknown["recomputed"]
    assert workload.attention == Attention(layers=2, heads=4, head_dim=16).flops(64)


def test_a_model_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"transformers cannot build the model of .*no_such_model"):
        of_config({"model_type": "no_such_model"}, tmp_path)


def test_the_architecture_of_a_config_is_built(tmp_path: Path) -> None:
    classifier = of_config(GPT2 | {"architectures": ["GPT2ForSequenceClassification"]}, tmp_path)
    assert classifier.shapes["score.weight"] == (2, 768)


def test_the_documentation_shows_what_the_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    (config,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (tmp_path / "config.json").write_text(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    examples = re.findall(r"```\n\$ sharded-optim (plan .*?[^\\])\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    for command, shown in examples:
        result = CliRunner().invoke(app, command.replace("\\\n", " ").split())
        assert result.exit_code == 0, result.output
        assert [line.strip() for line in shown.splitlines() if line.strip()] == [
            line.strip() for line in result.output.splitlines() if line.strip()
        ]


def test_verify_takes_a_config(tmp_path: Path) -> None:
    small = GPT2 | {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32, "vocab_size": 97}
    (tmp_path / "config.json").write_text(json.dumps(small))
    result = CliRunner().invoke(app, ["verify", str(tmp_path), "--steps", "2", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["verdict"] == "bitwise"
