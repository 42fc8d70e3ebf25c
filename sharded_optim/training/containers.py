"""Unwrap the optimizers of this library from the containers of frameworks. Used by clipping, metrics and callbacks.

Containers are recognised by their attributes, so that no framework is imported. They are Accelerate's AcceleratedOptimizer and
Accelerator, Hugging Face's Trainer, Lightning's LightningOptimizer, Trainer and LightningModule, DeepSpeed's engine and optimizer wrappers,
torchtitan's OptimizersContainer, and torchft's OptimizerWrapper.
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

OF_OPTIMIZERS = ("lr", "weight_decay", "grad_norm")  # metrics that concern param groups or all gradients, not one tensor
MOST_LEVELS = 8  # nested containers; Hugging Face's Trainer under DeepSpeed has four


def contained_optimizers(container: Any) -> list[Engine | ShardedOptimizer]:
    """Return the optimizers of this library in a container, in order and without duplicates; of an optimizer, itself."""
    return list({id(each): each for each in _search(container, MOST_LEVELS, set())}.values())


def metrics(optimizer: Any) -> dict[str, float]:
    """Return the `metrics()` of an optimizer, or of all optimizers in a framework's container.

    Args:
        optimizer: an optimizer of this library; or an optimizer, engine, trainer or container of Accelerate, Hugging Face, Lightning,
            DeepSpeed or torchtitan that has one or several of them.

    Returns:
        The optimizer's `metrics()`. With several optimizers: the metrics of all tensors, and the largest `skipped_steps`. Keys have the
        optimizer's number where they concern param groups or all gradients (`lr/0.GROUP`, `grad_norm/0`), or tensors of equal name.

    Raises:
        TypeError: there is no optimizer of this library in it.
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

    For attributes that the container does not forward, such as `process_group` or `layout`:
    `so.unwrap_optimizer(optimizer).layout = so.fsdp1_layout(model)`.

    Args:
        optimizer: an optimizer or container, as for `metrics`.

    Raises:
        TypeError: there is no optimizer of this library in it, or there are several.
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
    """Return an attribute, or the result of LightningModule.optimizers(); None if it is missing or not available yet."""
    try:
        found = getattr(container, name, None)
        return found() if inspect.ismethod(found) and name == "optimizers" else found
    except (AttributeError, RuntimeError, TypeError):  # a LightningModule without a trainer yet
        return None
