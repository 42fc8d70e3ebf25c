"""`sharded-optim checkpoint`: list, show, verify, prune, export and import checkpoints, with `sharded_optim/checkpoint/`.

inspection.py    ls, show
maintenance.py   verify, prune
convert.py       export, import
"""

from __future__ import annotations

import typer

from sharded_optim.cli.checkpoint import convert, inspection, maintenance

__all__ = ["app"]

app = typer.Typer(help="List, show, verify, prune, export and import checkpoints.", no_args_is_help=True, rich_markup_mode=None)
app.command("ls")(inspection.ls)
app.command("show")(inspection.show)
app.command("verify")(maintenance.verify)
app.command("prune")(maintenance.prune)
app.command("export")(convert.export)
app.command("import")(convert.import_)
