"""Types of the public optimizers' arguments. Their docstrings document the options, and are copied into each optimizer's docstring."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import TypedDict

from sharded_optim.sharding import FlatLayout

__all__ = [
    "MOST_SKIPPED",
    "CheckedOption",
    "CommonOptions",
    "EngineOptions",
    "NonFinite",
    "Params",
    "ShardedOptions",
    "SwitchOptions",
    "check_max_skipped_steps",
    "check_nonfinite",
]

MOST_SKIPPED = 100  # default of max_skipped_steps
NonFinite = Literal["skip", "raise", "allow"]
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class CheckedOption:
    """Descriptor of an optimizer attribute that is checked on every assignment.

    Args:
        check: raises ValueError for an invalid value.
    """

    def __init__(self, check: Callable[[Any], None]) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, optimizer: Any, value: Any) -> None:  # without __get__, reads go to the instance's __dict__
        self._check(value)
        optimizer.__dict__[self._name] = value


def check_nonfinite(nonfinite: Any) -> None:
    if nonfinite not in ("skip", "raise", "allow"):
        raise ValueError(f"nonfinite must be 'skip', 'raise' or 'allow', or None at construction for the default, got {nonfinite!r}")


def check_max_skipped_steps(most: Any) -> None:
    if most is not None and not (type(most) is int and most > 0):
        raise ValueError(f"max_skipped_steps must be a positive int, or None for no limit, got {most!r}")


class CommonOptions(TypedDict, total=False):
    """Keyword-only options of every optimizer, also inside a ShardedOptimizer.

    state_dtype: storage of the moments: float32 (the default, also for low-precision parameters); bfloat16, whose rounding requires
        beta2 <= 0.996; or the name of a storage format, such as "bf16_stochastic" (docs/low-precision.md).
    backend: "cpu", "triton" or "eager"; "auto", the default, picks the first of them that supports the device and dtypes. All give the same
        bits.
    nonfinite: what a step does when a gradient on any rank is not finite, or too large to be squared in fp32.
        "skip": no rank steps; parameters, state and step counters stay as they are, bit for bit.
        "raise": FloatingPointError on every rank, naming tensors and ranks. The host waits for the device in every step.
        "allow": the step happens, as in torch; StableAdamW makes the whole tensor NaN, as an unsharded one would.
        None, the default, means "skip" for StableAdamW and Muon, whose steps have a collective anyway, and "allow" for the others, whose
        steps otherwise need none.
    max_skipped_steps: with nonfinite="skip", the number of consecutive skipped steps after which every rank raises a FloatingPointError
        that names what was not finite in the first of them. State stays untouched, and every further skipped step raises too. The default,
        100, leaves enough room for GradScaler, which initially skips up to 17 steps to find its scale; a job that skips more learns
        nothing. None: no limit. Steps that only GradScaler skipped, with finite gradients, do not count. On an accelerator the next step
        raises, because a step does not wait for its own verdict. Parts that are stepped separately (DeepSpeed's ZeRO, gradient release)
        have separate counts.
    stochastic_rounding: round float16 and bfloat16 parameters up or down at random, so that the expected value is exact. It replaces
        `kahan_sum` and saves its memory; with kahan_sum=True the compensation is rounded at random instead. The same bits whatever the
        sharding.
    rounding_seed: seed of stochastic rounding; the same on every rank.
    """

    state_dtype: torch.dtype | str | None
    backend: str
    nonfinite: NonFinite | None
    max_skipped_steps: int | None
    stochastic_rounding: bool
    rounding_seed: int


class EngineOptions(CommonOptions, total=False):
    """Keyword-only options of every optimizer that a ShardedOptimizer sets itself.

    process_group: the ranks that train this model together; None, the default, means all. Unused by a step without a collective.
    layout: the sharding of parameters from which it cannot be detected: `fsdp1_layout(model)` for FullyShardedDataParallel. Not needed for
        ordinary tensors and DTensors, and set by `deepspeed.initialize` and `deepspeed.attach` for DeepSpeed.
    """

    process_group: dist.ProcessGroup | None
    layout: FlatLayout | None


class SwitchOptions(EngineOptions, total=False):
    """optimi's switches, as keywords of the optimizers that optimi does not have.

    kahan_sum: store the rounding error of float16 and bfloat16 parameters in `kahan_comp`, a second array of their dtype: 16 to 17
        significant bits instead of 8 (bfloat16), weight decay included. None, the default, means True unless `stochastic_rounding`.
    foreach: None and True step all tensors in one backend call, False steps each in its own. The result is the same.
    triton: True requires the Triton backend, or raises ImportError; False excludes it; None leaves the choice to `backend`.
    gradient_release: whether steps will happen inside backward; see `prepare_for_gradient_release`.
    """

    kahan_sum: bool | None
    foreach: bool | None
    triton: bool | None
    gradient_release: bool


class ShardedOptions(CommonOptions, total=False, extra_items=Any):  # extra items: arguments of users' own optimizers
    """Arguments that a ShardedOptimizer passes to the optimizer inside: hyperparameters of the library's optimizers, and options."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decay_form: str | None
    decouple_wd: bool
    decouple_lr: bool
    max_lr: float | None
    amsgrad: bool
    momentum: float
    dampening: float
    nesterov: bool
    kahan_sum: bool | None
    foreach: bool | None
    triton: bool | None
