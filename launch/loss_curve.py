"""Draw a run's loss over its steps. matplotlib is imported by the first drawing."""

from __future__ import annotations

from pathlib import Path

from launch.records import Summary, Training, Validation
from sharded_optim.trackers.atomic_write import atomic_write

__all__ = ["draw"]


def draw(path: Path, training: list[Training], validation: list[Validation], summary: Summary) -> None:
    """Write a PNG of training and validation loss, with the losses of a unigram model and of zlib on the validation text.

    Args:
        path: the path of the PNG, which is replaced atomically, so that a reader never sees a part of it.
        training, validation: the records since the run began.
        summary: the state of the run so far.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state as in pyplot
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([r.step for r in training], [r.train_loss_bits for r in training], color="tab:blue", alpha=0.6, label="training")
    losses = [r.val_bits_per_byte for r in validation]
    name = f"validation, last {losses[-1]:.3f}" if losses else "validation"
    axes.plot([r.step for r in validation], losses, color="tab:orange", marker="o", label=name)
    unigram, zlib = summary.unigram_bits_per_byte, summary.zlib_bits_per_byte
    axes.axhline(unigram, color="tab:gray", linestyle="--", label=f"unigram {unigram:.3f}")
    axes.axhline(zlib, color="tab:green", linestyle="--", label=f"zlib, level 9 {zlib:.3f}")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0.0, None))
    axes.set_title(f"{summary.optimizer}, {summary.sharding}, {summary.world_size} processes: {summary.status}")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as draft:
        figure.savefig(draft, dpi=120, format="png")
