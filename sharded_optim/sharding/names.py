"""Parameter names without the prefixes of wrappers, for results that must not depend on the wrapper."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["TRANSPARENT", "names_without_wrappers", "without_wrappers"]

TRANSPARENT = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}  # attributes with a wrapped module
DDP = "module."  # prefix of all names in DistributedDataParallel, DataParallel, AveragedModel and DeepSpeed's engine


def without_wrappers(name: str, *, is_in_ddp: bool = True) -> str:
    """Remove the prefixes of wrappers from a parameter's name.

    Args:
        name: a parameter's name from `named_parameters` of a wrapped or plain model.
        is_in_ddp: whether to remove a leading "module.", which may also be the model's own.

    >>> without_wrappers("module._orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    name = ".".join(part for part in name.split(".") if part not in TRANSPARENT)
    return name.removeprefix(DDP) if is_in_ddp else name


def names_without_wrappers(names: Collection[str]) -> dict[str, str]:
    """Map a model's parameter names to names without the prefixes of wrappers; all to themselves if two would become equal.

    >>> names_without_wrappers(["module._orig_mod.up.weight", "module.scale"])
    {'module._orig_mod.up.weight': 'up.weight', 'module.scale': 'scale'}
    >>> names_without_wrappers(["module.weight", "head.weight"])  # the module's own name
    {'module.weight': 'module.weight', 'head.weight': 'head.weight'}
    """
    is_in_ddp = all(without_wrappers(name, is_in_ddp=False).startswith(DDP) for name in names)
    found = {name: without_wrappers(name, is_in_ddp=is_in_ddp) for name in names}
    return found if len(set(found.values())) == len(found) else {name: name for name in names}
