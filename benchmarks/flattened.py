"""What wrappers that flatten parameters do to an optimizer's answer: `python -m benchmarks.flattened`.

DeepSpeed and FSDP1 give an optimizer flat tensors in which parameters are fused, cut and padded. Each cell trains the model of
`given_gradients.py` for 10 steps on gloo ranks and compares it with the same optimizer class in one process on ordinary tensors, given the
same gradients. The error is the largest over tensors of max |parameter - reference| / max |reference|. torch's AdamW is the control: it
treats every element alike, so that an error of its own is the wrapper's doing. Muon trains a model of matrices alone: torch's has nothing
for others.

With bfloat16, what is compared are DeepSpeed's float32 masters, as `safe_get_full_fp32_param` gathers them. Those of stages 1 and 2 are
gathered here, because it is wrong there with `round_robin_gradients`. State is gathered the same way, in the masters' place.

Ranks end each cell together. When one of them hangs, or ranks fail differently, they are ended and new ones go on with the next cell.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from benchmarks import report
from benchmarks.environment import describe, summary
from benchmarks.given_gradients import MLP, Groups, Layer, Model, Shapes, gradients, one_group, relative_error, two_groups, unsharded

__all__ = ["CONTENDERS", "SETTINGS", "Cell", "Contender", "Setting", "main", "run"]

RESULTS = Path(__file__).parent / "results"
STEPS = 10
HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
TIMEOUT = timedelta(seconds=60)  # of a collective, and of a rank for the others
PATIENCE = 240.0  # seconds without a result after which ranks are ended; DeepSpeed compiles an extension when first used
GRACE = 5.0  # seconds for the others, when a rank has died
DEEPSPEED, FSDP1 = "DeepSpeed", "FSDP1"
OURS = "sharded_optim"
DEEPSPEEDS_MUON = "deepspeed.runtime.zero.muon.muon_optimizer"
WEIGHTS: Shapes = tuple(layer[:1] for layer in MLP)


def _two_groups_of_weights(model: nn.Module) -> Groups:
    """The first, and the others with another learning rate."""
    first, *others = model.parameters()
    return [{"params": [first]}, {"params": others, "lr": 5e-3}]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An optimizer; all get `HYPERPARAMETERS`.

    Attributes:
        library, name: of the class.
        layers: shapes of the model that it trains.
        groups: make param groups of that model, by their number.
        moments: of its state, that are compared too.
        wrappers: under which it can be.
    """

    library: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    layers: Shapes = MLP
    groups: tuple[Callable[[nn.Module], Groups], ...] = (one_group, two_groups)
    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    wrappers: tuple[str, ...] = (DEEPSPEED, FSDP1)

    @property
    def title(self) -> str:
        return f"{'ours' if self.library == OURS else self.library.partition('.runtime')[0]} {self.name.removesuffix('WithAuxAdam')}"

    def make(self, groups: Groups, **options: Any) -> torch.optim.Optimizer:
        kind = getattr(import_module(self.library), self.name)
        if self.library == DEEPSPEEDS_MUON:
            return kind([{**HYPERPARAMETERS, **self.options, "use_muon": True, **group} for group in groups])
        return kind(groups, **HYPERPARAMETERS, **self.options, **options)

    def groups_of(self, model: nn.Module, setting: Setting) -> Groups:
        return self.groups[setting.groups - 1](model)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A wrapper with its options."""

    wrapper: str
    name: str
    world_sizes: tuple[int, ...]
    groups: int = 1
    options: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's config, or FSDP1's arguments
    quick: bool = False  # whether a smoke run has it


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What came out for an optimizer under a setting, on some number of ranks."""

    wrapper: str
    setting: str
    ranks: int
    contender: str
    error: float | None = None  # of the parameters
    state_error: float | None = None  # of the moments that are compared
    bitwise: bool | None = None  # parameters, moments and step counters
    failure: str | None = None


# A new optimizer is one more entry. The first is the control. optimi's default is a Triton kernel, which does not run on a CPU.
OF_WEIGHTS: dict[str, Any] = {"layers": WEIGHTS, "groups": (one_group, _two_groups_of_weights)}  # those of Muon
CONTENDERS = (
    Contender(library="torch.optim", name="AdamW"),
    Contender(library="optimi", name="StableAdamW", options={"foreach": False, "triton": False}),
    Contender(library=OURS, name="AdamW"),
    Contender(library=OURS, name="StableAdamW"),
    Contender(library="torch.optim", name="Muon", moments=(), **OF_WEIGHTS),
    Contender(
        library=DEEPSPEEDS_MUON,
        name="MuonWithAuxAdam",
        options={"ns_method": "standard"},
        moments=(),
        wrappers=(DEEPSPEED,),
        **OF_WEIGHTS,
    ),
    Contender(library=OURS, name="Muon", moments=("momentum_buffer",), **OF_WEIGHTS),
)


def _deepspeed_settings() -> Iterator[Setting]:
    """Stages, dtypes and what changes how parameters are flattened."""
    for dtype in ("fp32", "bf16"):
        low = {"bf16": {"enabled": True}} if dtype == "bf16" else {}
        for stage in range(4):
            base = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
            variants: list[tuple[str, int, dict[str, Any]]] = [("", 1, {}), (", 2 groups", 2, {})]
            if stage == 3:
                variants.append((", 3 sub-groups", 1, {"sub_group_size": 150}))
            if stage > 0:
                variants.append((", CPU offload", 1, {"offload_optimizer": {"device": "cpu", "pin_memory": False}}))
            if stage in (1, 2):
                variants.append((", round robin", 1, {"round_robin_gradients": True}))
            for name, groups, zero in variants:
                yield Setting(
                    wrapper=DEEPSPEED,
                    name=f"stage {stage} {dtype}{name}",
                    world_sizes=(2, 3),
                    groups=groups,
                    options={"zero_optimization": base | zero} | low,
                    quick=stage in (2, 3) and dtype == "fp32" and not name,
                )
            if stage == 1 and dtype == "bf16":
                for name, groups, _ in variants[:2]:
                    yield Setting(
                        wrapper=DEEPSPEED,
                        name=f"stage 1 bf16, fp32 accumulation{name}",
                        world_sizes=(2, 3),
                        groups=groups,
                        options={"zero_optimization": base, "data_types": {"grad_accum_dtype": "fp32"}} | low,
                    )


def _fsdp1_settings() -> Iterator[Setting]:
    for use_orig_params in (True, False):
        for units in ("one unit", "a unit per layer"):
            for groups in (1, 2):
                if groups == 2 and not use_orig_params:
                    continue  # a flat parameter has weights and biases, which cannot be told apart
                yield Setting(
                    wrapper=FSDP1,
                    name=f"use_orig_params={use_orig_params}, {units}{', 2 groups' if groups == 2 else ''}",
                    world_sizes=(2, 4),
                    groups=groups,
                    options={"use_orig_params": use_orig_params, "unit_per_layer": units != "one unit"},
                    quick=units == "one unit" and groups == 1,
                )


SETTINGS = (*_deepspeed_settings(), *_fsdp1_settings())


@dataclass(frozen=True, kw_only=True)
class Wrapped:
    """A wrapped model and its optimizer."""

    optimizer: torch.optim.Optimizer  # the contender itself
    step: Callable[[Sequence[Tensor]], None]  # forward and backward with this rank's gradients, then the optimizer's step
    whole: Callable[[], dict[str, Tensor]]  # copies of the whole float32 parameters; called by all ranks
    close: Callable[[], None]


def _deepspeed(contender: Contender, setting: Setting) -> Wrapped:
    deepspeed = import_module("deepspeed")  # by name: it is not among the development packages
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    initialize = import_module(f"{OURS}.deepspeed").initialize if contender.library == OURS else deepspeed.initialize
    model = Model(contender.layers)
    names = {param: name for name, param in model.named_parameters()}
    groups = contender.groups_of(model, setting)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # the default clips
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    config |= setting.options
    if contender.library == DEEPSPEEDS_MUON:  # which its engine makes itself, and which refuses its default, reduce-scatter, in stage 3
        config["optimizer"] = {"type": "Muon", "params": {**HYPERPARAMETERS, **contender.options}}
        config["zero_optimization"] = {**config["zero_optimization"], "reduce_scatter": False}
        engine = initialize(model=model, model_parameters=groups, config=config)[0]
        optimizer = engine.basic_optimizer
    else:
        optimizer = contender.make(groups)
        engine = initialize(model=model, optimizer=optimizer, config=config)[0]

    def step(grads: Sequence[Tensor]) -> None:
        engine.backward(engine(grads))
        engine.step()

    def whole() -> dict[str, Tensor]:
        masters = dict(_deepspeed_masters(engine.optimizer, list(names)))
        return {name: masters[param].detach().clone() for param, name in names.items()}

    return Wrapped(optimizer=optimizer, step=step, whole=whole, close=engine.destroy)


def _deepspeed_masters(wrapper: Any, params: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter and the whole of its master; tried with deepspeed 0.19.8."""
    kind = type(wrapper).__name__
    if kind == "DeepSpeedZeroOptimizer":  # stages 1 and 2
        for index, partition in enumerate(wrapper.single_partition_of_fp32_groups):
            process_group = wrapper.real_dp_process_group[index]
            partitions = [torch.empty_like(partition) for _ in range(dist.get_world_size(process_group))]
            dist.all_gather(partitions, partition.detach(), group=process_group)
            flat = torch.cat(partitions)
            for param, offset in zip(wrapper.round_robin_bit16_groups[index], wrapper.round_robin_bit16_offsets[index], strict=True):
                yield param, flat[offset : offset + param.numel()].view(param.shape)
    elif kind in ("BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3"):
        safe_get_full_fp32_param = import_module("deepspeed.utils").safe_get_full_fp32_param
        yield from ((param, safe_get_full_fp32_param(param)) for param in params)
    elif kind == "FP16_UnfusedOptimizer":  # stage 0 in bfloat16
        for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            yield from zip(low, high, strict=True)
    else:  # stage 0 in float32: there is no wrapper
        yield from zip(params, params, strict=True)


def _fsdp1(contender: Contender, setting: Setting) -> Wrapped:
    policy = ModuleWrapPolicy({Layer}) if setting.options["unit_per_layer"] else None
    model = FullyShardedDataParallel(
        Model(contender.layers), auto_wrap_policy=policy, use_orig_params=setting.options["use_orig_params"], device_id=torch.device("cpu")
    )
    options = {"layout": import_module(OURS).fsdp1_layout(model)} if contender.library == OURS else {}
    optimizer = contender.make(contender.groups_of(model, setting), **options)

    def step(grads: Sequence[Tensor]) -> None:
        model(grads).backward()
        optimizer.step()
        optimizer.zero_grad()

    def whole() -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {name.replace("_fsdp_wrapped_module.", ""): param.detach().clone() for name, param in model.named_parameters()}

    return Wrapped(optimizer=optimizer, step=step, whole=whole, close=lambda: None)


WRAPPERS: dict[str, Callable[[Contender, Setting], Wrapped]] = {DEEPSPEED: _deepspeed, FSDP1: _fsdp1}


def _train(contender: Contender, setting: Setting) -> dict[str, Any]:
    """Train on this rank and compare: what a cell says."""
    wrapped = WRAPPERS[setting.wrapper](contender, setting)
    try:
        for step in range(1, STEPS + 1):
            wrapped.step(gradients(step, contender.layers, rank=dist.get_rank(), world_size=dist.get_world_size()))
        reference = unsharded(contender.make, STEPS, contender.layers, groups=partial(contender.groups_of, setting=setting))
        state = wrapped.optimizer.state
        counters: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counters, {float(of_param["step"]) for of_param in state.values() if "step" in of_param})
        found = [(wrapped.whole(), reference.params)]
        for key in contender.moments:
            with torch.no_grad():
                for param, of_param in state.items():
                    if key in of_param:  # an optimizer may have none for an empty shard
                        param.copy_(of_param[key])
            found.append((wrapped.whole(), {name: of_param[key] for name, of_param in reference.state.items()}))
    finally:
        wrapped.close()
    errors = [relative_error(whole, expected) for whole, expected in found]
    if not all(math.isfinite(error) for error in errors):
        raise ArithmeticError(f"not finite: errors are {errors}")
    # Not the signs of zeros: they are lost where DeepSpeed gathers by adding.
    equal = all(torch.equal(whole[name], value) for whole, expected in found for name, value in expected.items())
    expected_counters = {float(of_param["step"]) for of_param in reference.state.values() if "step" in of_param}
    bitwise = equal and set().union(*counters) == expected_counters
    return {"error": errors[0], "state_error": max(errors[1:], default=None), "bitwise": bitwise}


Job = tuple[Contender, Setting]


def _rank(rank: int, ranks: int, folder: str, environment: dict[str, str], jobs: Sequence[Job]) -> None:
    """Do one job after the other; rank 0 writes a line about each. Ends early when the ranks fail in different ways."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print; standard output is for the report
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # DeepSpeed's Muon is compiled, which takes minutes here
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    agreed = dist.FileStore(f"{folder}/agreed", ranks)  # pyright: ignore[reportPrivateImportUsage]
    agreed.set_timeout(TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=TIMEOUT)
    own_file = Path(folder) / f"failure{rank}"
    for number, job in enumerate(jobs):
        outcome: dict[str, Any] = {}
        failure = ""
        try:
            outcome = _train(*job)
        except Exception as error:  # whatever it is: the other cells go on, and the report has the reason
            failure = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            own_file.write_text(failure)
        agreed.set(f"{number}/{rank}", failure)
        if any(agreed.get(f"{number}/{other}").decode() != failure for other in range(ranks)):
            break
        own_file.unlink(missing_ok=True)
        if rank == 0:
            with (Path(folder) / "found").open("a") as file:
                file.write(json.dumps(outcome or {"failure": failure}) + "\n")
    gc.collect()  # wrapped models are cycles that hold process groups, which must not outlive the interpreter
    dist.destroy_process_group()


def _found(folder: str) -> list[dict[str, Any]]:
    path = Path(folder) / "found"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # without what may be half written
    return [json.loads(line) for line in lines]


def _spawn(ranks: int, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Start ranks, and give back what they found out about the first jobs; fewer than all if a job fails differently on the ranks."""
    with tempfile.TemporaryDirectory() as folder:
        context, environment = mp.get_context("spawn"), _environment(ranks)
        processes = [context.Process(target=_rank, args=(rank, ranks, folder, environment, jobs), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        number, since = 0, time.monotonic()
        while any(process.is_alive() for process in processes) and time.monotonic() < since + PATIENCE:
            time.sleep(0.2)
            if any(process.exitcode for process in processes):  # the others may wait for it in vain
                since = min(since, time.monotonic() - PATIENCE + GRACE)
            elif len(_found(folder)) > number:
                number, since = len(_found(folder)), time.monotonic()
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        found = _found(folder)
        if len(found) < len(jobs):
            failures = [path.read_text() for path in sorted(Path(folder).glob("failure*"))]
            found.append({"failure": " | ".join(dict.fromkeys(failures)) or f"Hang: of ranks {hung}"})
        return found


def _environment(ranks: int) -> dict[str, str]:
    """For the ranks; DeepSpeed reads most of it, and compiles with ninja."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / OURS / "torch_extensions"
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR") or str(cache_folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def run(settings: Sequence[Setting], contenders: Sequence[Contender], world_sizes: Sequence[int] | None = None) -> list[Cell]:
    """Fill the table.

    Args:
        settings, contenders: rows and columns.
        world_sizes: only these; None means all that the settings have.
    """
    cells = []
    for ranks in sorted({ranks for setting in settings for ranks in setting.world_sizes if world_sizes is None or ranks in world_sizes}):
        jobs = [
            (contender, setting)
            for setting in settings
            if ranks in setting.world_sizes
            for contender in contenders
            if setting.wrapper in contender.wrappers
        ]
        while jobs:
            found = _spawn(ranks, jobs)
            for (contender, setting), outcome in zip(jobs, found, strict=False):
                cells.append(Cell(wrapper=setting.wrapper, setting=setting.name, ranks=ranks, contender=contender.title, **outcome))
            jobs = jobs[len(found) :]
    return cells


def _number(error: float) -> str:
    """As 3.7e-2."""
    mantissa, exponent = f"{error:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}" if error else "0"


def _entry(cell: Cell) -> str:
    if cell.failure is not None:
        return cell.failure.split(":", 1)[0]
    assert cell.error is not None
    return _number(cell.error)


def _kind(cell: Cell) -> str:
    """What settings that differ in dtype, groups and options have in common."""
    words = cell.setting.split(",")[0].split()
    return " ".join([cell.wrapper, *words[:2]] if cell.wrapper == DEEPSPEED else [cell.wrapper, *words])


def _worst(cells: Sequence[Cell]) -> str:
    if not cells:
        return "-"
    if any(cell.error is None for cell in cells):
        return "failed"
    worst = max(cells, key=lambda cell: cell.error or 0.0)
    return "bitwise" if all(cell.bitwise for cell in cells) else _entry(worst)


def _bitwise(cells: Sequence[Cell]) -> str:
    """Whether all are, or what is not."""
    others = [f"{cell.contender.removeprefix('ours ')} on {cell.ranks} ranks: {_difference(cell)}" for cell in cells if not cell.bitwise]
    return "; ".join(others) or "yes"


def _difference(cell: Cell) -> str:
    if cell.error is None or cell.state_error is None:
        return "failed"
    if cell.error:
        return f"parameters {_number(cell.error)}"
    return f"moments {_number(cell.state_error)}" if cell.state_error else "step counters"


def markdown(record: dict[str, Any]) -> str:
    cells = [Cell(**cell) for cell in record["cells"]]
    contenders = list(dict.fromkeys(cell.contender for cell in cells))
    has_ours = any(contender.startswith("ours ") for contender in contenders)
    measure = "the largest over tensors of max |parameter - reference| / max |reference|"
    parts = [
        "# Error of a flattened model's parameters",
        f"After {record['steps']} steps, against the same optimizer in one process with the same gradients: {measure}.",
        summary(record["environment"]),
        f"`{record['environment']['command']}`, commit {record['environment']['commit']}",
    ]
    kinds = dict.fromkeys(map(_kind, cells))
    worst = [[kind, *(_worst([c for c in cells if _kind(c) == kind and c.contender == each]) for each in contenders)] for kind in kinds]
    parts += ["## The worst of all settings", report.table(["", *contenders], worst)]
    for wrapper in dict.fromkeys(cell.wrapper for cell in cells):
        here = [cell for cell in cells if cell.wrapper == wrapper]
        ranks = sorted({cell.ranks for cell in here})
        rows = []
        for setting in dict.fromkeys(cell.setting for cell in here):
            row = [cell for cell in here if cell.setting == setting]
            columns = ([cell for cell in row if cell.contender == contender] for contender in contenders)
            rows.append([setting, *(" / ".join(dict.fromkeys(map(_entry, column))) or "-" for column in columns)])
            if has_ours:
                rows[-1].append(_bitwise([cell for cell in row if cell.contender.startswith("ours ")]))
        title = f"## {wrapper}, {' / '.join(map(str, ranks))} ranks"
        parts += [title, report.table(["", *contenders, *(["parameters and state of ours bitwise"] if has_ours else [])], rows)]
    failures: dict[str, int] = {}
    for cell in cells:
        if cell.failure is not None:
            line = f"{cell.wrapper}, {cell.contender}: {' '.join(cell.failure.split())[:400]}"
            failures[line] = failures.get(line, 0) + 1
    if failures:
        parts += ["## Failures", "\n".join(f"- {line} ({count} cells)" for line, count in failures.items())]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flattened", description="Tabulates the error under DeepSpeed and FSDP1.")
    parser.add_argument("--contenders", nargs="+", metavar="PART", help="only those with one of these in their name")
    parser.add_argument("--settings", nargs="+", metavar="PART", help="only those with one of these in their name, such as 'stage 3'")
    parser.add_argument("--ranks", nargs="+", type=int, help="only these numbers of ranks")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few settings, 2 ranks")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; default: %(default)s")
    options = parser.parse_args(arguments)
    contenders = [each for each in CONTENDERS if _wanted(options.contenders, each.title)]
    settings = [each for each in SETTINGS if _wanted(options.settings, f"{each.wrapper} {each.name}") and (each.quick or not options.quick)]
    cells = run(settings, contenders, [2] if options.quick else options.ranks)
    if not cells:
        parser.error("nothing has these names")
    record = {
        "environment": describe(torch.device("cpu"), "benchmarks.flattened") | {"threads": 1},
        "steps": STEPS,
        "hyperparameters": HYPERPARAMETERS,
        "cells": [asdict(cell) for cell in cells],
    }
    text = markdown(record)
    report.write(options.output, "flattened", record, text)
    print(text)
    print(f"written to {options.output / 'flattened'}.json and .md", file=sys.stderr)


def _wanted(parts: Sequence[str] | None, name: str) -> bool:
    return not parts or any(part in name for part in parts)


if __name__ == "__main__":
    main()
