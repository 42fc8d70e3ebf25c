"""Arguments and options that several `checkpoint` commands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Root", "Step"]

Root = Annotated[str, typer.Argument(metavar="ROOT", help="folder that holds the step-... folders, or a URL that fsspec supports")]
Step = Annotated[int | None, typer.Option("--step", help="default: the highest")]
