"""Records of a training run, and the interface of the listeners to which rank 0 passes them: run folder, progress display, trackers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Listener", "Resumption", "Summary", "Training", "Validation"]


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """A checkpoint from which a run resumes."""

    step: int
    saved_by: int  # ranks
    world_size: int  # ranks that resume


@dataclass(frozen=True, kw_only=True)
class Training:
    """Statistics of the steps since the last such record, over all ranks."""

    step: int  # the last of them, from 1
    train_loss_bits: float  # bits per byte, mean over these steps
    lr: float  # of the last
    tokens_per_second: float  # of all ranks together, without validation
    largest_rms: float | None  # the last step's largest per-tensor RMS; None if the optimizer has none, or without its metrics
    largest_rms_name: str | None  # the name of that tensor
    skipped_steps: int  # since the beginning
    # `metrics()` of the last step, and rank 0's `performance()`; {} between two records that have them, and in files of older versions
    optimizer: Mapping[str, float] = field(default_factory=dict)
    non_finite_ranks: Mapping[str, list[int]] = field(default_factory=dict)  # of the last step, by tensor


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The loss of the validation set after a step."""

    step: int
    val_bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """State of a run so far."""

    status: str  # RUNNING or FINISHED of `trackers/run_files.py`, or `interrupted after step ...`
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


class Listener:
    """A receiver of records on rank 0; by default it ignores them."""

    def start(self, resumption: Resumption | None) -> None:
        """Training begins, or resumes from a checkpoint."""

    def training(self, record: Training) -> None:
        """Some steps are done."""

    def validation(self, record: Validation) -> None:
        """The validation set has been evaluated."""

    def progress(self, summary: Summary) -> None:
        """The state of the run after each training record."""

    def stop(self, step: int, why: str) -> None:
        """The run ends early after this step, and can be resumed. The last call."""

    def finish(self, summary: Summary) -> None:
        """All steps are done. The last call."""
