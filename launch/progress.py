"""Progress display of rank 0: a bar on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from launch.records import Listener, Resumption, Summary, Training, Validation

__all__ = ["Display"]


class Display(Listener):
    """A listener that prints records."""

    def __init__(self, *, steps: int, unigram: float, zlib: float, folder: Path) -> None:
        self._steps, self._unigram, self._zlib, self._folder = steps, unigram, zlib, folder
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            counts, text = TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}", markup=False)
            self._bar = Progress(counts, BarColumn(bar_width=20), TimeRemainingColumn(), text, console=self._console)
            self._task = self._bar.add_task("waiting for the first steps", total=steps)
            self._bar.start()

    def start(self, resumption: Resumption | None) -> None:
        if resumption is None:
            return
        self._console.print(f"step {resumption.step}/{self._steps}  resuming from the checkpoint")
        if resumption.saved_by != resumption.world_size:
            self._console.print(
                f"{resumption.saved_by} ranks saved the checkpoint, and {resumption.world_size} resume from it: with the same state and "
                f"the same batches in the same order, but each rank has other rows of them, so sums over a batch are rounded differently"
            )

    def training(self, record: Training) -> None:
        parts = [f"loss {record.train_loss_bits:.3f} bits/byte", f"lr {record.lr:.2e}", f"{record.tokens_per_second:,.0f} tokens/s"]
        if record.largest_rms is not None:
            parts.append(f"largest rms {record.largest_rms:.2f} {record.largest_rms_name}")
        if record.skipped_steps:
            parts.append(f"skipped {record.skipped_steps}")
        text = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, description=text)
        else:
            self._console.print(f"step {record.step}/{self._steps}  {text}")

    def validation(self, record: Validation) -> None:
        text = f"validation {record.val_bits_per_byte:.3f} bits/byte  (unigram {self._unigram:.3f}, zlib {self._zlib:.3f})"
        self._console.print(f"step {record.step}/{self._steps}  {text}")  # printed above the bar, if there is one

    def stop(self, step: int, why: str) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._console.print(f"step {step}/{self._steps}  {why}")

    def finish(self, summary: Summary) -> None:
        assert summary.val_bits_per_byte is not None, "the last step is validated"
        if self._bar is not None:
            self._bar.stop()
        table = Table(show_header=False)
        table.add_row("validation", f"{summary.val_bits_per_byte:.3f} bits/byte")
        table.add_row("unigram", f"{summary.unigram_bits_per_byte:.3f} bits/byte")
        table.add_row("zlib, level 9", f"{summary.zlib_bits_per_byte:.3f} bits/byte")
        table.add_row("time", f"{summary.seconds:.0f} s")
        table.add_row("run folder", str(self._folder))
        self._console.print(table)
