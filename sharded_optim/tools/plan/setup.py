"""The settings of the training run for which a plan is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sharded_optim import optimizers
from sharded_optim.formulas import Algorithm
from sharded_optim.storage.formats import FORMATS, param_format, state_formats
from sharded_optim.tools.plan.matrices import is_hidden_matrix
from sharded_optim.tools.shapes import Shape

__all__ = ["BACKENDS", "DTYPES", "FP32", "MASTERS", "OPTIMIZERS", "Algorithms", "Setup", "one_of"]

DTYPES: Mapping[str, int] = {name: FORMATS[name].itemsize for name in ("fp32", "bf16", "fp16")}  # bytes
FP32 = DTYPES["fp32"]
MASTERS = ("fp32", "kahan", "none")
BACKENDS = ("nccl", "gloo")


class Algorithms(NamedTuple):
    """The algorithms of hidden matrices and of all other tensors. They are the same except for Muon."""

    matrices: Algorithm
    rest: Algorithm


def _algorithms() -> Iterator[tuple[str, Algorithms]]:
    """Yield (name, algorithms) of each optimizer class; a variant that an argument chooses is named `class+argument`."""
    for name, optimizer in optimizers.OPTIMIZERS.items():
        of_matrices = next((each for each in optimizer.algorithms.values() if each.matrix is not None), None)
        of_rest = [(argument, each) for argument, each in optimizer.algorithms.items() if each.matrix is None]
        for number, (argument, each) in enumerate(of_rest):
            yield f"{name}+{argument}" if number else name, Algorithms(of_matrices or each, each)


OPTIMIZERS: Mapping[str, Algorithms] = dict(_algorithms())


def one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    """Raise a ValueError if a value is not allowed."""
    if value not in allowed:
        raise ValueError(f"{what} is one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The settings of a training run that do not depend on the sharding.

    Attributes:
        world_size: ranks that train one model together.
        shard_size: ranks over which one copy of the model is sharded; the other ranks hold replicas. None: all ranks.
        optimizer: a name in OPTIMIZERS.
        dtype: the dtype of the parameters in forward and backward.
        masters: the precision added to 16-bit parameters: "fp32" copies, "kahan" compensations in the parameters' dtype, or "none".
        state_dtype: the format of the moments, one of `state_formats()`.
        reduce_dtype: the dtype in which ZeRO-3, FSDP2 and HSDP reduce gradients; None: that of the parameters in backward.
        bucket_bytes: the size of buckets of ZeRO-1 and ZeRO-2; None: ShardedOptimizer's default.
        backend: "nccl", or "gloo", whose reduce-scatter needs buffers for received data.
    """

    world_size: int = 1
    shard_size: int | None = None
    optimizer: str = "AdamW"
    dtype: str = "fp32"
    masters: str = "fp32"
    state_dtype: str = "fp32"
    reduce_dtype: str | None = None
    bucket_bytes: int | None = None
    backend: str = "nccl"

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"the world has at least 1 rank, got {self.world_size}")
        if self.shard_size is not None and (self.shard_size < 1 or self.world_size % self.shard_size):
            raise ValueError(
                f"a shard size divides the world size, so that every shard group has a replica of the model, got {self.shard_size} and "
                f"{self.world_size}"
            )
        if self.bucket_bytes is not None and self.bucket_bytes < 1:
            raise ValueError(f"a bucket has at least 1 byte, got {self.bucket_bytes}")
        one_of("optimizer", self.optimizer, tuple(OPTIMIZERS))
        one_of("dtype", self.dtype, tuple(DTYPES))
        one_of("masters", self.masters, MASTERS)
        one_of("state dtype", self.state_dtype, state_formats())
        if self.reduce_dtype is not None:
            one_of("dtype of the reduction", self.reduce_dtype, tuple(DTYPES))
        one_of("backend", self.backend, BACKENDS)

    @property
    def algorithms(self) -> Algorithms:
        return OPTIMIZERS[self.optimizer]

    def algorithm_of(self, name: str, shape: Shape) -> Algorithm:
        return self.algorithms.matrices if is_hidden_matrix(name, shape) else self.algorithms.rest

    @property
    def agrees(self) -> bool:
        """Whether ranks agree, by an all-reduce, in each step."""
        return any(each.statistic is not None or each.matrix is not None for each in self.algorithms)

    @property
    def itemsize(self) -> int:
        """Bytes of an element of a parameter in forward and backward."""
        return DTYPES[self.dtype]

    @property
    def reduce_itemsize(self) -> int:
        """Bytes of an element of a gradient in the reduction."""
        return DTYPES[self.reduce_dtype or self.dtype]

    @property
    def has_masters(self) -> bool:
        return self.itemsize < FP32 and self.masters == "fp32"

    @property
    def master_itemsize(self) -> int:
        """Bytes of an element's master copy, or of its Kahan compensation."""
        if self.has_masters:
            return FP32
        stored = param_format(FORMATS[self.dtype].dtype, kahan_sum=self.masters == "kahan", stochastic_rounding=False)
        return stored.itemsize - self.itemsize

    def moments_itemsize(self, algorithm: Algorithm) -> int:
        """Return the bytes of all moments of an element."""
        return len(algorithm.state) * FORMATS[self.state_dtype].itemsize
