"""Muon: momentum, orthogonalized as a whole matrix (Jordan 2024, kellerjordan.github.io/posts/muon), with decoupled decay and AdamW's
scale as Moonlight has them (Liu et al. 2025, arXiv 2502.16982). For the hidden matrices of a model; the rest takes AdamW or StableAdamW.

    m     <- m + (1 - mu) * (g - m)
    u     <- m + (1 - mu) * (g - m)  with the new m              nesterov; else u = m
    X     <- u / max(||u||_F, eps)                               of the whole matrix; transposed if it has more rows than columns
    X     <- a X + (b XX' + c (XX')^2) X                         ns_steps times
    theta <- decay * theta - lr * scale * X                      decay: see weight_decay.py

    scale    original: sqrt(max(1, rows / columns))    match_rms_adamw: 0.2 sqrt(max(rows, columns))    spectral_norm: sqrt(rows / columns)

The reference is torch.optim.Muon of torch 2.13, in the order of operations too: a direction u gives the same bits of X, in bfloat16. The
scale is a factor of the last polynomial, so that X is rounded once; torch multiplies the learning rate by it instead.

The first two lines and the last are elementwise, and are computed by the ranks that hold the pieces of the matrix. X is not elementwise: X
of a slice is not a slice of X, a silent error of other sharded implementations. So one rank gathers all pieces of u and computes X
(`sharding/matrices.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from sharded_optim.formulas import Algorithm, Coefficients, Matrix
from sharded_optim.formulas import operations as xp
from sharded_optim.formulas.hyperparameters import Choice, Float, Floats, Hyperparameter, Int, Switch, Unsupported
from sharded_optim.formulas.scalars import Number, Step
from sharded_optim.formulas.weight_decay import COUPLED, L2, decay_coefficients
from sharded_optim.optimizers.adam import ADAM
from sharded_optim.optimizers.constructors import spelled_out
from sharded_optim.optimizers.stable_adamw import STABLE_ADAMW
from sharded_optim.step.engine import Engine
from sharded_optim.step.options import Params, SwitchOptions

__all__ = ["MUON", "MUON_FP32", "POLAR_EXPRESS", "ROUTERS", "Muon", "choose", "orthogonalize"]

JORDAN = (3.4445, -4.775, 2.0315)  # the steepest slope at 0: singular values end in [0.7, 1.2]
POLAR_EXPRESS = "polar_express"
# Amsel et al. 2025, arXiv 2505.16932: the optimal polynomial of each step, for singular values of at least 1e-3. The norm is multiplied by
# a safety factor of 1.02 against rounding. Further steps repeat the last polynomial.
POLAR_EXPRESS_STEPS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_EXPRESS_SAFETY = 1.02
ORIGINAL, MATCH_RMS_ADAMW, SPECTRAL_NORM = "original", "match_rms_adamw", "spectral_norm"
ROUTERS = frozenset({"gate", "router", "wg"})  # modules that choose experts; gates of feed-forward layers are called gate_proj or w1
MUONS_EPS = 1e-7  # default of `eps`
ADAMS_EPS = 1e-8  # default for groups of AdamW and StableAdamW; in the other groups `eps` is Newton-Schulz's


# --------------------------------------------------------------------------------------------------------------- of every element


def toward(average, value, from_value, weight):
    """Return `average + (1 - momentum) * (value - average)`, rounded as by torch.lerp: starting at whichever of the two is nearer.

    `from_value` is 1 if that is `value`, and `weight` the signed share of the way; see `coefficients`.
    """
    return xp.where(from_value > 0.0, value, average) + weight * (value - average)


def update(direction, grad, momentum_buffer, from_grad, weight, nesterov):
    momentum_buffer = toward(momentum_buffer, grad, from_grad, weight)
    direction = xp.where(nesterov > 0.0, toward(momentum_buffer, grad, from_grad, weight), momentum_buffer)
    return direction, momentum_buffer


def coefficients(group: Mapping[str, Any], step: Step, lr_scale: Number) -> Coefficients:
    """Compute the last three arguments of `update`."""
    momentum = group["momentum"]
    from_grad = momentum <= 0.5
    return float(from_grad), -momentum if from_grad else 1.0 - momentum, float(bool(group["nesterov"]))


def apply(param, orthogonal, decay, lr):
    return (decay * param - lr * orthogonal,)


def apply_coefficients(group: Mapping[str, Any], step: Step, lr_scale: Number) -> Coefficients:
    """Compute the last two arguments of `apply`."""
    _, decay = decay_coefficients(group, lr_scale)
    return decay, lr_scale * group["lr"]


# ------------------------------------------------------------------------------------------------------------------ of a matrix


def orthogonalize(
    direction: Tensor,  # (rows, columns), bf16 or fp32, read-only
    group: Mapping[str, Any],  # hyperparameters
) -> Tensor:
    """Replace the singular values of a matrix by numbers near `scale`: Newton-Schulz steps in the dtype of the matrix.

    Always one matrix at a time: bmm of a batch does not give the bits of mm for all shapes, and the matrices in a batch would depend on the
    sharding.
    """
    rows, columns = direction.shape
    polynomials, safety = _polynomials(group)
    with torch.autocast(direction.device.type, enabled=False):  # autocast would compute products in another dtype
        with _one_thread(direction.device):  # the order of a sum depends on how many threads share it
            norm = direction.norm()
        x = direction.T if rows > columns else direction
        x = x / (norm * safety if safety != 1.0 else norm).clamp(min=group["eps"])
        with _one_thread(direction.device, wanted=direction.dtype == torch.float32):
            for number, (a, b, c) in enumerate(polynomials, start=1):
                scale = scale_of(rows, columns, group) if number == len(polynomials) else 1.0
                gram = x @ x.T
                gram = torch.addmm(gram, gram, gram, beta=b, alpha=c)
                x = torch.addmm(x, gram, x, beta=a * scale, alpha=scale)
        return x.T if rows > columns else x


def _polynomials(group: Mapping[str, Any]) -> tuple[list[Sequence[float]], float]:
    """Return the coefficients of each Newton-Schulz step, and the factor of the norm."""
    given, steps = group["ns_coefficients"], int(group["ns_steps"])
    if given != POLAR_EXPRESS:
        return [given] * steps, 1.0
    return [POLAR_EXPRESS_STEPS[min(step, len(POLAR_EXPRESS_STEPS) - 1)] for step in range(steps)], POLAR_EXPRESS_SAFETY


def scale_of(rows: int, columns: int, group: Mapping[str, Any]) -> float:
    if group["adjust_lr_fn"] == MATCH_RMS_ADAMW:
        return 0.2 * math.sqrt(max(rows, columns))
    if group["adjust_lr_fn"] == SPECTRAL_NORM:
        return math.sqrt(rows / columns)
    return math.sqrt(max(1.0, rows / columns))


@contextmanager
def _one_thread(device: torch.device, *, wanted: bool = True) -> Iterator[None]:
    """Context in which torch computes on one thread of the CPU."""
    threads = torch.get_num_threads()
    if not wanted or device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def flops(rows: int, columns: int) -> int:
    """Count the floating-point operations of a Newton-Schulz step."""
    short, long = min(rows, columns), max(rows, columns)
    return 4 * short * short * long + 2 * short**3


def shapes(shape: tuple[int, ...], group: Mapping[str, Any]) -> list[tuple[int, int]]:
    """List the shapes of a tensor's matrices: itself; those of a stack; a convolution's (out, in * height * width); row blocks of these."""
    if len(shape) < 2:
        raise ValueError(
            f'has shape {shape}, which is no matrix; step it by AdamW: give its param group algorithm="adamw" or "stable_adamw", or take '
            f"so.muon_param_groups(model)"
        )
    is_stack = len(shape) == 3 and bool(group["stacked"])
    count, rows, *others = shape if is_stack else (1, *shape)
    split = group["split"]
    if not isinstance(split, list | tuple):
        size = int(split)
        blocks = [size] * (rows // size) if rows % size == 0 else []
    else:
        blocks = list(map(int, split)) or [rows]
    if sum(blocks) != rows:
        raise ValueError(
            f"has {rows} rows in a matrix (shape {shape}), which split={split!r} does not add up to; give the sizes of the row blocks, or "
            f"one that divides them, in a param group of its own"
        )
    return [(block, math.prod(others)) for block in blocks] * count


APPLY = Algorithm(name="muon_apply", state=(), update=apply, undo=None, coefficients=apply_coefficients)
MATRIX = Matrix(shapes=shapes, function=orthogonalize, flops=flops, dtype=torch.bfloat16, apply=APPLY)
MUON = Algorithm(name="muon", state=("momentum_buffer",), update=update, undo=None, coefficients=coefficients, matrix=MATRIX)
MUON_FP32 = replace(MUON, name="muon_fp32", matrix=replace(MATRIX, dtype=torch.float32))
ALGORITHMS: Mapping[str, Algorithm] = {"muon": MUON, "adamw": ADAM, "stable_adamw": STABLE_ADAMW}


def choose(group: Mapping[str, Any]) -> Algorithm:
    if group["decay_form"] == L2:
        raise ValueError(f"decay_form={L2!r} is not supported by Muon, whose decay never goes through the gradient; leave it out")
    algorithm = ALGORITHMS[group["algorithm"]]
    return MUON_FP32 if algorithm is MUON and group["ns_dtype"] == "float32" else algorithm


@dataclass(frozen=True)
class NewtonSchulz(Hyperparameter):
    """Three finite numbers, or "polar_express"."""

    @property
    def rule(self) -> str:
        return f'three finite numbers, or "{POLAR_EXPRESS}"'

    def accepts(self, value: Any) -> bool:
        if isinstance(value, str):
            return value == POLAR_EXPRESS
        return (
            isinstance(value, list | tuple) and len(value) == 3 and super().accepts(value) and all(isinstance(each, Real) for each in value)
        )


@dataclass(frozen=True)
class Steps(Int):
    """A number of Newton-Schulz steps, from 1 to 99: after a hundred torch suspects a mistake."""

    @property
    def rule(self) -> str:
        return "a whole number from 1 to 99"

    def accepts(self, value: Any) -> bool:
        return super().accepts(value) and 1 <= value < 100


@dataclass(frozen=True)
class RowBlocks(Hyperparameter):
    """A positive whole number, or a list or tuple of them; an empty one means that a matrix is not split."""

    @property
    def rule(self) -> str:
        return "a number of rows, or a list of such numbers"

    def accepts(self, value: Any) -> bool:
        blocks = value if isinstance(value, list | tuple) else [value]
        return all(Int(self.name).accepts(block) and block > 0 for block in blocks)


@spelled_out
class Muon(Engine):
    """Muon for matrices, and AdamW or StableAdamW for the rest of a model, with torch.optim.Muon's arguments and defaults.

    A matrix is orthogonalized as a whole, however it is sharded (DDP, FSDP2, HSDP, tensor parallelism, meshes of several axes): the update
    has the bits of one process. The ranks share the work: each matrix has one owner among those that hold a piece of it. Every rank of
    `process_group` must call `step`, also with no gradient.

    Args:
        params: parameters, named parameters or param groups: ordinary tensors or DTensors (FSDP2, HSDP, tensor parallelism); float32,
            bfloat16 or float16. A group with algorithm="muon", the default, has tensors of at least two dimensions: matrices; with three,
            stacks of matrices, as experts; with more, convolutions, as matrices of shape (out, in * height * width). Those with
            algorithm="adamw" or "stable_adamw" have any; `muon_param_groups` sorts a model.
        lr: learning rate; a float or a one-element tensor.
        weight_decay: lambda; a step multiplies a parameter by (1 - lr * lambda), as in torch, or by what `decay_form` says.
        momentum: decay of the momentum buffer, in [0, 1).
        nesterov: orthogonalize the new momentum buffer after moving it toward the gradient once more.
        ns_coefficients: a, b and c of a Newton-Schulz step; or "polar_express", with other coefficients in each step (arXiv 2505.16932).
        eps: a direction with a smaller norm is divided by eps instead of its norm. In groups of AdamW and StableAdamW it is their eps: the
            group's own; else the value passed here, unless it is the default; else 1e-8.
        ns_steps: Newton-Schulz steps, from 1 to 99.
        adjust_lr_fn: the factor of a matrix's learning rate: "original", the default, sqrt(max(1, rows / columns)); or "match_rms_adamw",
            0.2 * sqrt(max(rows, columns)), for the lr and decay of AdamW; or "spectral_norm", sqrt(rows / columns), dion's default, for one
            lr at any width of the model.
        algorithm: "muon", "adamw" or "stable_adamw"; the default for groups that do not set it.
        split: row blocks that are matrices of their own, as in a fused projection: their sizes, (q, k, v), or one size for all, as for
            heads. (), the default: no split. Usually set in a param group.
        stacked: whether a tensor of three dimensions is a stack of matrices. False: the weight of a one-dimensional convolution.
        ns_dtype: dtype of Newton-Schulz and of the matrices that ranks send: "bfloat16", as in torch, or "float32", on a CPU on one thread.
        betas: decay of the moving averages in groups of AdamW and StableAdamW.
        max_lr: peak of the schedule, to which the decoupled and corrected forms refer; None means each group's lr at construction, or the
            largest lr so far if that is 0.
        decay_form: "coupled" (the default), "decoupled" or "corrected" (docs/weight-decay.md).
        options: see `EngineOptions` and `SwitchOptions`. There is no gradient release.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter cannot be optimized, or is no matrix.

    Warns:
        UserWarning: a fully decoupled weight decay of 1e-3 or more, usual for a coupled one.
    """

    hyperparameters = (
        *Engine.hyperparameters,
        Choice("algorithm", tuple(ALGORITHMS)),
        Float("momentum", below=1.0),
        Switch("nesterov"),
        NewtonSchulz("ns_coefficients"),
        Float("eps"),
        Steps("ns_steps"),
        Choice("adjust_lr_fn", (ORIGINAL, MATCH_RMS_ADAMW, SPECTRAL_NORM)),
        RowBlocks("split"),
        Switch("stacked"),
        Choice("ns_dtype", ("bfloat16", "float32")),
        Floats("betas", count=2),
        Unsupported("amsgrad", by="Muon", way_out="leave it out, or use DecoupledAdamW"),
    )
    algorithms: ClassVar = {"": MUON, "adamw": ADAM, "stable_adamw": STABLE_ADAMW}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] | str = JORDAN,
        eps: float = MUONS_EPS,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        algorithm: str = "muon",
        split: int | Sequence[int] = (),
        stacked: bool = True,
        ns_dtype: str = "bfloat16",
        betas: tuple[float, float] = (0.9, 0.95),
        max_lr: float | None = None,
        decay_form: str = COUPLED,
        **options: Unpack[SwitchOptions],
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "decay_form": decay_form, "momentum": momentum, "nesterov": nesterov}
        defaults |= {"ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn or ORIGINAL}
        defaults |= {"algorithm": algorithm, "split": split, "stacked": stacked, "ns_dtype": ns_dtype, "betas": betas}
        super().__init__(params, defaults, algorithm=choose, max_lr=max_lr, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group as torch does, with further checks.

        Raises:
            ValueError: a parameter given twice, or that cannot be optimized, or is no matrix; a hyperparameter out of range.
        """
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            if param_group.get("adjust_lr_fn", ORIGINAL) is None:
                param_group["adjust_lr_fn"] = ORIGINAL  # None is torch's default, but distributed checkpoints refuse it
            if param_group.get("algorithm", self.defaults["algorithm"]) != "muon" and self.defaults["eps"] == MUONS_EPS:
                param_group.setdefault("eps", ADAMS_EPS)
        super().add_param_group(param_group)
