"""Tables in the output of commands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["counted", "plain", "print_table", "size_of", "table"]

WIDEST = 1000  # characters, more than any table has
UNITS = ("B", "kB", "MB", "GB", "TB")


def table(*headings: str, numbers: Sequence[str] = (), last: Sequence[str] = (), caption: str | None = None) -> Table:
    """Make an empty table.

    Args:
        headings: headings of text columns.
        numbers: headings of number columns, after the text columns.
        last: headings of further text columns, after the number columns.
        caption: text below the table.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left", caption_style="")
    for heading in headings:
        made.add_column(heading, no_wrap=True)
    for heading in numbers:
        made.add_column(heading, no_wrap=True, justify="right")
    for heading in last:
        made.add_column(heading, no_wrap=True)
    return made


def print_table(table: Table, rows: Iterable[Sequence[object]] = ()) -> None:
    """Add rows, and print a table in its full width: a narrower terminal wraps lines, where rich would cut numbers off."""
    for row in rows:
        table.add_row(*map(plain, row))
    console = Console()
    console = Console(width=max(console.width, console.measure(table, options=console.options.update_width(WIDEST)).maximum))
    console.print(table)


def plain(value: object) -> Text:
    """Return text that rich prints literally: it takes the brackets of names and shapes for markup otherwise."""
    return Text(str(value))


def counted(count: int, noun: str) -> str:
    """Format a count with its noun.

    >>> counted(1, "file"), counted(1234, "file")
    ('1 file', '1,234 files')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size_of(count: int) -> str:
    """Format a number of bytes with a decimal unit.

    >>> size_of(999), size_of(1_234_567)
    ('999 B', '1.23 MB')
    """
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {UNITS[unit]}"
