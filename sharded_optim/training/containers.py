"""Unwrap the optimizers of this library from the containers of frameworks. Used by clipping, metrics and callbacks.

Containers are recognised by their attributes, so that no framework is imported: Accelerate's AcceleratedOptimizer and Accelerator, the
Trainer of Hugging Face, Lightning's LightningOptimizer, Trainer and LightningModule, DeepSpeed's engine and optimizer wrappers,
torchtitan's OptimizersContainer, torchft's OptimizerWrapper.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from sharded_optim.step.arguments import CONTAINER_ATTRIBUTES
from sharded_optim.step.engine import Engine
from sharded_optim.zero import ShardedOptimizer

__all__ = ["contained_optimizers", "metrics", "unwrap_optimizer"]

OF_OPTIMIZERS = ("lr", "weight_decay", "grad_norm")  # kinds of metrics of param groups or of all gradients
MOST_LEVELS = 8  # containers in one another: Hugging Face's Trainer under DeepSpeed has four


def contained_optimizers(container: Any) -> list[Engine | ShardedOptimizer]:
    """The optimizers of this library in a container, in its order, each once; or the optimizer itself."""
    return list({id(each): each for each in _search(container, MOST_LEVELS, set())}.values())


def metrics(optimizer: Any) -> dict[str, float]:
    """Return `metrics()` of an optimizer, also inside of a framework's container.

    Args:
        optimizer: of this library; or an optimizer, engine, trainer or container of Accelerate, Hugging Face, Lightning, DeepSpeed or
            torchtitan that has one or several.

    Returns:
        As the optimizer's `metrics()`. Of several optimizers the metrics of all tensors, the largest `skipped_steps`, and with the
        optimizer's number what concerns param groups or all gradients, `lr/0.GROUP`, `grad_norm/0`, and tensors whose names several have.

    Raises:
        TypeError: there is no optimizer of this library inside.
    """
    found = contained_optimizers(optimizer)
    if not found:
        raise TypeError(
            f"so.metrics found no optimizer of sharded_optim in a {type(optimizer).__name__}; pass the optimizer, or the trainer, engine "
            f"or container that holds it, once it has been made"
        )
    reports = [each.metrics() for each in found]
    if len(reports) == 1:
        return reports[0]
    uses = Counter(key for report in reports for key in report)
    merged: dict[str, float] = {}
    for number, report in enumerate(reports):
        for key, value in report.items():
            kind, _, name = key.partition("/")
            is_numbered = kind in OF_OPTIMIZERS or (name and uses[key] > 1)
            merged[f"{kind}/{number}{name and f'.{name}'}" if is_numbered else key] = value
    factors = [value for key, value in merged.items() if key.startswith("clip_factor/")]
    if factors:
        merged["clipped_share"] = sum(factor < 1.0 for factor in factors) / len(factors)
    found_non_finite = [report["non_finite_tensors"] for report in reports if "non_finite_tensors" in report]
    if found_non_finite:
        merged["non_finite_tensors"] = sum(found_non_finite)
    return merged | {"skipped_steps": max(report["skipped_steps"] for report in reports)}


def unwrap_optimizer(optimizer: Any) -> Engine | ShardedOptimizer:
    """Return the one optimizer of this library in a framework's container.

    For attributes that it does not forward: `so.unwrap_optimizer(optimizer).layout = so.fsdp1_layout(model)`, or `process_group`.

    Args:
        optimizer: as `metrics` takes it.

    Raises:
        TypeError: there is none inside, or several.
    """
    found = contained_optimizers(optimizer)
    if len(found) != 1:
        raise TypeError(f"there are {len(found) or 'no'} optimizers of sharded_optim in a {type(optimizer).__name__}; pass what holds one")
    return found[0]


def _search(container: Any, levels: int, seen: set[int]) -> Iterator[Engine | ShardedOptimizer]:
    if container is None or levels == 0 or id(container) in seen or isinstance(container, Tensor | str | bytes):
        return
    seen.add(id(container))
    if isinstance(container, Engine | ShardedOptimizer) and "_optimizer" not in vars(container):  # Lightning's wrapper is a subclass too
        yield container
        return
    for each in _contents(container):
        yield from _search(each, levels - 1, seen)


def _contents(container: Any) -> Iterable[Any]:
    if isinstance(container, Mapping):
        return container.values()
    if isinstance(container, list | tuple):
        return container
    return [found for name in CONTAINER_ATTRIBUTES if (found := _attribute(container, name)) is not None]


def _attribute(container: Any, name: str) -> Any:
    """Return an attribute, or the result of a method of that name (LightningModule.optimizers); None if there is none yet."""
    try:
        found = getattr(container, name, None)
        return found() if inspect.ismethod(found) and name == "optimizers" else found
    except (AttributeError, RuntimeError, TypeError):  # of a module that no trainer has taken up yet
        return None
