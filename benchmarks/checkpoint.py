"""Saving and loading of a model and its optimizer on two processes: `python -m benchmarks.checkpoint`.

A model under FSDP2 with AdamW in float32, after a step. Contenders take turns in rounds; each writes to a folder of its own, which is
removed after it was loaded. A sample takes as long as the slowest rank. All that is written counts when it is on the disk: torch.save's
files are synchronized after it. Loading reads what the page cache has. The floor is a raw write: each rank's bytes, from one buffer, to one
file, then fsync.

Memory is what a rank needs at most above what it had before, in a process in which a contender is alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.fsdp import fully_shard

import sharded_optim as so
from benchmarks import report
from benchmarks.environment import describe, summary
from benchmarks.fsdp2 import Model
from benchmarks.gloo_ranks import start
from benchmarks.resident import peak, resident_after_reset
from benchmarks.timing import quartiles, seconds_of

__all__ = ["CONTENDERS", "Contender", "main", "run"]

RESULTS = Path(__file__).parent / "results"
STEM = "checkpoint_cpu"
WORLD_SIZE = 2
ROUNDS, QUICK_ROUNDS = 7, 1
TIMEOUT = timedelta(seconds=300)  # of a collective
IMPORTED = ("benchmarks.fsdp2", "sharded_optim", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp")
SMALL: dict[str, int] = {"layers": 2, "width": 32, "vocabulary": 64, "positions": 64}
RAW = "raw write"
AT_ONCE = 4 * 2**20  # bytes of a raw write
Do = Callable[[Path], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Live:
    """What is saved and loaded."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def tensors(self) -> list[torch.Tensor]:
        """This rank's."""
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        states = [value for param in params for value in self.optimizer.state[param].values() if value.ndim]
        return [tensor.to_local() for tensor in (*params, *states)]

    @property
    def size(self) -> int:
        """Bytes of this rank's."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @cached_property
    def raw(self) -> bytes:
        """A copy of them."""
        return b"".join(tensor.detach().numpy().tobytes() for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to save.

    Attributes:
        save: returns when all is on the disk.
        load: in place.
        begin: saves in the background; returns what waits for the end.
    """

    name: str
    save: Callable[[Live, Path], None]
    load: Callable[[Live, Path], None] | None = None
    begin: Callable[[Live, Path], Callable[[], Any]] | None = None


# ---------------------------------------------------------------------------------------------------------------------- contenders


def _save_raw(live: Live, folder: Path) -> None:
    content = memoryview(live.raw)
    descriptor = os.open(folder / f"raw-{dist.get_rank()}", os.O_WRONLY | os.O_CREAT)
    for begin in range(0, live.size, AT_ONCE):
        os.write(descriptor, content[begin : min(begin + AT_ONCE, live.size)])
    os.fsync(descriptor)
    os.close(descriptor)


def _save_ours(live: Live, folder: Path) -> None:
    so.checkpoint.save(folder / "ours", 1, model=live.model, optimizer=live.optimizer)


def _begin_ours(live: Live, folder: Path) -> Callable[[], Any]:
    return so.checkpoint.async_save(folder / "ours", 1, model=live.model, optimizer=live.optimizer).wait


def _load_ours(live: Live, folder: Path) -> None:
    so.checkpoint.load(folder / "ours", model=live.model, optimizer=live.optimizer)


def _state(live: Live) -> dict[str, Any]:
    model, optimizer = get_state_dict(live.model, live.optimizer)
    return {"model": model, "optimizer": optimizer}


def _save_dcp(live: Live, folder: Path) -> None:
    dcp_save(_state(live), checkpoint_id=folder / "dcp")


def _begin_dcp(live: Live, folder: Path) -> Callable[[], Any]:
    future = dcp_async_save(_state(live), checkpoint_id=folder / "dcp", process_group=_background_group())
    return getattr(future, "result", None) or future.upload_completion.result  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _background_group() -> dist.ProcessGroup:
    """DCP would use the default group from a thread, in between our barriers."""
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _load_dcp(live: Live, folder: Path) -> None:
    state = _state(live)
    dcp_load(state, checkpoint_id=folder / "dcp")
    set_state_dict(live.model, live.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _save_torch(live: Live, folder: Path) -> None:
    path = folder / f"torch-{dist.get_rank()}.pt"
    with path.open("wb") as stream:
        torch.save(_state(live), stream)
        stream.flush()
        os.fsync(stream.fileno())


def _load_torch(live: Live, folder: Path) -> None:
    state = torch.load(folder / f"torch-{dist.get_rank()}.pt", weights_only=False)
    set_state_dict(live.model, live.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


CONTENDERS = (  # a new one is one more entry; the first is the floor
    Contender(name=RAW, save=_save_raw),
    Contender(name="ours", save=_save_ours, load=_load_ours, begin=_begin_ours),
    Contender(name="DCP", save=_save_dcp, load=_load_dcp, begin=_begin_dcp),
    Contender(name="torch.save, a file per rank", save=_save_torch, load=_load_torch),
)


# --------------------------------------------------------------------------------------------------------------------- measurement


def _build(sizes: dict[str, int]) -> Live:
    torch.manual_seed(0)
    model = Model(**sizes)
    fully_shard(model)
    optimizer = so.AdamW(model.parameters(), lr=1e-3)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    optimizer.zero_grad()
    return Live(model=model, optimizer=optimizer)


def _slowest(work: Callable[[], object]) -> float:
    """Seconds of the slowest rank, when all begin together."""
    dist.barrier()
    seconds = torch.tensor([seconds_of(work)], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def _in_folder(root: Path, do: Do) -> None:
    """Do something on all ranks in a folder that is gone afterwards."""
    folder = root / "sample"
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    do(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
        os.sync()  # nothing of this is left for the next one to wait for
    dist.barrier()


def _time(sizes: dict[str, int], root: Path, rounds: int) -> dict[str, Any]:
    live = _build(sizes)
    samples: dict[str, dict[str, list[float]]] = {each.name: {"save": [], "load": [], "blocked": [], "async": []} for each in CONTENDERS}

    def sample(contender: Contender, found: dict[str, list[float]], folder: Path) -> None:
        found["save"].append(_slowest(partial(contender.save, live, folder)))
        if contender.load is not None:
            found["load"].append(_slowest(partial(contender.load, live, folder)))

    def sample_in_background(contender: Contender, found: dict[str, list[float]], folder: Path) -> None:
        waits: list[Callable[[], Any]] = []
        assert contender.begin is not None
        begin = contender.begin
        blocked = _slowest(lambda: waits.append(begin(live, folder)))
        found["blocked"].append(blocked)
        found["async"].append(blocked + _slowest(waits[0]))

    for number in range(-1, rounds):  # the first warms up, and makes the buffers that are kept
        for contender in CONTENDERS[number % 2 :] + CONTENDERS[: number % 2]:
            found = samples[contender.name] if number >= 0 else {"save": [], "load": [], "blocked": [], "async": []}
            _in_folder(root, partial(sample, contender, found))
            if contender.begin is not None:
                _in_folder(root, partial(sample_in_background, contender, found))
    size = torch.tensor([live.size])
    dist.all_reduce(size)
    return {"samples": samples, "bytes": size.item()}


def _remember(sizes: dict[str, int], root: Path, name: str) -> dict[str, Any]:
    """The most memory that a rank needs beyond what it has, for each of what a contender does."""
    contender = next(each for each in CONTENDERS if each.name == name)
    small = _build(SMALL)
    found: dict[str, int] = {}

    def measure(live: Live, folder: Path) -> None:
        actions: dict[str, Callable[[], Any]] = {"save": partial(contender.save, live, folder)}
        if contender.load is not None:
            actions["load"] = partial(contender.load, live, folder)
        for action, work in actions.items():
            before = resident_after_reset()
            work()
            most = torch.tensor([peak() - before])
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            found[action] = int(most)

    _in_folder(root, partial(measure, small))  # imports, and what is made once
    _in_folder(root, partial(measure, _build(sizes)))
    return found


def run(sizes: dict[str, int], root: Path, rounds: int) -> dict[str, Any]:
    """Measure all contenders.

    Args:
        sizes: of the model.
        root: folder to write to.
        rounds: how many samples each gives.
    """
    ranks = partial(start, world_size=WORLD_SIZE, imported=IMPORTED, environment={"OMP_NUM_THREADS": "1"}, timeout=TIMEOUT)
    timed = ranks(partial(_time, sizes, root, rounds))
    size = timed["bytes"]
    results = []
    for contender in CONTENDERS:
        memory = {} if contender.name == RAW else ranks(partial(_remember, sizes, root, contender.name))
        samples, floor = timed["samples"][contender.name], timed["samples"][RAW]["save"]
        row: dict[str, Any] = {"contender": contender.name, "extra_mebibytes": {key: value / 2**20 for key, value in memory.items()}}
        for action, seconds in samples.items():
            if seconds:
                low, median, high = quartiles(seconds)
                row[action] = {"seconds": median, "quartiles": (low, high), "megabytes_per_second": size / median / 1e6}
        pairs = zip(floor, samples["save"], strict=True)
        row["of_raw"] = quartiles([raw / own for raw, own in pairs])[1]
        if samples["blocked"]:
            row["blocked_of_save"] = quartiles([own / save for own, save in zip(samples["blocked"], samples["save"], strict=True)])[1]
        results.append(row)
    return {"bytes": size, "rounds": rounds, "results": results}


# -------------------------------------------------------------------------------------------------------------------------- report


def markdown(record: dict[str, Any]) -> str:
    environment = record["environment"]
    header = ["", "save, s", "MB/s", "of raw", "load, s", "MB/s", "async blocks, s", "of its save", "save: extra MiB", "load: extra MiB"]
    rows = []
    for row in record["results"]:
        rows.append(
            [
                row["contender"],
                _number(row, "save", "seconds", ".2f"),
                _number(row, "save", "megabytes_per_second", ".0f"),
                f"{row['of_raw']:.2f}",
                _number(row, "load", "seconds", ".2f"),
                _number(row, "load", "megabytes_per_second", ".0f"),
                _number(row, "blocked", "seconds", ".3f"),
                f"{row['blocked_of_save']:.0%}" if "blocked_of_save" in row else "-",
                _number(row, "extra_mebibytes", "save", ".0f"),
                _number(row, "extra_mebibytes", "load", ".0f"),
            ]
        )
    parts = [
        f"# Saving and loading {record['bytes'] / 1e6:.0f} MB on {WORLD_SIZE} gloo ranks",
        f"Medians of {record['rounds']} rounds; ratios are medians of the rounds' ratios. {summary(environment)}",
        f"`{environment['command']}`, commit {environment['commit']}",
        report.table(header, rows),
        "DCP: `torch.distributed.checkpoint` with `get_state_dict` and `set_state_dict`. Only ours compares all bytes when it loads.",
    ]
    return "\n\n".join(parts) + "\n"


def _number(row: dict[str, Any], section: str, key: str, form: str) -> str:
    value = row.get(section, {}).get(key)
    return "-" if value is None else format(value, form)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description="Saving and loading beside DCP and torch.save.")
    parser.add_argument("--quick", action="store_true", help="a small model, once: a smoke run, whose figures mean nothing")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", type=Path, help="where to write checkpoints; default: a temporary folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write the report")
    options = parser.parse_args(arguments)
    environment = describe(torch.device("cpu"), "benchmarks.checkpoint")
    sizes: dict[str, int] = SMALL if options.quick else {}
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        record = run(sizes, Path(root), QUICK_ROUNDS if options.quick else options.rounds)
    record = {"environment": environment, **record}
    text = markdown(record)
    if not options.quick:
        report.write(options.results, STEM, record, text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
