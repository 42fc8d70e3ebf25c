"""Run one rank: train, save, build everything anew, load, continue; rank 0 writes whole gradients and parameters of each step to files.

These records are numbered files in a folder. The process that compares them deletes each file after reading it.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_optim.sharding.ranks import gather_objects
from sharded_optim.tools.verify.local_copy import LocalCopy
from sharded_optim.tools.verify.making import MakeOptimizer, loss_of, named, seed_all, seeded
from sharded_optim.tools.verify.shardings import SHARDINGS, GradientCapture, Shard, Sharded, read
from sharded_optim.trackers.atomic_write import atomic_write, write_text

__all__ = ["SEED", "Job", "describe", "failure_file", "log_file", "main", "record_file"]

T = TypeVar("T")

SEED = 0
FACTORS = (1.0, 30.0, 1.0, 300.0, 0.1, 1.0, 100.0, 0.01)  # factors of the losses of consecutive steps: spikes, as of bad batches
MOST_UNREAD = 2  # unread records; each is as large as the model and its gradients


@dataclass(frozen=True, kw_only=True)
class Job:
    """The task of all ranks."""

    build_model: Callable[[], nn.Module]
    build_batch: Callable[[int], Any]
    make: MakeOptimizer
    sharding: str | Shard
    world_size: int
    steps: int
    max_grad_norm: float | None
    timeout: float  # seconds

    @property
    def shard(self) -> Shard:
        return SHARDINGS[self.sharding] if isinstance(self.sharding, str) else self.sharding


def record_file(folder: Path, number: int) -> Path:
    return folder / f"record{number}"


def failure_file(folder: Path, rank: int) -> Path:
    return folder / f"failure{rank}"


def log_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def main(rank: int, job: Job, folder: Path, environment: dict[str, str], path: Sequence[str]) -> None:
    """Run a rank. This is the target of the rank's process."""
    with log_file(folder, rank).open("wb") as log:  # output of libraries matters only if a rank dies
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.path[:] = path
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=job.world_size, timeout=timedelta(seconds=job.timeout)
    )
    try:
        _Run(job, folder, rank).run()
    except BaseException as error:
        traceback.print_exc()
        write_text(failure_file(folder, rank), describe(error))
        sys.exit(1)
    gc.collect()  # wrapped models are cycles that hold process groups, which must not outlive the interpreter
    dist.destroy_process_group()


def describe(error: BaseException) -> str:
    """Return an error's type, first and last line, and the innermost line of code outside torch."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if f"{os.sep}torch{os.sep}" not in frame.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}{where}"


class _Run:
    """The work of one rank."""

    def __init__(self, job: Job, folder: Path, rank: int) -> None:
        self.job, self.folder, self.rank = job, folder, rank
        self.records = 0
        self._initial: dict[str, str] = {}  # digests of this rank's parameters, before they are sharded

    def run(self) -> None:
        job = self.job
        half = job.steps // 2
        sharded = self._sharded(SEED)
        params = sharded.params()
        apart = self._apart(params)
        self._write("begin", params=params, storage=sharded.storage(), unknown=sharded.unknown_to_model(), apart=apart)
        copy = LocalCopy(sharded.base, job.make)
        for step in range(half):
            self._step(sharded, step)
        copies = _gathered(copy.is_equal)
        self._write("copies", equal=None if None in copies else all(copies))
        before = _state_digests(sharded.base)
        sharded.save(str(self.folder / "checkpoint"))
        sharded.close()
        del sharded, copy
        gc.collect()
        sharded = self._sharded(SEED + 1)  # other weights, which the checkpoint must replace
        sharded.load(str(self.folder / "checkpoint"))
        after = _state_digests(sharded.base)
        lost = _gathered({key for key, digests in before.items() if after.get(key) != digests})
        self._write("loaded", lost=sorted(set().union(*lost)), params=sharded.params())
        for step in range(half, job.steps):
            self._step(sharded, step)
        if job.max_grad_norm is not None:
            self._clip(sharded, job.max_grad_norm)
        sharded.close()
        self._write("end")

    def _sharded(self, seed: int) -> Sharded:
        """Build the model, shard it, and make the optimizer."""
        model = seeded(self.job.build_model, seed)
        self._initial = {name: _digest(param) for name, param in named(model).items()}
        capture = GradientCapture(model)
        return read(*self.job.shard(model, self.job.make), capture)

    def _apart(self, params: Mapping[str, Tensor]) -> list[str]:
        """Return the parameters that ranks have initialized differently, and that sharding has not replaced by rank 0's."""
        of_ranks = _gathered((self._initial, {name: _digest(param) for name, param in params.items()}))
        first, _ = of_ranks[0]
        return [
            name
            for name in params
            if len({initial.get(name) for initial, _ in of_ranks}) > 1 and any(whole[name] != first.get(name) for _, whole in of_ranks)
        ]

    def _backward(self, sharded: Sharded, step: int) -> None:
        seed_all(step)  # dropout
        sharded.backward(loss_of(sharded.model, self.job.build_batch(step)) * FACTORS[step % len(FACTORS)])

    def _step(self, sharded: Sharded, step: int) -> None:
        sharded.capture.grads.clear()
        self._backward(sharded, step)
        grads = sharded.gradients()
        seed_all(step)
        sharded.step()
        params = sharded.params()
        if sharded.zeroes_missing_gradients:
            grads = {name: grads.get(name, torch.zeros_like(param)) for name, param in params.items()}
        self._write("step", step=step, grads=grads, params=params)

    def _clip(self, sharded: Sharded, max_norm: float) -> None:
        """Run backward and clip gradients as a training script does, without a step, and record the norms."""
        sharded.capture.grads.clear()
        self._backward(sharded, self.job.steps)
        grads = sharded.gradients()
        expected = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad.double()) for grad in grads.values()])).item()
        refusal, norm = None, None
        try:
            found: Any = torch.nn.utils.clip_grad_norm_(sharded.model.parameters(), max_norm)
            norm = float(found.full_tensor() if hasattr(found, "full_tensor") else found)
        except Exception as error:  # any error of a wrapper is fine: it is not silent
            refusal = f"{type(error).__name__}: {error}"
        self._write("clipped", norm=norm, expected=expected, refusal=refusal)

    def _write(self, kind: str, **content: Any) -> None:
        """Write the next record on rank 0, once fewer than MOST_UNREAD records are unread."""
        if self.rank == 0:
            deadline = time.monotonic() + self.job.timeout
            while record_file(self.folder, self.records - MOST_UNREAD).exists():
                parent = multiprocessing.parent_process()
                if time.monotonic() > deadline or (parent is not None and not parent.is_alive()):
                    raise TimeoutError("nobody reads the records of this rank")
                time.sleep(0.005)
            with atomic_write(record_file(self.folder, self.records)) as draft:
                torch.save({"kind": kind, **content}, draft)
        self.records += 1


def _gathered(value: T) -> list[T]:
    return gather_objects(value, dist.group.WORLD)


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def _state_digests(optimizer: Any) -> dict[str, list[str]]:
    """Return digests of a rank's optimizer state by its name, such as `exp_avg`, in the order of the parameters."""
    found: dict[str, list[str]] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            for key, value in optimizer.state.get(param, {}).items():
                local = value.to_local() if hasattr(value, "to_local") else value
                found.setdefault(key, []).append(_digest(local) if isinstance(local, Tensor) else repr(local))
    return found
