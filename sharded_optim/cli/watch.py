"""`sharded-optim watch`: show a running training job in the terminal.

`sharded_optim/tools/runs.py` reads the run folder; this file shows the run and reads key presses.
"""

from __future__ import annotations

import contextlib
import math
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sharded_optim.cli import errors
from sharded_optim.cli.tables import plain
from sharded_optim.tools.runs import FINISHED, REFERENCE_LOSSES, Follower, Run, find_run, printable

__all__ = ["sparkline", "watch"]

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=+*#@"
SPARKLINE = 32  # characters
# Without a record for this many expected intervals plus these seconds, a run is reported as probably interrupted: validation and
# checkpoints take time between two records.
OVERDUE_INTERVALS, OVERDUE_SECONDS = 5.0, 60.0


def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a run of the training job or the tracker jsonl, as runs/latest")],
    once: Annotated[bool, typer.Option("--once", help="print the current state, and exit; the default if stdout is no terminal")] = False,
    interval: Annotated[float, typer.Option(metavar="SECONDS", help="between two readings of the folder", min=0.05)] = 1.0,
) -> None:
    """Show a running training job: steps, loss, validation, largest RMS, clipped tensors, speed. q or Ctrl-C ends the display."""
    with errors.for_users(), errors.exit_on_sigterm():
        follower = Follower(find_run(run))
        console = Console(highlight=False)
        if once or not console.is_terminal:
            console.print(_frame(follower.read(), console))
            return
        # Ctrl-C is an ordinary way to end the display.
        with contextlib.suppress(KeyboardInterrupt), _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(_frame(follower.read(), console, keys=True), refresh=True)
                if pressed(interval) in ("q", "Q"):
                    return


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield a function that waits some seconds for a key press, and returns the key, or "" if there was none.

    The terminal is restored at the end.
    """
    if not sys.stdin.isatty():

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait
        return
    import os
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def wait_for_key(seconds: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        if not ready:
            return ""
        read = os.read(descriptor, 1)
        return read.decode(errors="replace") if read else "q"  # the terminal was closed

    try:
        tty.setcbreak(descriptor)  # keys come without Enter, and Ctrl-C still interrupts
        yield wait_for_key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


# ---------------------------------------------------------------------------------------------------------------------------- frame


def _frame(run: Run, console: Console, *, keys: bool = False) -> Table:
    """Build the display of a run: a line for each value."""
    blocks = ASCII_BLOCKS if console.options.ascii_only else BLOCKS
    records = run.records
    last = records.training[-1] if records.training else None
    unit = f" {records.loss_unit}" if records.loss_unit else ""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")

    def add(name: str, text: str, values: Sequence[float] = ()) -> None:
        line = sparkline(values, blocks)
        grid.add_row(name, plain(f"{printable(text)}  {line}" if line else printable(text)))

    add("run", str(run.path))
    add("status", _status(run))
    grid.add_row("steps", _steps(run))
    if last is None:
        add("loss", "no record of training yet")
    else:
        losses = [record.loss for record in records.training if record.loss is not None]
        add("loss", f"{_shown(losses[-1])}{unit}" if losses else "not recorded", losses)
    if records.validation:
        validation = records.validation[-1]
        text = f"{_shown(validation.loss)}{unit} at step {validation.step:,}"
        references = [f"{name} {_shown(run.summary[key])}" for name, key in REFERENCE_LOSSES if isinstance(run.summary.get(key), float)]
        values = [record.loss for record in records.validation]
        add("validation", text + (f" ({', '.join(references)})" if references else ""), values if len(values) > 1 else ())
    else:
        add("validation", "none yet")
    if last is not None:
        # Not every record has the optimizer's metrics.
        rms = [(record.largest_rms, record.largest_rms_name) for record in records.training if record.largest_rms is not None]
        text = f"{_shown(rms[-1][0])} of {rms[-1][1]}" if rms else "none: this optimizer reports no RMS"
        add("largest RMS", text, [value for value, _ in rms])
        shares = [record.optimizer["clipped_share"] for record in records.training if "clipped_share" in record.optimizer]
        add("clipped", f"{shares[-1]:.1%} of tensors" if shares else "not recorded", shares)
        speeds = [math.nan if record.tokens_per_second is None else record.tokens_per_second for record in records.training]
        add("tokens/s", "not recorded" if last.tokens_per_second is None else f"{last.tokens_per_second:,.0f}", speeds)
        add("skipped steps", "not recorded" if last.skipped_steps is None else f"{last.skipped_steps:,}")
    add("ranks", ", ".join([str(run.ranks or "not known"), *(str(run.summary[key]) for key in ABOUT if key in run.summary)]))
    if run.seconds_since_record is not None:
        add("last record", f"{_age(run.seconds_since_record)} ago")
    if records.restarts:
        add("resumed", f"at step {', '.join(f'{step:,}' for step in records.restarts)}")
    if records.unreadable:
        add("unreadable", f"{records.unreadable:,} lines of metrics.jsonl")
    if keys:
        grid.add_row("", Text("q leaves", style="dim"))
    return grid


ABOUT = ("sharding", "optimizer", "device")


def _status(run: Run) -> str:
    if run.status == FINISHED or run.seconds_since_record is None or run.status.startswith("interrupted"):
        return run.status
    expected = _expected_interval(run)
    if expected is not None and run.seconds_since_record > OVERDUE_SECONDS + OVERDUE_INTERVALS * expected:
        return f"{run.status}; no record for {_age(run.seconds_since_record)}, expected every {_age(expected)}: probably interrupted"
    return run.status


def _expected_interval(run: Run) -> float | None:
    """Return the expected seconds between two training records, from the last speed; None if the speed is unknown."""
    if len(run.records.training) < 2:
        return None
    before, last = run.records.training[-2:]
    batch, length = run.config.get("batch_size"), run.config.get("sequence_length")
    if not isinstance(batch, int) or not isinstance(length, int) or not last.tokens_per_second or not math.isfinite(last.tokens_per_second):
        return None
    return (last.step - before.step) * batch * length / last.tokens_per_second


def _steps(run: Run) -> Table | Text:
    done = run.records.last_step
    if not run.steps:
        return Text(f"{done:,}")
    line = Table.grid(padding=(0, 2))
    text = f"{done:,} of {run.steps:,}, {done / run.steps:.0%}"
    line.add_row(Text(text), ProgressBar(total=run.steps, completed=done, width=SPARKLINE))
    return line


def sparkline(values: Sequence[float], blocks: str = BLOCKS, width: int = SPARKLINE) -> str:
    """Draw values in one line of text. A character shows the largest of its values; a blank shows that none is finite.

    >>> sparkline([0.0, 1.0, 7.0])
    '▁▂█'
    """
    count = min(width, len(values))
    parts = [values[index * len(values) // count : (index + 1) * len(values) // count] for index in range(count)]
    heights = [max((value for value in part if math.isfinite(value)), default=math.nan) for part in parts]
    finite = [height for height in heights if math.isfinite(height)]
    if not finite:
        return ""
    least, span = min(finite), max(finite) - min(finite)
    scale = (len(blocks) - 1) / span if span else 0.0
    return "".join(blocks[round((height - least) * scale)] if math.isfinite(height) else " " for height in heights)


def _shown(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def _age(seconds: float) -> str:
    """Format seconds in at most two units.

    >>> _age(4.2), _age(70), _age(3700), _age(200_000)
    ('4 s', '1 min 10 s', '1 h 1 min', '2 d 7 h')
    """
    whole = int(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"
