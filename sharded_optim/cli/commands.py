"""The list of the commands of `sharded-optim`, each a function in its own file, or a package of several commands. Used by `main`."""

from __future__ import annotations

import typer

from sharded_optim.cli import checkpoint, doctor, plan, report, verify, watch

__all__ = ["app"]

app = typer.Typer(
    help="Optimizers for sharded training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


app.command("doctor")(doctor.doctor)
app.command("plan")(plan.plan)
app.command("report")(report.report)
app.command("verify")(verify.verify)
app.command("watch")(watch.watch)
app.add_typer(checkpoint.app, name="checkpoint")
