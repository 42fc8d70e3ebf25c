"""`sharded-optim checkpoint`: what there is, is it whole, to and from other formats. The work is in `sharded_optim/checkpoint/`.

look.py     ls, show
keep.py     verify, prune
convert.py  export, import
"""

from __future__ import annotations

import typer

from sharded_optim.cli.checkpoint import convert, keep, look

__all__ = ["app"]

app = typer.Typer(help="Look at checkpoints, verify, prune, export and import them.", no_args_is_help=True, rich_markup_mode=None)
app.command("ls")(look.ls)
app.command("show")(look.show)
app.command("verify")(keep.verify)
app.command("prune")(keep.prune)
app.command("export")(convert.export)
app.command("import")(convert.import_)
