"""The commands of `sharded-optim`: each a function in a file of its own, listed here. Used by `cli.py` alone."""

from __future__ import annotations

import typer

from sharded_optim.commands import plan

__all__ = ["app"]

app = typer.Typer(
    help="Optimizers for sharded training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _sharded_optim() -> None:
    """Without a callback, typer would make the only command the whole application, and its name an argument of it."""


app.command("plan")(plan.plan)
