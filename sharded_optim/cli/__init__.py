"""The command `sharded-optim`. The commands are in `commands.py`, which needs typer and rich; this module imports without them."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command that is named in the arguments of this process."""
    try:
        from sharded_optim.cli.commands import app
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f"the command line needs {package}, which is not installed; pip install rich typer")
    app()
