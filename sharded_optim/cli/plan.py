"""`sharded-optim plan`: compare the costs of ways to shard a model. Reads options and prints; `sharded_optim/tools/plan/` computes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer

from sharded_optim.cli import errors
from sharded_optim.cli.tables import print_table, table
from sharded_optim.storage.formats import state_formats
from sharded_optim.tools.plan import (
    CHECKPOINTING,
    DTYPES,
    KINDS,
    MASTERS,
    OPTIMIZERS,
    SHARDINGS,
    Attention,
    Plan,
    Rates,
    Setup,
    Time,
    Workload,
    compare,
    measure,
    time_of,
)
from sharded_optim.tools.plan import plan as plan_of
from sharded_optim.tools.shapes import Model, load

__all__ = ["plan"]

GIB = 2**30
GIGA, TERA = 1e9, 1e12
EXPLANATIONS = {
    "parameters": "between steps",
    "gradients": "when backward is over",
    "moments": "of the optimizer",
    "masters": "or Kahan compensations",
    "buckets": "other buffers, at most",
    "activations": "of forward and backward, at most",
}
OF_MEMORY = ("activations",)  # unknown values that belong to memory; all others belong to time


def plan(
    shapes: Annotated[
        str, typer.Argument(metavar="MODEL_SHAPES", help="JSON {name: [sizes]}, Hugging Face config.json, or package.module:callable")
    ],
    world_size: Annotated[int, typer.Option("--world-size", "-n", help="ranks that train together")],
    sharding: Annotated[str, typer.Option(help=f"all, or one of {', '.join(SHARDINGS)}")] = "all",
    shard_size: Annotated[int | None, typer.Option(help="ranks that hold one copy of the model: zero1, zero2, hsdp")] = None,
    optimizer: Annotated[str, typer.Option(help=f"one of {', '.join(OPTIMIZERS)}")] = "AdamW",
    dtype: Annotated[str, typer.Option(help=f"dtype of parameters: {', '.join(DTYPES)}")] = "fp32",
    masters: Annotated[str, typer.Option(help=f"copies beside 16-bit parameters: {', '.join(MASTERS)}")] = "fp32",
    state_dtype: Annotated[str, typer.Option(help=f"format of moments: {', '.join(state_formats())}")] = "fp32",
    reduce_dtype: Annotated[str | None, typer.Option(help="dtype in which zero3, fsdp2, hsdp reduce gradients; --dtype by default")] = None,
    bucket_mb: Annotated[float | None, typer.Option(help="MiB in a bucket of zero1 and zero2")] = None,
    backend: Annotated[str, typer.Option(help="nccl, or gloo, which needs buffers to receive")] = "nccl",
    link: Annotated[float | None, typer.Option(help="GB/s that a rank sends")] = None,
    shard_link: Annotated[float | None, typer.Option(help="GB/s that a rank sends inside a shard group")] = None,
    memory_bandwidth: Annotated[float | None, typer.Option(help="GB/s that the optimizer reads and writes")] = None,
    tokens: Annotated[int | None, typer.Option(help="tokens of a rank in a step")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="tokens of a sequence, for the operations of attention")] = None,
    attention: Annotated[str | None, typer.Option(metavar="LxHxD", help="layers, heads, head_dim; else as the model computes")] = None,
    checkpointing: Annotated[str, typer.Option(help=f"activation checkpointing: {', '.join(CHECKPOINTING)}")] = "none",
    activations: Annotated[str | None, typer.Option(help="GiB, or profile: counted in a step on the meta device")] = None,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s that a rank does in forward and backward")] = None,
    mfu: Annotated[float | None, typer.Option(help="model FLOPs utilization of a step, %; in place of --tflops")] = None,
    peak_tflops: Annotated[float | None, typer.Option(help="TFLOP/s of a rank at its peak, for --mfu")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, in bytes and seconds")] = False,
) -> None:
    """Compute the memory of a rank, the bytes that it sends in a step, and the time of a step, for several ways to shard a model.

    Values that cannot be computed are listed as unknown, with the reason.
    """
    with errors.for_users():
        rates = Rates(
            link=_times(link, GIGA),
            shard_link=_times(shard_link, GIGA),
            memory=_times(memory_bandwidth, GIGA),
            flops=_times(tflops, TERA),
            mfu=_times(mfu, 1e-2),
            peak_flops=_times(peak_tflops, TERA),
            tokens=tokens,
        )
        setup = Setup(
            world_size=world_size,
            shard_size=shard_size,
            optimizer=_spelled(optimizer),
            dtype=dtype,
            masters=masters,
            state_dtype=state_dtype,
            reduce_dtype=reduce_dtype,
            bucket_bytes=None if bucket_mb is None else int(bucket_mb * 2**20),
            backend=backend,
        )
        if os.getcwd() not in sys.path:  # so that `package.module` is found here, as with `python -m`
            sys.path.insert(0, os.getcwd())
        model = load(shapes)
        workload = measure(
            model,
            setup,
            tokens=tokens,
            sequence_length=sequence_length,
            attention=_attention(attention),
            checkpointing=checkpointing,
            activations=_activations(activations),
        )
        plans = compare(model, setup, workload) if sharding == "all" else [plan_of(model, sharding, setup, workload)]
        times = [time_of(each, rates) for each in plans]
    if as_json:
        print(json.dumps(_as_data(model, setup, workload, plans, times, rates), indent=2))
        return
    _print_head(model, setup)
    if sharding == "all":
        _print_comparison(plans, times)
    else:
        _print_details(plans[0], times[0], rates)
    for name, reason in workload.unknown.items():
        if name in OF_MEMORY or tokens is not None:
            print(f"unknown: {name}: {reason}")


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def _attention(given: str | None) -> Attention | None:
    if given is None:
        return None
    sizes = given.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
        raise ValueError(f"attention is layers, heads and head_dim with x between them, as 32x32x128, got {given!r}")
    layers, heads, head_dim = map(int, sizes)
    return Attention(layers=layers, heads=heads, head_dim=head_dim)


def _activations(given: str | None) -> int | Literal["profile"] | None:
    if given is None or given == "profile":
        return given
    try:
        return int(float(given) * GIB)
    except (ValueError, OverflowError):
        raise ValueError(f"activations are a number of GiB, or profile, got {given!r}") from None


def _spelled(optimizer: str) -> str:
    """Return the name of an optimizer's class, for a name in upper or lower case; other names are returned unchanged."""
    return {name.lower(): name for name in OPTIMIZERS}.get(optimizer.lower(), optimizer)


def _as_data(model: Model, setup: Setup, workload: Workload, plans: Sequence[Plan], times: Sequence[Time], rates: Rates) -> dict[str, Any]:
    return {
        "parameters": model.numel,
        "tensors": len(model.shapes),
        "setup": asdict(setup),
        "workload": {**asdict(workload), "model_flops": workload.model_flops},
        "rates": asdict(rates),
        "plans": [_plan_as_data(*each) for each in zip(plans, times, strict=True)],
    }


def _plan_as_data(plan: Plan, time: Time) -> dict[str, Any]:
    data = asdict(plan)
    del data["workload"]  # the same in all plans
    return {
        **data,
        "memory": {**data["memory"], "total": plan.memory.total},
        "flops_per_token": plan.flops_per_token,
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


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:,.3f}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"


def _print_comparison(plans: Sequence[Plan], times: Sequence[Time]) -> None:
    profiled = ["activations"] if plans[0].memory.activations is not None else []
    timed = any(time.longest is not None for time in times)
    ranged = any(time.shortest != time.longest for time in times)
    caption = "GiB on a rank; sent: GiB by a rank in a step"
    caption += "; ms of a step, at least: communication hidden" if ranged else "; ms of a step" if timed else ""
    milliseconds = ["least ms", "most ms"] if ranged else ["ms"] if timed else []
    grid = table("sharding", numbers=[*KINDS, *profiled, "total", "sent", *milliseconds], caption=caption)
    rows = []
    for each, time in zip(plans, times, strict=True):
        sizes = [*(getattr(each.memory, kind) for kind in (*KINDS, *profiled)), each.memory.total, each.sent]
        rows.append((each.name, *map(_gib, sizes), *[_ms(time.shortest), _ms(time.longest)][: len(milliseconds)]))
    print_table(grid, rows)


def _print_details(plan: Plan, time: Time, rates: Rates) -> None:
    grid = table(plan.name, "", numbers=["GiB"])
    for kind, explanation in EXPLANATIONS.items():
        grid.add_row(kind, explanation, _gib(getattr(plan.memory, kind)))
    grid.add_row("total", "" if plan.memory.activations is not None else "of what is known", _gib(plan.memory.total), style="bold")
    print_table(grid)
    if plan.collectives:
        grid = table("in a step", "of", numbers=["ranks", "GiB sent"])
        for each in plan.collectives:
            grid.add_row(each.operation, each.what, f"{each.ranks:,}", _gib(each.sent))
        grid.add_row("total", "", "", _gib(plan.sent), style="bold")
        print_table(grid)
    if rates.tokens is not None:
        _print_operations(plan.workload)
    if time.longest is not None:
        steps = {
            "step, communication hidden": time.shortest if time.shortest != time.longest else None,
            "step, one after the other": time.longest,
        }
        if time.whole is not None:
            steps = {f"step, at {rates.mfu:.1%} MFU": time.whole}
        parts = {
            "communication": time.communication,
            "optimizer": time.optimizer,
            "matrices": time.matrices,
            "forward and backward": time.compute,
            **steps,
        }
        print_table(table("time", numbers=["ms"]), [(name, _ms(seconds)) for name, seconds in parts.items() if seconds is not None])


def _print_operations(workload: Workload) -> None:
    rows = (
        ("with parameters", "", workload.parameters),
        ("attention", "between tokens", workload.attention),
        ("recomputed", "not counted in MFU", workload.recomputed),
    )
    grid = table("forward and backward", "", numbers=["GFLOP a token"])
    print_table(grid, [(*names, "unknown" if flops is None else f"{flops / GIGA:,.3f}") for *names, flops in rows])
