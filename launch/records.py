"""Records of a training run, and the interface of the listeners to which rank 0 passes them: run folder, progress display, trackers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Listener", "Resumption", "Summary", "Training", "Validation"]


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """A checkpoint from which a run resumes."""

    step: int  # step of the checkpoint
    saved_by: int  # number of ranks that saved it
    world_size: int  # number of ranks that resume


@dataclass(frozen=True, kw_only=True)
class Training:
    """Statistics of the steps since the previous training record, over all ranks."""

    step: int  # the last of these steps, from 1
    train_loss_bits: float  # bits per byte, mean over these steps
    lr: float  # learning rate of the last step
    tokens_per_second: float  # of all ranks together, without validation
    largest_rms: float | None  # largest per-tensor RMS of the last step; None if the optimizer has no RMS, or the record no metrics
    largest_rms_name: str | None  # the name of that tensor
    skipped_steps: int  # since the job was started or resumed
    # The optimizer's `metrics()` of the last step, and rank 0's `performance()`; {} in records without metrics and in older files.
    optimizer: Mapping[str, float] = field(default_factory=dict)
    non_finite_ranks: Mapping[str, list[int]] = field(default_factory=dict)  # ranks that held non-finite pieces, by tensor


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The loss of the validation set after a step."""

    step: int
    val_bits_per_byte: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """State of a run so far."""

    status: str  # RUNNING or FINISHED of `trackers/run_files.py`, or `interrupted after step ...`
    val_bits_per_byte: float | None  # of the last validation; None before the first
    unigram_bits_per_byte: float
    zlib_bits_per_byte: float
    train_loss_bits: float  # of the last training record
    steps: int  # number of steps done
    skipped_steps: int
    seconds: float  # since the job was last started, before it read its config
    tokens_per_second: float  # mean while training
    parameters: int  # number of elements
    optimizer: str
    sharding: str
    world_size: int
    device: str
    torch: str
    text: str


class Listener:
    """A receiver of records on rank 0; by default it ignores them."""

    def start(self, resumption: Resumption | None) -> None:
        """Called first, when training begins or resumes from a checkpoint."""

    def training(self, record: Training) -> None:
        """Called with the record of the last training steps."""

    def validation(self, record: Validation) -> None:
        """Called with the record of a validation."""

    def progress(self, summary: Summary) -> None:
        """Called after each training record with the state of the run."""

    def stop(self, step: int, why: str) -> None:
        """Called last if the run ends early after this step, and can be resumed."""

    def finish(self, summary: Summary) -> None:
        """Called last if all steps are done."""
