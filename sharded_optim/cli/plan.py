"""`sharded-optim plan`: what ways of sharding a model take. The arithmetic is in `sharded_optim/tools/plan/`; this reads and prints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from sharded_optim.cli import errors
from sharded_optim.cli.tables import print_table, table
from sharded_optim.storage.formats import state_formats
from sharded_optim.tools.plan import DTYPES, KINDS, MASTERS, OPTIMIZERS, SHARDINGS, Plan, Rates, Setup, compare, time_of
from sharded_optim.tools.plan import plan as plan_of
from sharded_optim.tools.shapes import Model, load

__all__ = ["plan"]

GIB = 2**30
EXPLANATIONS = {
    "parameters": "between steps",
    "gradients": "when backward is over",
    "moments": "of the optimizer",
    "masters": "or Kahan compensations",
    "buckets": "other buffers, at most",
}


def plan(
    shapes: Annotated[
        str, typer.Argument(metavar="MODEL_SHAPES", help="JSON {name: [sizes]}, Hugging Face config.json, or package.module:callable")
    ],
    world_size: Annotated[int, typer.Option("--world-size", "-n", help="ranks that train together")],
    sharding: Annotated[str, typer.Option(help=f"all, or one of {', '.join(SHARDINGS)}")] = "all",
    shard_size: Annotated[int | None, typer.Option(help="ranks that hold one copy of the model: zero1, zero2, hsdp")] = None,
    optimizer: Annotated[str, typer.Option(help=f"one of {', '.join(OPTIMIZERS)}")] = "AdamW",
    dtype: Annotated[str, typer.Option(help=f"of parameters: {', '.join(DTYPES)}")] = "fp32",
    masters: Annotated[str, typer.Option(help=f"beside 16-bit parameters: {', '.join(MASTERS)}")] = "fp32",
    state_dtype: Annotated[str, typer.Option(help=f"of moments: {', '.join(state_formats())}")] = "fp32",
    bucket_mb: Annotated[float | None, typer.Option(help="MiB in a bucket of zero1 and zero2")] = None,
    backend: Annotated[str, typer.Option(help="nccl, or gloo, which needs buffers to receive")] = "nccl",
    link: Annotated[float | None, typer.Option(help="GB/s that a rank sends")] = None,
    shard_link: Annotated[float | None, typer.Option(help="GB/s that a rank sends inside of a shard group")] = None,
    memory_bandwidth: Annotated[float | None, typer.Option(help="GB/s that the optimizer reads and writes")] = None,
    tokens: Annotated[int | None, typer.Option(help="of a rank in a step")] = None,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s that a rank does in forward and backward")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, in bytes and seconds")] = False,
) -> None:
    """Memory of a rank, bytes that it sends in a step, and the time of a step, for ways of sharding a model."""
    with errors.for_users():
        rates = Rates(
            link=_giga(link),
            shard_link=_giga(shard_link),
            memory=_giga(memory_bandwidth),
            flops=None if tflops is None else tflops * 1e12,
            tokens=tokens,
        )
        setup = Setup(
            world_size=world_size,
            shard_size=shard_size,
            optimizer=_spelled(optimizer),
            dtype=dtype,
            masters=masters,
            state_dtype=state_dtype,
            bucket_bytes=None if bucket_mb is None else int(bucket_mb * 2**20),
            backend=backend,
        )
        if os.getcwd() not in sys.path:  # where `python -m` looks for `package.module` too
            sys.path.insert(0, os.getcwd())
        model = load(shapes)
        plans = compare(model, setup) if sharding == "all" else [plan_of(model, sharding, setup)]
    if as_json:
        print(json.dumps(_as_data(model, setup, plans, rates), indent=2))
        return
    _print_head(model, setup)
    if sharding == "all":
        _print_comparison(plans, rates)
    else:
        _print_details(plans[0], rates)


def _giga(value: float | None) -> float | None:
    return None if value is None else value * 1e9


def _spelled(optimizer: str) -> str:
    """As the class is, whatever the case of what was given."""
    return {name.lower(): name for name in OPTIMIZERS}.get(optimizer.lower(), optimizer)


def _as_data(model: Model, setup: Setup, plans: Sequence[Plan], rates: Rates) -> dict[str, Any]:
    return {
        "parameters": model.numel,
        "tensors": len(model.shapes),
        "setup": asdict(setup),
        "rates": asdict(rates),
        "plans": [_plan_as_data(each, rates) for each in plans],
    }


def _plan_as_data(plan: Plan, rates: Rates) -> dict[str, Any]:
    time = time_of(plan, rates)
    return {
        **asdict(plan),
        "memory": {**asdict(plan.memory), "total": plan.memory.total},
        "sent": plan.sent,
        "seconds": {**asdict(time), "shortest": time.shortest, "longest": time.longest},
    }


# -------------------------------------------------------------------------------------------------------------------------- tables


def _print_head(model: Model, setup: Setup) -> None:
    masters = f" and {setup.masters} masters" if setup.has_masters else " with Kahan compensations" if setup.master_itemsize else ""
    print(
        f"{model.numel:,} parameters in {len(model.shapes)} tensors, {setup.dtype}{masters}, {setup.optimizer} with {setup.state_dtype} "
        f"moments, {setup.world_size:,} rank{'s' if setup.world_size > 1 else ''}\n"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:,.3f}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"


def _print_comparison(plans: Sequence[Plan], rates: Rates) -> None:
    times = [time_of(each, rates) for each in plans]
    timed = any(time.longest is not None for time in times)
    ranged = any(time.shortest != time.longest for time in times)
    caption = "GiB on a rank; sent: GiB by a rank in a step"
    caption += "; ms of a step, at least: communication hidden" if ranged else "; ms of a step" if timed else ""
    milliseconds = ["least ms", "most ms"] if ranged else ["ms"] if timed else []
    grid = table("sharding", numbers=[*KINDS, "total", "sent", *milliseconds], caption=caption)
    for each, time in zip(plans, times, strict=True):
        row = [each.name, *(_gib(getattr(each.memory, kind)) for kind in KINDS), _gib(each.memory.total), _gib(each.sent)]
        grid.add_row(*row, *[_ms(time.shortest), _ms(time.longest)][: len(milliseconds)])
    print_table(grid)


def _print_details(plan: Plan, rates: Rates) -> None:
    grid = table(plan.name, "", numbers=["GiB"])
    for kind in KINDS:
        grid.add_row(kind, EXPLANATIONS[kind], _gib(getattr(plan.memory, kind)))
    grid.add_row("total", "", _gib(plan.memory.total), style="bold")
    print_table(grid)
    if plan.collectives:
        grid = table("in a step", "of", numbers=["ranks", "GiB sent"])
        for each in plan.collectives:
            grid.add_row(each.operation, each.what, f"{each.ranks:,}", _gib(each.sent))
        grid.add_row("total", "", "", _gib(plan.sent), style="bold")
        print_table(grid)
    time = time_of(plan, rates)
    if time.longest is not None:
        grid = table("time", numbers=["ms"])
        parts = {
            "communication": time.communication,
            "optimizer": time.optimizer,
            "matrices": time.matrices,
            "forward and backward": time.compute,
        }
        if time.shortest != time.longest:
            parts["step, communication hidden"] = time.shortest
        parts["step, one after the other"] = time.longest
        for name, seconds in parts.items():
            if seconds is not None:
                grid.add_row(name, _ms(seconds))
        print_table(grid)
