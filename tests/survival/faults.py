"""What can go wrong on one rank: each fault happens in the middle of a job, without the job knowing of it."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import launch.train
from sharded_optim.checkpoint import local_store

__all__ = ["FAULTS", "STEP", "Fault"]

STEP = 6  # the step in which it happens
HEARTBEAT = 20.0  # seconds, the job's default
AT_ONCE = 5.0
FOREVER = 3600.0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong on one rank.

    Attributes:
        name: as the table has it.
        happen: makes it happen, when the rank begins the step.
        install: or prepares it to happen by itself, given what tells when: when the job has been built.
        seconds: from then to the end of the job, at most.
        says: a regular expression that the log of rank 0 must have; `{rank}` is the rank's number.
        arguments: overrides of the job's config.
        on_each_rank: whether it happens to rank 0 too, in runs of their own.
    """

    name: str
    seconds: float
    says: str
    happen: Callable[[], None] | None = None
    install: Callable[[Any, Callable[[], None]], None] | None = None
    arguments: Sequence[str] = ()
    on_each_rank: bool = False


def _raise() -> None:
    raise ValueError("a fault of this test")


def _raise_beside_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(FOREVER,), name="left-behind").start()
    _raise()


def _leave_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(FOREVER,), name="left-behind").start()


def _signal(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


# Continues a stopped process when the rank that has started this one has ended.
LET_GO_ON = """
import os, signal, sys, time
rank, stopped = map(int, sys.argv[1:])
while os.getppid() == rank:
    time.sleep(0.1)
os.kill(stopped, signal.SIGCONT)
"""


def _stop_store() -> None:
    server = _server_of_store()
    command = [sys.executable, "-c", LET_GO_ON, str(os.getpid()), str(server)]
    # In a session of its own, as launchers end all processes of the rank's.
    subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    os.kill(server, signal.SIGSTOP)


def _server_of_store() -> int:
    """The process that serves the store: of rank 0's children, or torchrun."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"launch.store_server" in words and f"PPid:\t{os.getppid()}\n" in Path(f"/proc/{int(words[-2])}/status").read_text():
                return int(path.name)
        except OSError:  # it has ended
            continue
    return os.getppid()


def _fail_to_save(sharded: Any, happened: Callable[[], None]) -> None:
    """The disk is full for this rank alone."""

    class Full:
        def __getattr__(self, name: str) -> Any:
            return self._write if name == "write" else getattr(os, name)

        def _write(self, *_: Any) -> int:
            happened()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mock.patch.object(local_store, "os", Full()).start()


def _spoil_gradients(sharded: Any, happened: Callable[[], None]) -> None:
    """From a step on, one element of one gradient is NaN."""
    steps = 0

    def spoil(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps >= STEP:
            happened()
            _local(_weight(optimizer).grad).view(-1)[0] = float("nan")

    sharded.optimizer.register_step_pre_hook(spoil)


def _spoil_loss(sharded: Any, happened: Callable[[], None]) -> None:
    """From a step on, the loss of this rank's rows is NaN, and so is the gradient of all ranks."""
    steps = 0

    def spoil(model: Any, arguments: Any, output: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if steps < STEP:
            return output
        happened()
        return output * float("nan")

    sharded.model.register_forward_hook(spoil)


def _flip(what: Callable[[torch.optim.Optimizer], None]) -> Callable[[Any, Callable[[], None]], None]:
    """After a step, one bit of something that all ranks have is another one."""

    def install(sharded: Any, happened: Callable[[], None]) -> None:
        steps = 0

        def flip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == STEP:
                happened()
                what(optimizer)

        sharded.optimizer.register_step_post_hook(flip)

    return install


def _flip_weight(optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        _lowest_bit(_local(_weight(optimizer)))


def _flip_step(optimizer: torch.optim.Optimizer) -> None:
    _lowest_bit(optimizer.state[_weight(optimizer)]["step"])


def _flip_lr(optimizer: torch.optim.Optimizer) -> None:
    group = optimizer.param_groups[1]
    lr = torch.tensor(group["lr"], dtype=torch.float64)
    lr.view(torch.int64).bitwise_xor_(1)
    group["lr"] = lr.item()
    # The schedule computes the next learning rate from this one, so that the bit stays.


def _lowest_bit(values: Tensor) -> None:
    bits = values.detach().view(-1)[:1].view(torch.int32)
    bits ^= 1


def _weight(optimizer: torch.optim.Optimizer) -> Tensor:
    return optimizer.param_groups[0]["params"][0]


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


NAMED = r"error: rank {rank} \(pid \d+ on .+\)"
NO_HEARTBEAT = NAMED + r" has sent no heartbeat for \d+ s.* Last heartbeat at (its start|step \d+), in "
LOST = r"error: rank \d \(pid \d+ on .+\) .*the store that carries heartbeats"
REPLICAS = ("divergence_every=1",)
WEIGHT = r"embedding\.weight"
FAULTS = (
    Fault(
        name="an exception",
        happen=_raise,
        seconds=AT_ONCE,
        says=NAMED + r" failed first, at step 6\b.*ValueError: a fault",
        on_each_rank=True,
    ),
    Fault(
        name="an exception, and a thread left alive",
        happen=_raise_beside_a_thread,
        seconds=AT_ONCE,
        says=NAMED + " failed first.*ValueError",
    ),
    Fault(
        name="SIGKILL",
        happen=_signal(signal.SIGKILL),
        seconds=AT_ONCE,
        # MPICH's mpirun ends all ranks within 0.1 s. On a busy machine rank 0 may not have written by then, and mpirun says what died.
        says=r"error: rank {rank} \(pid \d+ on .+\) ended first|BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES.*EXIT CODE: 9",
        on_each_rank=True,
    ),
    Fault(
        name="exit(0)", happen=lambda: sys.exit(0), seconds=AT_ONCE, says=NAMED + r" failed first, at step 6\b.*left early, by exit\(0\)"
    ),
    Fault(name="os._exit(0)", happen=lambda: os._exit(0), seconds=AT_ONCE, says=NAMED + " ended first"),
    Fault(
        name="SIGSTOP",
        happen=_signal(signal.SIGSTOP),
        seconds=HEARTBEAT + AT_ONCE,
        says=NO_HEARTBEAT,
        on_each_rank=True,
    ),
    Fault(
        name="a call that holds Python's lock",
        happen=lambda: ctypes.PyDLL(None).sleep(int(FOREVER)),
        seconds=HEARTBEAT + AT_ONCE,
        says=NO_HEARTBEAT,
        on_each_rank=True,
    ),
    Fault(
        name="a store that is stopped",
        happen=_stop_store,
        seconds=HEARTBEAT + AT_ONCE,
        says=LOST + r", which has not answered for \d+ s",
    ),
    Fault(
        name="a store that is gone",
        happen=lambda: os.kill(_server_of_store(), signal.SIGKILL),
        seconds=AT_ONCE,
        says=f"{LOST}|its launcher \\(pid \\d+\\) has ended",  # torchrun serves it itself
    ),
    Fault(
        name="a late rank",
        happen=lambda: time.sleep(FOREVER),
        seconds=HEARTBEAT + AT_ONCE,
        says=NAMED + r" has made no progress for \d+ s while others wait for it, at step 6, in .*faults\.py",
        on_each_rank=True,
    ),
    Fault(
        name="an exception inside save",
        install=_fail_to_save,
        seconds=AT_ONCE,
        says="rank {rank}: .*No space left",
        arguments=("checkpoint.every=6",),
    ),
    Fault(
        name="NaN in one element of a gradient, from then on",
        install=_spoil_gradients,
        seconds=AT_ONCE,
        says=f"FloatingPointError: .*{WEIGHT}.* gradients held by rank {{rank}} were not finite",
        arguments=("max_skipped_steps=3", "sharding=fsdp2"),
    ),
    Fault(
        name="the same under AdamW, which has nothing else to agree on",
        install=_spoil_gradients,
        seconds=AT_ONCE,
        says=f"FloatingPointError: .*{WEIGHT}.* gradients held by rank {{rank}} were not finite",
        arguments=("max_skipped_steps=3", "sharding=fsdp2", "optimizer.name=AdamW"),
    ),
    Fault(
        name="NaN in the loss, from then on",
        install=_spoil_loss,
        seconds=AT_ONCE,
        says="ranks failed with the same error, at step 8: FloatingPointError: .*loss of its own rows is not finite on rank {rank}$",
        arguments=("max_skipped_steps=3",),
    ),
    Fault(
        name="a flipped bit of a weight",
        install=_flip(_flip_weight),
        seconds=AT_ONCE,
        says=f"DivergenceError: .*{WEIGHT}",
        arguments=REPLICAS,
    ),
    Fault(
        name="a flipped bit of a step counter",
        install=_flip(_flip_step),
        seconds=AT_ONCE,
        says=f"(DivergenceError|ValueError): .*{WEIGHT}",
        arguments=REPLICAS,
    ),
    Fault(
        name="a flipped bit of lr",
        install=_flip(_flip_lr),
        seconds=AT_ONCE,
        says=r"(DivergenceError|ValueError): .*\blr\b",
        arguments=REPLICAS,
    ),
    Fault(
        name="a thread left alive at the end",
        happen=_leave_a_thread,
        seconds=AT_ONCE,
        says=NAMED + " failed first, at step 12: .*threads that it has started are still there: left-behind",
    ),
)


def install(fault: Fault, time_file: Path) -> None:
    """Prepare a fault in this process, which is to run the job."""

    def happened() -> None:
        if not time_file.exists():
            time_file.write_text(repr(time.time()))

    if fault.happen is not None:
        happen, training_batch = fault.happen, launch.train.training_batch

        def training_batch_with_fault(text: Any, config: Any, info: Any, step: int) -> Tensor:
            if step == STEP and not time_file.exists():  # once: the job may be started again
                happened()
                happen()
            return training_batch(text, config, info, step)

        mock.patch.object(launch.train, "training_batch", training_batch_with_fault).start()
    if fault.install is not None:
        prepare, shard = fault.install, launch.train.shard

        def shard_with_fault(*arguments: Any) -> Any:
            sharded = shard(*arguments)
            prepare(sharded, happened)
            return sharded

        mock.patch.object(launch.train, "shard", shard_with_fault).start()
