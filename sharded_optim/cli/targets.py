"""Models, batches and optimizers that a command line names, as callables that can be pickled for other processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sharded_optim.optimizers import OPTIMIZERS, Muon
from sharded_optim.tools.imported import imported
from sharded_optim.tools.shapes import hugging_face_model
from sharded_optim.training.muon_groups import muon_param_groups

__all__ = ["Named", "TokenBatches", "optimizer_named", "target_named"]

SEQUENCE = 32  # tokens
BATCH = 2  # sequences


@dataclass(frozen=True)
class Named:
    """A reference to a function or class by its import path, `package.module:name`."""

    path: str

    def __call__(self, *args: Any) -> Any:
        return imported(self.path)(*args)


@dataclass(frozen=True)
class HuggingFaceModel:
    """A model with random weights in float32, from a config.json or the folder with it."""

    config: str

    @property
    def needed_modules(self) -> tuple[str, ...]:
        """The modules that a process must import before it can build the model; importing takes seconds."""
        path = Path(self.config)
        kind = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8")).get("model_type", "")
        name = kind.replace("-", "_")
        return ("transformers", f"transformers.models.{name}.modeling_{name}")

    def __call__(self) -> nn.Module:
        return hugging_face_model(Path(self.config)).float()


@dataclass(frozen=True)
class TokenBatches:
    """Batches of random tokens, which are their own labels."""

    vocabulary: int
    length: int

    def __call__(self, step: int) -> Mapping[str, Tensor]:
        tokens = torch.randint(self.vocabulary, (BATCH, self.length), generator=torch.Generator().manual_seed(step))
        return {"input_ids": tokens, "labels": tokens}


@dataclass(frozen=True)
class MuonOfModel:
    """Muon with the param groups that `so.muon_param_groups` makes of a model."""

    options: Mapping[str, Any]
    path = "sharded_optim.Muon"
    optimizer_class = Muon

    def __call__(self, model: nn.Module) -> Any:
        return Muon(muon_param_groups(model), **self.options)


def target_named(target: str, batch: str | None) -> tuple[Callable[[], nn.Module], Callable[[int], Any]]:
    """Return functions that build the model and its batches.

    Args:
        target: a Hugging Face config.json or the folder with it, or `package.module:callable`, called without arguments.
        batch: `package.module:callable`, called with the number of the step; a config needs none.

    Raises:
        ValueError: the target does not exist, or a callable for the model is given without batches.
    """
    path = Path(target)
    if path.exists():
        return HuggingFaceModel(target), Named(batch) if batch else _token_batches(path)
    if ":" not in target:
        raise ValueError(f"{target!r} is neither a Hugging Face config.json nor package.module:callable")
    if batch is None:
        raise ValueError(f"{target!r} needs batches: --batch package.module:callable, which is called with the number of the step")
    for name in (target, batch):
        imported(name)
    return Named(target), Named(batch)


def _token_batches(path: Path) -> TokenBatches:
    with torch.device("meta"):
        config = hugging_face_model(path).config.get_text_config()
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise ValueError(f"{str(path)!r} is no language model; give --batch package.module:callable, called with the step's number")
    return TokenBatches(vocabulary, min(SEQUENCE, getattr(config, "max_position_embeddings", SEQUENCE)))


def optimizer_named(name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a function that builds an optimizer: from parameters if `name` is a class, other than Muon, else from the model.

    Args:
        name: a class of this library, or `package.module:name`, such as torch.optim:AdamW.
        options: hyperparameters, for a class.
    """
    if name.rpartition(".")[2] == "Muon" and not name.startswith("torch"):
        return MuonOfModel(options)
    path = name if ":" in name else ":".join(name.rsplit(".", 1))
    named = OPTIMIZERS.get(name) or imported(path)
    if isinstance(named, type):
        made = partial(named, **options) if options else named
        try:
            cast(Any, made)([nn.Parameter(torch.zeros(2, 2))])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} with {dict(options)} cannot be built: {error}") from error
        return made
    if options:
        raise ValueError(f"{name!r} is a function of the model, which has its hyperparameters; leave the options out")
    return Named(path)
