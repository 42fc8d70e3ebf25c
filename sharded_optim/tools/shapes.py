"""Read names and shapes of a model's parameters, without its weights: from a JSON file, a Hugging Face `config.json` or a module.

Used by `plan.py` and its command. A parameter that is used twice (tied embeddings) is counted once.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MODEL_TYPES", "Model", "from_config", "from_module", "from_shapes", "load"]

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The trainable parameters of a model."""

    shapes: Mapping[str, Shape]  # in the order of `named_parameters()`
    idle: int = 0  # elements that a token does not use: those of the experts to which it is not routed

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ValueError("a model needs parameters, got none; give {name: [sizes]} with at least one")
        for name, shape in self.shapes.items():
            if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape):
                raise ValueError(
                    f"a shape is a list of sizes >= 0, got {list(shape)!r} for {name!r}; give [] for a scalar, [3, 4] for a matrix"
                )

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


def load(source: str) -> Model:
    """Load the model that an argument of the command line names.

    Args:
        source: a JSON file {name: [sizes]}, a Hugging Face config.json or the folder with it, or `package.module:callable`, an nn.Module
            class or function that is called without arguments.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        if ":" in source:
            return from_module(source)
        raise ValueError(f"{source!r} is not a file; give a JSON file of shapes, a Hugging Face config.json, or package.module:callable")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source!r} is not JSON ({error}); give {{name: [sizes]}} or a Hugging Face config.json") from None
    if not isinstance(content, dict):
        raise ValueError(f"{source!r} holds a {type(content).__name__}; give {{name: [sizes]}} or a Hugging Face config.json")
    return from_config(content) if isinstance(content.get("model_type"), str) else from_shapes(content)


def from_shapes(shapes: Mapping[str, Any]) -> Model:
    """Build a model from {name: [sizes]}, in the order of `named_parameters()`."""
    for name, shape in shapes.items():
        if not isinstance(shape, list | tuple):
            raise ValueError(f"a shape is a list of sizes >= 0, got {shape!r} for {name!r}; a Hugging Face config has a 'model_type'")
    return Model(shapes={name: tuple(shape) for name, shape in shapes.items()})


def from_module(target: str) -> Model:
    """Build a model from `package.module:callable`, on torch's meta device, which allocates nothing."""
    import torch

    module_name, _, attribute = target.partition(":")
    try:
        build: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            build = getattr(build, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{target!r} cannot be imported ({error}); give package.module:callable, importable from the current folder"
        ) from error
    try:
        with torch.device("meta"):
            module = build()
    except Exception as error:  # whatever a model's constructor may raise
        raise ValueError(
            f"{target}() failed on the meta device ({type(error).__name__}: {error}); give a function without arguments, or shapes as JSON"
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"{target}() returned a {type(module).__name__}; give a callable that returns an nn.Module")
    for name, param in module.named_parameters():
        if not param.requires_grad:
            raise ValueError(f"a plan is of parameters that are all trained, {name!r} is frozen; give the shapes of the others as JSON")
    return Model(shapes={name: tuple(param.shape) for name, param in module.named_parameters()})


# ------------------------------------------------------------------------------------------------------------ Hugging Face configs


def from_config(config: Mapping[str, Any]) -> Model:
    """Build a model from a Hugging Face config.json, with the names and shapes of transformers 5.

    Only model types whose every parameter follows from the config; others are refused.
    """
    model_type = config["model_type"]
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"shapes are known for model_type {', '.join(MODEL_TYPES)}, got {model_type!r}; give its shapes as JSON {{name: [sizes]}}, or "
            "package.module:callable of a function that builds it"
        )
    architectures = config.get("architectures") or []
    if any(not name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise ValueError(f"shapes are known of language models with a head, got architectures {architectures}; give its shapes as JSON")
    for key in ("quantization_config", "add_cross_attention"):
        if config.get(key):
            raise ValueError(f"{key!r} changes the parameters in ways that are not known here; remove it, or give the shapes as JSON")
    return MODEL_TYPES[model_type](_Config(config))


@dataclass(frozen=True)
class _Config:
    """A config.json whose values are checked when they are asked for."""

    values: Mapping[str, Any]

    def count(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{key!r} of a {self.values['model_type']} config is a number >= 1, got {value!r}; is this its whole config.json?"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key!r} of a {self.values['model_type']} config is true or false, got {value!r}")
        return value

    def quotient(self, key: str, divisor: str) -> int:
        whole, parts = self.count(key), self.count(divisor)
        if whole % parts:
            raise ValueError(f"{divisor!r} divides {key!r} unless 'head_dim' is given, got {parts} and {whole}")
        return whole // parts


@dataclass(frozen=True, kw_only=True)
class _Traits:
    """The differences between descendants of Llama."""

    head_dim: int | None = None  # where the config has none; None: hidden_size / num_attention_heads
    one_kv_head_each: bool = False  # where the config has no num_key_value_heads, there are as many as heads; others must tell
    attention_bias: bool = False  # whether the config may ask for biases of all projections of the attention
    always_qkv_bias: bool = False
    mlp_bias: bool = False  # whether the config may ask for them
    head_norms: bool = False  # of queries and keys
    four_norms: bool = False  # also behind attention and MLP
    fused: bool = False  # one projection for queries, keys and values, one for gate and up
    experts: bool = False
    tied: bool = False  # where the config does not tell


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Named:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _llama_like(traits: _Traits) -> Callable[[_Config], Model]:
    def build(config: _Config) -> Model:
        shapes = dict(_llama_parameters(config, traits))
        idle = 0
        if traits.experts:
            experts, used = config.count("num_local_experts"), config.count("num_experts_per_tok")
            if used > experts:
                raise ValueError(f"'num_experts_per_tok' is at most 'num_local_experts', got {used} and {experts}")
            idle = sum(math.prod(shape) // experts * (experts - used) for name, shape in shapes.items() if ".experts." in name)
        return Model(shapes=shapes, idle=idle)

    return build


def _llama_parameters(config: _Config, traits: _Traits) -> Named:
    width, vocabulary = config.count("hidden_size"), config.count("vocab_size")
    yield "model.embed_tokens.weight", (vocabulary, width)
    for layer in range(config.count("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        yield from _llama_attention(f"{prefix}.self_attn", config, traits)
        yield from _llama_mlp(f"{prefix}.mlp", config, traits)
        yield f"{prefix}.input_layernorm.weight", (width,)
        yield f"{prefix}.post_attention_layernorm.weight", (width,)
        if traits.four_norms:
            yield f"{prefix}.pre_feedforward_layernorm.weight", (width,)
            yield f"{prefix}.post_feedforward_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    if not config.flag("tie_word_embeddings", traits.tied):
        yield "lm_head.weight", (vocabulary, width)


def _llama_attention(prefix: str, config: _Config, traits: _Traits) -> Named:
    width, heads = config.count("hidden_size"), config.count("num_attention_heads")
    kv_heads = config.count("num_key_value_heads", heads if traits.one_kv_head_each else None)
    has_size = config.values.get("head_dim") is not None or traits.head_dim is not None
    size = config.count("head_dim", traits.head_dim) if has_size else config.quotient("hidden_size", "num_attention_heads")
    bias = traits.attention_bias and config.flag("attention_bias", False)
    if traits.fused:
        yield from _linear(f"{prefix}.o_proj", width, heads * size)
        yield from _linear(f"{prefix}.qkv_proj", (heads + 2 * kv_heads) * size, width)
        return
    qkv_bias = bias or traits.always_qkv_bias
    yield from _linear(f"{prefix}.q_proj", heads * size, width, qkv_bias)
    yield from _linear(f"{prefix}.k_proj", kv_heads * size, width, qkv_bias)
    yield from _linear(f"{prefix}.v_proj", kv_heads * size, width, qkv_bias)
    yield from _linear(f"{prefix}.o_proj", width, heads * size, bias)
    if traits.head_norms:
        yield f"{prefix}.q_norm.weight", (size,)
        yield f"{prefix}.k_norm.weight", (size,)


def _llama_mlp(prefix: str, config: _Config, traits: _Traits) -> Named:
    width, inner = config.count("hidden_size"), config.count("intermediate_size")
    if traits.experts:
        experts = config.count("num_local_experts")
        yield f"{prefix}.gate.weight", (experts, width)
        yield f"{prefix}.experts.gate_up_proj", (experts, 2 * inner, width)
        yield f"{prefix}.experts.down_proj", (experts, width, inner)
        return
    bias = traits.mlp_bias and config.flag("mlp_bias", False)
    if traits.fused:
        yield from _linear(f"{prefix}.gate_up_proj", 2 * inner, width)
    else:
        yield from _linear(f"{prefix}.gate_proj", inner, width, bias)
        yield from _linear(f"{prefix}.up_proj", inner, width, bias)
    yield from _linear(f"{prefix}.down_proj", width, inner, bias)


def _gpt2(config: _Config) -> Model:
    return Model(shapes=dict(_gpt2_parameters(config)))


def _gpt2_parameters(config: _Config) -> Named:
    width = config.count("n_embd")
    inner = config.count("n_inner", 4 * width)
    vocabulary = config.count("vocab_size")
    yield "transformer.wte.weight", (vocabulary, width)
    yield "transformer.wpe.weight", (config.count("n_positions"), width)
    for layer in range(config.count("n_layer")):
        prefix = f"transformer.h.{layer}"
        yield from _layer_norm(f"{prefix}.ln_1", width)
        yield from _transposed_linear(f"{prefix}.attn.c_attn", 3 * width, width)
        yield from _transposed_linear(f"{prefix}.attn.c_proj", width, width)
        yield from _layer_norm(f"{prefix}.ln_2", width)
        yield from _transposed_linear(f"{prefix}.mlp.c_fc", inner, width)
        yield from _transposed_linear(f"{prefix}.mlp.c_proj", width, inner)
    yield from _layer_norm("transformer.ln_f", width)
    if not config.flag("tie_word_embeddings", True):
        yield "lm_head.weight", (vocabulary, width)


def _layer_norm(name: str, width: int) -> Named:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _transposed_linear(name: str, outputs: int, inputs: int) -> Named:
    """GPT-2's, whose weights are stored as (inputs, outputs)."""
    yield f"{name}.weight", (inputs, outputs)
    yield f"{name}.bias", (outputs,)


def _gpt_neox(config: _Config) -> Model:
    return Model(shapes=dict(_gpt_neox_parameters(config)))


def _gpt_neox_parameters(config: _Config) -> Named:
    width, inner, vocabulary = config.count("hidden_size"), config.count("intermediate_size"), config.count("vocab_size")
    bias = config.flag("attention_bias", True)
    yield "gpt_neox.embed_in.weight", (vocabulary, width)
    for layer in range(config.count("num_hidden_layers")):
        prefix = f"gpt_neox.layers.{layer}"
        yield from _layer_norm(f"{prefix}.input_layernorm", width)
        yield from _layer_norm(f"{prefix}.post_attention_layernorm", width)
        yield from _linear(f"{prefix}.attention.query_key_value", 3 * width, width, bias)
        yield from _linear(f"{prefix}.attention.dense", width, width, bias)
        yield from _linear(f"{prefix}.mlp.dense_h_to_4h", inner, width, True)
        yield from _linear(f"{prefix}.mlp.dense_4h_to_h", width, inner, True)
    yield from _layer_norm("gpt_neox.final_layer_norm", width)
    if not config.flag("tie_word_embeddings", False):
        yield "lm_head.weight", (vocabulary, width)


# By `model_type`.
MODEL_TYPES: Mapping[str, Callable[[_Config], Model]] = {
    "llama": _llama_like(_Traits(one_kv_head_each=True, attention_bias=True, mlp_bias=True)),
    "mistral": _llama_like(_Traits()),
    "mixtral": _llama_like(_Traits(experts=True)),
    "phi3": _llama_like(_Traits(one_kv_head_each=True, fused=True)),
    "qwen2": _llama_like(_Traits(always_qkv_bias=True)),
    "qwen3": _llama_like(_Traits(attention_bias=True, head_dim=128, head_norms=True)),
    "gemma2": _llama_like(_Traits(attention_bias=True, head_dim=256, four_norms=True, tied=True)),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
