"""`Content`, one rank's part of a checkpoint, and `manifest_of`, which joins the contents of all ranks.

`Content.of` collects a content from live objects, `imports/` from files of other libraries; `saving.py` saves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sharded_optim.checkpoint.errors import CheckpointError
from sharded_optim.checkpoint.live import LiveOptimizer, live_model, live_optimizer
from sharded_optim.checkpoint.local_tensor import MASTER, LocalTensor
from sharded_optim.checkpoint.manifest import Manifest, Parameters
from sharded_optim.checkpoint.values import decode
from sharded_optim.version import __version__

__all__ = ["Content", "manifest_of"]


@dataclass(frozen=True, kw_only=True)
class Content:
    """One rank's part of a checkpoint.

    Attributes:
        tensors: the rank's parts of all tensors.
        parameters: an optimizer's step counters, param groups and hyperparameters; None: there is no optimizer.
        wrapper_state: state that only the same wrapper can restore, by the wrapper's name.
        extra: the user's values; None if the rank passes none.
        aliases: further names of tied tensors of the model -> the name under which each tensor is saved.
        order: names of parameters in an order that is the same on all ranks; in the manifest, other parameters follow them.
    """

    tensors: Sequence[LocalTensor]
    parameters: Parameters | None = None
    wrapper_state: Mapping[str, Any] = field(default_factory=dict)
    extra: Any = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    order: Sequence[str] = ()

    @classmethod
    def of(cls, model: Any, optimizer: Any, extra: Any) -> Content:
        """Collect the content of a model and an optimizer.

        Raises:
            ValueError, TypeError: the model or the optimizer cannot be saved, or both are None.
        """
        if model is None and optimizer is None:
            raise ValueError("there is nothing to save; pass model=, optimizer= or both")
        live = live_model(model)
        content = cls(tensors=live.tensors, wrapper_state=live.wrapper_state, extra=extra, aliases=live.aliases)
        if optimizer is None:
            return content
        state = live_optimizer(optimizer, model, live)
        state.synchronize()
        tensors = [*live.tensors, *_state_tensors(state, live.tensors)]
        return replace(content, tensors=tensors, parameters=state.parameters(), order=state.order)


def _state_tensors(state: LiveOptimizer, model: Sequence[LocalTensor]) -> list[LocalTensor]:
    """Return an optimizer's tensors. Masters with the dtype of the model's parameters are left out: their values are the same."""
    dtypes = {tensor.segment.name: tensor.local.dtype for tensor in model}
    return [tensor for tensor in state.tensors() if tensor.kind != MASTER or dtypes.get(tensor.segment.name) != tensor.local.dtype]


def manifest_of(step: int, contents: Sequence[Content]) -> Manifest:
    """Join the contents of all ranks into a manifest, which has no files and tensors yet.

    Args:
        contents: by rank, with `extra` encoded. Their tensors are not used.

    Raises:
        CheckpointError: ranks contradict each other.
    """
    aliases: dict[str, str] = {}
    for distinct in {id(content): content for content in reversed(contents)}.values():
        aliases |= distinct.aliases
    return Manifest(
        step=step,
        world_size=len(contents),
        files={},
        tensors={},
        parameters=_join_parameters([content.parameters for content in contents], contents[0].order),
        extra=decode(_same([content.extra for content in contents], "extra")),
        wrapper=_same([content.wrapper_state for content in contents], "the wrapper's state"),
        libraries={"sharded_optim": __version__, "torch": torch.__version__},
        aliases=aliases,
    )


def _join_parameters(parameters: Sequence[Parameters | None], order: Sequence[str]) -> Parameters | None:
    """Join the step counters and group indices that ranks have for their own parameters; None if no rank has an optimizer.

    Args:
        parameters: by rank; None: the rank has no optimizer.
        order: names in the order of the result; other names follow.
    """
    known = [own for own in parameters if own is not None]
    if not known:
        return None
    if len(known) < len(parameters):
        raise CheckpointError("optimizer= was given on some ranks only; give it on all")
    group_of: dict[str, int] = {}
    steps: dict[str, float] = {}
    first_rank = {id(own): rank for rank, own in reversed(list(enumerate(known)))}  # ranks with equal values share one object
    for rank in sorted(first_rank.values()):
        own = known[rank]
        _check_same_groups(known[0], own, rank)
        _join(group_of, own.group_of, "the param group", rank)
        _join(steps, own.steps, "the step counter", rank)
    ordered = {name: group_of[name] for name in order if name in group_of} | group_of
    return replace(known[0], group_of=ordered, steps=steps)


def _check_same_groups(first: Parameters, own: Parameters, rank: int) -> None:
    if (own.optimizer, len(own.groups)) != (first.optimizer, len(first.groups)):
        raise CheckpointError(
            f"rank {rank} has a {own.optimizer} with {len(own.groups)} param groups, rank 0 a {first.optimizer} with "
            f"{len(first.groups)}; build the same optimizer on every rank"
        )
    for index, (expected, values) in enumerate(zip(first.groups, own.groups, strict=True)):
        differ = sorted(key for key in expected.keys() | values.keys() if repr(expected.get(key)) != repr(values.get(key)))
        if differ:
            raise CheckpointError(
                f"param_groups[{index}] has {differ[0]}={values.get(differ[0])!r} on rank {rank}, {expected.get(differ[0])!r} on rank 0; "
                f"set hyperparameters alike on every rank"
            )


def _join(table: dict[str, Any], own: Mapping[str, Any], what: str, rank: int) -> None:
    for name, value in own.items():
        if table.setdefault(name, value) != value:
            raise CheckpointError(f"{what} of {name!r} is {value} on rank {rank}, {table[name]} on another; the ranks have diverged")


def _same(values: Sequence[Any], what: str) -> Any:
    """Return the value of the ranks that have one, or None; raise CheckpointError if values differ."""
    given = [(rank, value) for rank, value in enumerate(values) if value is not None]
    for rank, value in given[1:]:
        if repr(value) != repr(given[0][1]):
            raise CheckpointError(
                f"{what} is not the same on ranks {given[0][0]} and {rank}; a checkpoint holds one for all ranks: gather values of single "
                f"ranks, for example as {{rank: value}}, or give them on one rank alone"
            )
    return given[0][1] if given else None
