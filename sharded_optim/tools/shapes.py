"""Read names and shapes of a model's parameters, without its weights: from a JSON file, a Hugging Face `config.json` or a module.

Used by `plan/` and its command. A parameter that is used twice (tied embeddings) is counted once.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from sharded_optim.tools.imported import imported

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Model", "Shape", "block_of", "from_config", "from_module", "from_shapes", "hugging_face_model", "load", "of_plain_sequences"]

Shape = tuple[int, ...]
BLOCK = re.compile(r"^(?:.*?\.)?\d+\.")  # a parameter's name up to its first number, such as `layers.3.`


def block_of(name: str) -> str:
    """Return the numbered block that a parameter is in, as the prefix of its name; "" outside of numbered blocks.

    >>> block_of("model.layers.3.attention.0.weight"), block_of("embedding.weight")
    ('model.layers.3.', '')
    """
    match = BLOCK.match(name)
    return match[0] if match else ""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The trainable parameters of a model."""

    shapes: Mapping[str, Shape]  # in the order of `named_parameters()`
    idle: int = 0  # elements that a token does not use, in experts to which it is not routed
    module: nn.Module | None = field(default=None, compare=False, repr=False)  # on the meta device; None if only shapes are given

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
    """Load the model that a command-line argument names.

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
    return from_config(path) if isinstance(content.get("model_type"), str) else from_shapes(content)


def from_shapes(shapes: Mapping[str, Any]) -> Model:
    """Build a model from {name: [sizes]}, in the order of `named_parameters()`."""
    for name, shape in shapes.items():
        if not isinstance(shape, list | tuple):
            raise ValueError(f"a shape is a list of sizes >= 0, got {shape!r} for {name!r}; a Hugging Face config has a 'model_type'")
    return Model(shapes={name: tuple(shape) for name, shape in shapes.items()})


def from_module(target: str) -> Model:
    """Build a model from `package.module:callable`, on torch's meta device, which allocates nothing."""
    import torch

    build = imported(target)
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
    return Model(shapes={name: tuple(param.shape) for name, param in module.named_parameters()}, module=module)


# ------------------------------------------------------------------------------------------------------------ Hugging Face configs


def from_config(path: Path) -> Model:
    """Build a model from a Hugging Face config.json, by transformers, on torch's meta device."""
    import torch

    with torch.device("meta"):
        module = hugging_face_model(path)
    shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
    config = module.config.get_text_config()
    config.use_cache = False  # in training, forward keeps no keys and values for later tokens
    return Model(shapes=shapes, idle=_idle(shapes, config), module=module)


def hugging_face_model(path: Path) -> Any:
    """Build the model of a Hugging Face config.json with random weights: its first architecture, or else a causal language model.

    Args:
        path: the path of the file.

    Raises:
        ValueError: transformers is not installed, or does not know the model.
    """
    try:
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise ValueError(
            f"a Hugging Face config is read by transformers, which is not installed ({error}); pip install transformers, or give shapes as "
            "JSON {name: [sizes]} or package.module:callable"
        ) from None
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        return transformers.AutoModelForCausalLM.from_config(config) if named is None else named._from_config(config)
    except Exception as error:  # whatever a model's constructor may raise
        raise ValueError(f"transformers cannot build the model of {str(path)!r} ({type(error).__name__}: {error})") from error


def of_plain_sequences() -> AbstractContextManager[Any]:
    """Return a context in which models of transformers do not check whether several sequences are packed into one.

    That check reads values of positions, which the meta device does not have. It is a private function of transformers, in 5.14 and 5.24;
    in versions without it the context does nothing.
    """
    masks = sys.modules.get("transformers.masking_utils")
    if not hasattr(masks, "find_packed_sequence_indices"):
        return nullcontext()
    return mock.patch.object(masks, "find_packed_sequence_indices", return_value=None)


def _idle(shapes: Mapping[str, Shape], config: Any) -> int:
    """Count the elements of experts to which a token is not routed; 0 if the config does not have the numbers of experts."""
    used = getattr(config, "num_experts_per_tok", None)
    experts = next(filter(None, (getattr(config, name, None) for name in COUNTS_OF_EXPERTS)), None)
    if used is None or experts is None:
        return 0
    return sum(math.prod(shape) // experts * (experts - used) for name, shape in shapes.items() if ".experts." in name)


COUNTS_OF_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # keys in configs of transformers
