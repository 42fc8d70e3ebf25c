"""What a run has to say, and to whom: rank 0 hands each record to its listeners, the run folder and the progress display."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["Listener", "Resumption", "Summary", "Training", "Validation"]


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """A checkpoint that a run goes on from."""

    step: int
    saved_by: int  # ranks
    world_size: int  # that go on


@dataclass(frozen=True, kw_only=True)
class Training:
    """Some steps of training, over all ranks."""

    step: int  # the last of them, from 1
    train_loss_bits: float  # bits per byte, mean over them
    lr: float  # of the last
    tokens_per_second: float  # of all ranks together, without validation
    largest_rms: float | None  # the last step's largest per-tensor RMS; None if the optimizer has none, or without its metrics
    largest_rms_name: str | None  # and its tensor
    skipped_steps: int  # since the beginning
    # `metrics()` of the last step, and rank 0's `performance()`; {} between two records that have them, and in what older versions wrote
    optimizer: Mapping[str, float] = field(default_factory=dict)
    non_finite_ranks: Mapping[str, list[int]] = field(default_factory=dict)  # of the last step, by tensor


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The validation set after a step."""

    step: int
    val_bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run, as far as it is done."""

    status: str  # of `trackers/run_files.py`, or that it was interrupted
    val_bits_per_byte: float | None  # the last; None before the first validation
    unigram_bits_per_byte: float
    zlib_bits_per_byte: float
    train_loss_bits: float
    steps: int  # that are done
    skipped_steps: int
    seconds: float  # of the job since it was last started, from reading the config
    tokens_per_second: float  # while training
    parameters: int
    optimizer: str
    sharding: str
    world_size: int
    device: str
    torch: str
    text: str


class Listener(Protocol):
    """What rank 0 calls."""

    def start(self, resumption: Resumption | None) -> None:
        """Training begins, or goes on from a checkpoint."""

    def training(self, record: Training) -> None: ...

    def validation(self, record: Validation) -> None: ...

    def progress(self, summary: Summary) -> None:
        """After each record."""

    def stop(self, step: int, why: str) -> None:
        """The run ends early after this step, and can be gone on with. Nothing follows."""

    def finish(self, summary: Summary) -> None: ...
