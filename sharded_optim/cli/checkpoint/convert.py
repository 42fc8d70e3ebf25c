"""The commands `checkpoint export` and `checkpoint import`."""

from __future__ import annotations

from typing import Annotated

import typer

from sharded_optim import checkpoint
from sharded_optim.checkpoint.imports import FORMATS
from sharded_optim.cli import errors
from sharded_optim.cli.checkpoint.arguments import Root, Step
from sharded_optim.cli.tables import counted

__all__ = ["export", "import_"]


def export(
    root: Root,
    destination: Annotated[str, typer.Argument(metavar="DESTINATION", help="a new folder, or for torch a new file")],
    step: Step = None,
    format_: Annotated[
        str, typer.Option("--format", help="safetensors: the model, as Hugging Face libraries read it; torch: everything, in one file")
    ] = "safetensors",
    masters: Annotated[bool, typer.Option("--masters", help="write float32 masters in place of rounded parameters")] = False,
) -> None:
    """Export a checkpoint for other programs."""
    with errors.for_users():
        if format_ == "safetensors":
            for name in checkpoint.export_safetensors(root, destination, step=step, masters=masters):
                print(f"{destination}/{name}")
        elif format_ == "torch":
            checkpoint.export_torch(root, destination, step=step, masters=masters)
            print(destination)
        else:
            raise ValueError(f"--format is one of safetensors, torch, got {format_!r}")


def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="a folder or file of another library")],
    root: Root,
    step: Annotated[int, typer.Option("--step", help="the step of the new checkpoint")],
    format_: Annotated[str, typer.Option("--format", help=f"auto, or one of {', '.join(FORMATS)}")] = "auto",
    unpickle: Annotated[
        bool,
        typer.Option(
            "--unpickle", help="read pickled files, with torch's weights-only loading: all formats except safetensors are pickled"
        ),
    ] = False,
    optimizer: Annotated[
        str | None, typer.Option(help="the class that will load it: AdamW, StableAdamW, ...; default: the nearest")
    ] = None,
    decay_form: Annotated[
        str | None, typer.Option(help="meaning of weight_decay if the source does not specify it: coupled, l2, decoupled")
    ] = None,
    model_key: Annotated[str | None, typer.Option(help="key of the model's state dict, such as a.b; default: detected")] = None,
    optimizer_key: Annotated[str | None, typer.Option(help="key of the optimizer's state dict")] = None,
    names: Annotated[str | None, typer.Option(help="text file with the names of parameters, in the order of their numbers")] = None,
) -> None:
    """Import another library's checkpoint. Pickled files need --unpickle."""
    with errors.for_users():
        param_names = None
        if names is not None:
            with open(names) as lines:
                param_names = lines.read().split()
        checkpoint.import_from(
            source,
            root,
            step,
            source_format=format_,
            unpickle=unpickle,
            optimizer=optimizer,
            decay_form=decay_form,
            model_key=model_key,
            optimizer_key=optimizer_key,
            param_names=param_names,
        )
        manifest = checkpoint.describe(root, step)
    optimizer_name = "no optimizer" if manifest.parameters is None else manifest.parameters.optimizer
    print(f"step {step}: {counted(len(manifest.tensors), 'tensor')}, {optimizer_name}")
