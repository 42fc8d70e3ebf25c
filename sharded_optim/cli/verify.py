"""`sharded-optim verify`: compare sharded training with one process. The comparison is in `sharded_optim/tools/verify/`."""

from __future__ import annotations

import ast
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sharded_optim.cli import errors

__all__ = ["verify"]


def verify(
    target: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face config.json, or package.module:callable")],
    batch: Annotated[str | None, typer.Option(help="package.module:callable of the step; required unless MODEL is a config.json")] = None,
    optimizer: Annotated[str, typer.Option(help="one of this library, as StableAdamW, or any other, as torch.optim.AdamW")] = "StableAdamW",
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="hyperparameter, as lr=0.01; may be repeated")] = None,
    sharding: Annotated[str, typer.Option(help="all, names separated by commas, or package.module:function")] = "fsdp2",
    world_size: Annotated[int, typer.Option("--world-size", "-n", help="processes; a power of two")] = 2,
    steps: Annotated[int, typer.Option(help="half of them before a checkpoint is saved and loaded")] = 8,
    max_grad_norm: Annotated[float | None, typer.Option(help="also try torch's clipping")] = None,
    timeout: Annotated[float, typer.Option(help="seconds for a step")] = 180.0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    html: Annotated[Path | None, typer.Option(help="also write a page")] = None,
) -> None:
    """Train a model sharded over CPU processes; compare every parameter with one process. Exit status 1: a parameter or value differs."""
    from sharded_optim.cli.targets import optimizer_named, target_named
    from sharded_optim.tools.imported import imported
    from sharded_optim.tools.verify import SHARDINGS, MakeOptimizer
    from sharded_optim.tools.verify import verify as verify_one
    from sharded_optim.tools.verify.page import page
    from sharded_optim.tools.verify.shardings import installed

    with errors.for_users(), errors.exit_on_sigterm():
        if os.getcwd() not in sys.path:  # so that `package.module` is found here, as with `python -m`
            sys.path.insert(0, os.getcwd())
        build_model, build_batch = target_named(target, batch)
        given = optimizer_named(optimizer, dict(map(_parsed, option or [])))
        names = installed(MakeOptimizer(given)) if sharding == "all" else [name.strip() for name in sharding.split(",")]
        unknown = [name for name in names if name not in SHARDINGS and ":" not in name]
        if unknown:
            raise ValueError(f"--sharding is all, some of {', '.join(SHARDINGS)}, or package.module:function, got {', '.join(unknown)}")
        reports = []
        # A progress line if stderr is a terminal, else nothing: with FORCE_COLOR rich would take any stderr for a terminal.
        progress = Console(stderr=True, force_terminal=sys.stderr.isatty(), emoji=False)
        for name in names:
            with progress.status(f"{name}: processes start") as status:
                report = verify_one(
                    build_model,
                    build_batch,
                    given,
                    sharding=name if name in SHARDINGS else imported(name),
                    world_size=world_size,
                    steps=steps,
                    max_grad_norm=max_grad_norm,
                    timeout=timeout,
                    progress=lambda line, status=status, name=name: status.update(f"{name}: {line}"),
                )
            reports.append(report)
            if not as_json:
                print(report.text(), flush=True)
        if html is not None:
            html.write_text(page(reports), encoding="utf-8")
    if as_json:
        print(json.dumps([report.as_data() for report in reports], indent=2))
    if not all(report.is_ok for report in reports):
        raise typer.Exit(1)


def _parsed(option: str) -> tuple[str, Any]:
    """Split name=value; a value that is neither JSON nor a literal of Python is text.

    >>> _parsed("betas=(0.9, 0.95)"), _parsed("foreach=false"), _parsed("nonfinite=raise")
    (('betas', (0.9, 0.95)), ('foreach', False), ('nonfinite', 'raise'))
    """
    name, is_there, text = option.partition("=")
    if not is_there:
        raise ValueError(f"--option is name=value, got {option!r}")
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return name, read(text)
    return name, text
