"""Verify an optimizer on a user's own model: compare sharded training on CPU ranks with one process that gets the same gradients.

making.py       the user's model, batches and optimizer
shardings.py    ways to shard, and readers of whole gradients and parameters
rank.py         one rank: train, save, load in a new model, go on; preloaded.py: the modules that ranks import
local_copy.py   a test whether an optimizer treats local parts as whole tensors
reference.py    the same optimizer in one process
reasons.py      the most likely cause of differences
report.py       the result, as data and text
page.py         reports as an HTML page

Ranks are separate processes that communicate by gloo. All get the same batch, and losses that jump by up to 10,000 times. The whole
gradients and parameters of each step are written to files, which this process reads and deletes while the ranks go on.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from sharded_optim.step.engine import Engine
from sharded_optim.tools.verify.making import MakeOptimizer, check_picklable, seeded
from sharded_optim.tools.verify.rank import SEED, Job, describe, failure_file, log_file, main, record_file
from sharded_optim.tools.verify.reasons import Evidence, reasons_of
from sharded_optim.tools.verify.reference import Probes, Reference
from sharded_optim.tools.verify.report import Difference, Reason, Report
from sharded_optim.tools.verify.shardings import SHARDINGS, Shard

__all__ = ["SHARDINGS", "TOLERANCE", "Difference", "Reason", "Report", "verify"]

TOLERANCE = 1e-6  # relative: some optimizers round differently at the beginning of shards, because of vector instructions
WITHOUT_GPUS = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
GRACE = 3.0  # seconds for other ranks to report or end, when a rank has failed or all are done


def verify(
    build_model: Callable[[], nn.Module],
    build_batch: Callable[[int], Any],
    optimizer: Callable[..., Any],
    *,
    sharding: str | Shard = "fsdp2",
    world_size: int = 2,
    steps: int = 8,
    max_grad_norm: float | None = None,
    timeout: float = 180.0,
    progress: Callable[[str], object] = lambda line: None,
) -> Report:
    """Compare an optimizer on a sharded model with the same optimizer in one process, given the same gradients.

    Starts `world_size` processes on this machine's CPU, which build the model, shard it, train, save, build everything anew with other
    weights, load, and continue. All get the same batch, and losses that jump from step to step. The parameters after each step are
    compared, bit for bit.

    Args:
        build_model: returns the model, on the CPU. Arguments are sent to other processes, so functions must be defined in a module; in a
            script, call `verify` below `if __name__ == "__main__"`.
        build_batch: step -> the model's input: keyword arguments as a mapping, positional ones as a list or tuple, or a single argument.
            The loss is the output's `loss`, or the first tensor of one number in the output, or the mean square of its first tensor.
        optimizer: a class, as so.StableAdamW or torch.optim.AdamW, or a functools.partial of one, which is called with the trainable
            parameters; or a function of the model, as `lambda model: so.Muon(so.muon_param_groups(model))`, defined in a module.
        sharding: one of `SHARDINGS`: ddp, fsdp2, fsdp1, zero1 and zero2 (so.ShardedOptimizer), deepspeed1 to deepspeed3; or your own
            function (model, make_optimizer) -> (model to call, optimizer), which runs on every rank.
        world_size: a power of two, so that the average of equal gradients is exact.
        steps: at least 2; model and optimizer are saved and loaded in the middle.
        max_grad_norm: if given, torch.nn.utils.clip_grad_norm_ is checked too: whether it returns the norm of all gradients.
        timeout: seconds that ranks may take for a step.
        progress: is called with a line of text when a part is done.

    Returns:
        A report of the tensors that differ, by how much and for what likely reason; see its `is_ok` and `text()`.

    Raises:
        ValueError: an argument is out of range, or cannot be sent to another process.
        RuntimeError: a process group is initialized in this process.
    """
    make = MakeOptimizer(optimizer)
    if isinstance(sharding, str) and sharding not in SHARDINGS:
        raise ValueError(f"sharding is one of {', '.join(SHARDINGS)} or a function, got {sharding!r}")
    if world_size < 1 or world_size & (world_size - 1):
        raise ValueError(f"world_size is a power of two, so that the average of equal gradients is exact, got {world_size}")
    if steps < 2:
        raise ValueError(f"steps is at least 2, as a checkpoint is loaded in the middle, got {steps}")
    if dist.is_available() and dist.is_initialized():
        raise RuntimeError("so.verify starts processes of its own; call it where no process group is initialized, not under torchrun")
    check_picklable(build_model=build_model, build_batch=build_batch, optimizer=optimizer, sharding=sharding)
    job = Job(
        build_model=build_model,
        build_batch=build_batch,
        make=make,
        sharding=sharding,
        world_size=world_size,
        steps=steps,
        max_grad_norm=max_grad_norm,
        timeout=timeout,
    )
    begin = time.monotonic()
    evidence = Evidence()
    with _one_thread(), tempfile.TemporaryDirectory(prefix="sharded_optim_verify_") as folder:
        try:
            _compare(job, Path(folder), evidence, progress)
        except _EndedError as failed:
            evidence.failure = str(failed)
    errors = [error for of_steps in evidence.errors.values() for error in of_steps]
    reasons = tuple(reasons_of(evidence, TOLERANCE))  # adds notes
    return Report(
        sharding=sharding if isinstance(sharding, str) else getattr(sharding, "__name__", type(sharding).__name__),
        world_size=world_size,
        optimizer=make.name,
        steps=evidence.compared,
        tensors=len(evidence.shapes),
        differences=tuple(sorted(evidence.differences(TOLERANCE), key=lambda each: -each.error)),
        reasons=reasons,
        rounding=max(errors, default=0.0),
        failure=evidence.failure,
        notes=tuple(evidence.notes),
        seconds=time.monotonic() - begin,
    )


class _EndedError(Exception):
    """Ranks, or the reference, have failed or have stopped."""


def _compare(job: Job, folder: Path, evidence: Evidence, progress: Callable[[str], object]) -> None:
    """Start ranks, and step the reference along with them.

    Args:
        evidence: collects observations; changed in place.
    """
    reference: Reference | None = None
    probes: Probes | None = None
    for record in _records(job, folder):
        kind = record["kind"]
        if kind == "begin":
            progress("model sharded")
            evidence.begin(record["params"], record["storage"], record["unknown"], record["apart"])
            with _in_one_process():
                reference = Reference(seeded(job.build_model, SEED), record["params"], job.make)
            if isinstance(reference.optimizer, torch.optim.Optimizer) and not isinstance(reference.optimizer, Engine):
                probes = _tried(evidence, Probes, reference, job.make)
        elif kind == "step":
            assert reference is not None
            with _in_one_process():
                reference.step(record["grads"], record["step"])
            evidence.step(record["params"], reference.errors(record["params"]), record["grads"], reference.moved)
            if probes is not None:
                probes = _tried(evidence, probes.step, record["grads"], record["step"])
            if not all(param.isfinite().all() for param in reference.params.values()):
                raise _EndedError("parameters are not finite, in one process either; lower the learning rate")
            progress(f"step {record['step'] + 1} of {job.steps}")
        elif kind == "copies":
            evidence.copies_equal = record["equal"]
        elif kind == "loaded":
            assert reference is not None
            evidence.loaded(record["lost"], record["params"])
            progress("saved and loaded")
        elif kind == "clipped":
            evidence.clipped = record
        if probes is not None:
            evidence.is_elementwise = probes.of_cutting <= TOLERANCE
            if probes.of_grouping <= TOLERANCE:
                evidence.groups, evidence.without_first_gradient = probes.of_counting, probes.without_first_gradient
    if probes is not None and probes.of_grouping > TOLERANCE:
        evidence.notes.append(f"the result depends on how parameters are grouped, by {probes.of_grouping:.1e}: a statistic of all of them")


def _tried(evidence: Evidence, probe: Callable[..., Probes], *arguments: Any) -> Probes | None:
    try:
        return probe(*arguments)
    except Exception as error:  # whatever an optimizer refuses about other groups, or a missing gradient
        evidence.notes.append(f"other param groups were not tried: {describe(error)}")
        evidence.groups, evidence.is_elementwise = {}, None
        return None


@contextmanager
def _in_one_process() -> Iterator[None]:
    """Convert an error in the `with` block to an _EndedError, which says that it occurred in one process, without sharding."""
    try:
        yield
    except Exception as error:
        raise _EndedError(f"in one process, without sharding: {describe(error)}") from error


def _records(job: Job, folder: Path) -> Iterator[dict[str, Any]]:
    """Start ranks, and yield the records that rank 0 writes.

    Raises:
        _EndedError: ranks have failed, or have made no progress within the timeout. The message names them and their errors.
    """
    context = _context(job)
    processes = [
        context.Process(target=main, args=(rank, job, folder, _environment(job.world_size), list(sys.path)), daemon=True)
        for rank in range(job.world_size)
    ]
    with _without_gpus():
        for process in processes:
            process.start()
    try:
        number, deadline = 0, time.monotonic() + job.timeout
        while True:
            path = record_file(folder, number)
            if path.exists():
                record = torch.load(path, weights_only=True)
                path.unlink()
                yield record
                if record["kind"] == "end":
                    break
                number, deadline = number + 1, time.monotonic() + job.timeout
            elif any(process.exitcode for process in processes):
                time.sleep(GRACE)  # the first to fail may not be the first whose process has ended
                raise _EndedError(_failure(folder, processes))
            elif time.monotonic() > deadline:
                printed = "; ".join(f"rank {rank}: {_last_line(log_file(folder, rank))}" for rank in range(job.world_size))
                raise _EndedError(f"ranks have not gone on for {job.timeout:g} s; they printed last: {printed}")
            else:
                time.sleep(0.005)
        for process in processes:
            process.join(GRACE)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _failure(folder: Path, processes: list[Any]) -> str:
    """Return the distinct errors of ranks; for a rank that was killed, its exit status and the last line that it printed."""
    texts: dict[str, list[int]] = {}
    for rank, process in enumerate(processes):
        path = failure_file(folder, rank)
        if path.exists():
            texts.setdefault(path.read_text(encoding="utf-8"), []).append(rank)
        elif process.exitcode:
            texts.setdefault(f"exit status {process.exitcode}; {_last_line(log_file(folder, rank))}", []).append(rank)
    return "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in texts.items())


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "see what it has printed; functions must be defined in a module that a new process can import"


def _environment(world_size: int) -> dict[str, str]:
    """Return environment variables for the ranks. DeepSpeed reads most of them, and finds ninja by PATH."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        **WITHOUT_GPUS,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def _context(job: Job) -> Any:
    """Return a context that forks ranks from a server in which the modules that they need are imported: this takes longer than training.

    Python has one such server in a process, and the first call decides what it imports. It imports no modules of the user, as they may
    change.
    """
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([f"{__name__}.preloaded", *getattr(job.build_model, "needed_modules", ())])
    return context


@contextmanager
def _without_gpus() -> Iterator[None]:
    """Hide GPUs from processes that are started in the `with` block, and from the server that forks them.

    No other variable is touched, as other threads may read `environ`.
    """
    before = {name: os.environ.get(name) for name in WITHOUT_GPUS}
    os.environ |= WITHOUT_GPUS
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread for the reference, as on ranks: the rounding of matrix products depends on it. The random state is restored."""
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(generator)
