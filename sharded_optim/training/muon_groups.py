"""Sort the parameters of a model for Muon: hidden matrices, and the rest, which AdamW or StableAdamW steps.

Embeddings and output heads are matrices too, so that shapes alone do not decide: modules and names do as well. `show=print` lists the
groups and the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sharded_optim.optimizers.muon import ROUTERS
from sharded_optim.sharding import used_wrappers
from sharded_optim.sharding.names import without_wrappers

__all__ = ["muon_param_groups"]

Which = Iterable[str] | str | Callable[[str, Tensor], bool]
HEADS = {"classifier", "embed_out", "head", "lm_head", "output", "score", "unembed"}  # outside of numbered layers
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)

MUON = "muon"


def muon_param_groups(
    model: nn.Module,
    *,
    rest: str = "adamw",
    to_muon: Which = (),
    to_rest: Which = (),
    split: Mapping[str, int | Sequence[int]] | None = None,
    muon_options: Mapping[str, Any] | None = None,
    rest_options: Mapping[str, Any] | None = None,
    show: Callable[[str], object] | None = None,
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into param groups for `so.Muon`.

    The algorithm in `rest` steps tensors of less than two dimensions (biases, gains of norms), embeddings and tensors tied to them, the
    output head (a module called lm_head, output, ... outside of numbered layers, or a linear layer outside of them with the shape of an
    embedding), norms, and routers (a module called router, gate or wg). Muon steps all others: matrices, stacks of them, and convolutions.

    Args:
        model: ordinary or wrapped. Under DeepSpeed, the model that will be passed to `initialize`.
        rest: "adamw" or "stable_adamw".
        to_muon, to_rest: parameters for which this choice is overridden: parts of names, or a function of (name, parameter). Parameters
            that a wrapper has flattened (FSDP1, deepspeed.zero.Init) have lost their shapes, so use names for these.
        split: row blocks of fused matrices (see `so.Muon`) by parts of names: {"qkv": d_model}. For nn.MultiheadAttention it is known.
        muon_options: hyperparameters of Muon's groups.
        rest_options: hyperparameters of the other groups, such as {"lr": 3e-4}; without a weight_decay here, tensors of less than two
            dimensions do not decay.
        show: a function, such as `print`, that is called with a text that lists the groups and the reasons.

    Returns:
        Groups with named parameters; none is empty.

    Raises:
        ValueError: a wrapper (FSDP1) has flattened several parameters into one, nothing is left for Muon, an override selects no parameter,
            or both overrides select the same one.
    """
    shapes = _shapes(model)
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    wanted, unwanted = _chosen(to_muon, params, "to_muon"), _chosen(to_rest, params, "to_rest")
    if both := wanted & unwanted:
        raise ValueError(f"to_muon and to_rest both fit {sorted(both)[0]!r}; give it to one of them")
    reasons = _reasons(model, shapes)
    known = _known_options(model)
    splits = {name: blocks for part, blocks in (split or {}).items() for name in _chosen(part, params, "split")}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    lines: dict[tuple[Any, ...], list[str]] = {}
    for name, param in params.items():
        reason = "to_rest" if name in unwanted else None if name in wanted else reasons.get(param)
        if reason is None:
            options = known.get(param, {}) | ({"split": splits[name]} if name in splits else {})
            group = {"params": [], "algorithm": MUON, **options, **(muon_options or {})}
        else:
            options = {} if len(shapes[param]) >= 2 else {"weight_decay": 0.0}
            group = {"params": [], "algorithm": rest, **options, **(rest_options or {})}
        key = (group["algorithm"], *((option, str(value)) for option, value in options.items()))
        groups.setdefault(key, group)["params"].append((name, param))
        lines.setdefault(key, []).append(f"  {name} {tuple(shapes[param])}" + (f": {reason}" if reason else ""))
    if not any(algorithm == MUON for algorithm, *_ in groups):
        raise ValueError("no parameter of the model is a hidden matrix: give names of some with to_muon")
    keys = sorted(groups, key=lambda key: key[0] != MUON)
    if show is not None:
        show("\n".join(line for key in keys for line in (_heading(groups[key], shapes), *lines[key])))
    return [groups[key] for key in keys]


def _shapes(model: nn.Module) -> dict[Tensor, Sequence[int]]:
    """Return the shape of each parameter, before a wrapper has flattened it.

    Raises:
        ValueError: a parameter consists of several tensors.
    """
    shapes: dict[Tensor, Sequence[int]] = {param: param.shape for param in model.parameters()}
    for wrapper in used_wrappers():
        for param, tensors in wrapper.flattened(model).items():
            (name, shape), *others = tensors
            if others:
                raise ValueError(
                    f"{wrapper.name} has flattened {name!r} with {len(others)} others into one parameter, which is in one param group; "
                    f"wrap with use_orig_params=True, or shard the model with fully_shard (FSDP2)"
                )
            shapes[param] = shape
    return shapes


def _heading(group: Mapping[str, Any], shapes: Mapping[Tensor, Sequence[int]]) -> str:
    options = ", ".join(f"{key}={value!r}" for key, value in group.items() if key not in ("params", "algorithm"))
    elements = sum(math.prod(shapes[param]) for _, param in group["params"])
    return f"{group['algorithm']}{f' ({options})' if options else ''}: {len(group['params'])} tensors, {elements:,} elements"


def _chosen(which: Which, params: Mapping[str, Tensor], argument: str) -> set[str]:
    """Return the names of the parameters that an override selects."""
    if callable(which):
        return {name for name, param in params.items() if which(name, param)}
    found = set()
    for part in (which,) if isinstance(which, str) else which:
        fitting = {name for name in params if part in name}
        if not fitting:
            raise ValueError(f"{argument} has {part!r}, which is part of the name of no trainable parameter")
        found |= fitting
    return found


def _known_options(model: nn.Module) -> dict[Tensor, dict[str, Any]]:
    """Return the group options that follow from the types of torch's modules, by parameter."""
    known: dict[Tensor, dict[str, Any]] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            known[module.in_proj_weight] = {"split": module.embed_dim}
        elif isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            known[module.weight] = {"stacked": False}
    return known


def _reasons(model: nn.Module, shapes: Mapping[Tensor, Sequence[int]]) -> dict[Tensor, str]:
    """Return, for each parameter that is not for Muon, the reason. A shared parameter is excluded if one of its modules gives a reason."""
    modules = [(without_wrappers(name, is_in_ddp=False), module) for name, module in model.named_modules(remove_duplicate=False)]
    vocabularies = {(module.num_embeddings, module.embedding_dim) for _, module in modules if isinstance(module, EMBEDDINGS)}
    reasons: dict[Tensor, str] = {}
    for name, module in modules:
        *path, last = name.split(".")
        is_outside = not any(part.isdigit() for part in (*path, last))  # of numbered layers
        for param in module.parameters(recurse=False):
            if isinstance(module, EMBEDDINGS):
                reason = "embedding"
            elif len(shapes[param]) < 2:
                reason = "less than two dimensions"
            elif isinstance(module, NORMS):
                reason = "norm"
            elif last in ROUTERS:
                reason = "router"
            elif last in HEADS and is_outside:
                reason = "output head"
            elif isinstance(module, nn.Linear) and is_outside and (module.out_features, module.in_features) in vocabularies:
                reason = "output head: the shape of an embedding"
            else:
                continue
            if reasons.get(param) != "embedding":
                reasons[param] = reason
    return reasons
