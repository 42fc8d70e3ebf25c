"""Bandwidth and latency of an all-reduce: between the ranks that are there, or between two processes that are started for it.

Bandwidth is algorithmic: bytes of the buffer over the seconds that the slowest rank takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from sharded_optim.tools.doctor.findings import Finding, RankReport, one_line

__all__ = ["RESULT", "Rates", "examine_pair", "examine_ranks", "measure"]

BUFFER = 32 * 2**20  # bytes, about a bucket of gradients
LONGEST = 2.0  # seconds that the repetitions take together
REPETITIONS = 5
SMALL_REPETITIONS = 100
RESULT = "rates.json"
NO_GLOO = (
    "set GLOO_SOCKET_IFNAME to a network interface that the ranks reach each other by (ip link lists them), and let their ports through"
)
NO_NCCL = "run again with NCCL_DEBUG=INFO, and set NCCL_SOCKET_IFNAME to a network interface that the ranks reach each other by"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of an all-reduce.

    Attributes:
        bytes_per_second: of a buffer of `buffer` bytes.
        latency: seconds that one of 8 bytes takes.
    """

    bytes_per_second: float
    latency: float
    buffer: int
    ranks: int


def measure(process_group: dist.ProcessGroup | None, device: torch.device) -> Rates:
    """A collective."""
    large, small = torch.zeros(BUFFER // 4, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    _seconds(small, process_group, 10)
    (first,) = _seconds(large, process_group, 1)
    repetitions = max(1, min(REPETITIONS, int(LONGEST / first)))  # the same on all ranks, as all have agreed on the time
    rate = BUFFER / min(_seconds(large, process_group, repetitions))
    latency = median(_seconds(small, process_group, SMALL_REPETITIONS))
    return Rates(bytes_per_second=rate, latency=latency, buffer=BUFFER, ranks=dist.get_world_size(process_group))


def _seconds(tensor: torch.Tensor, process_group: dist.ProcessGroup | None, repetitions: int) -> list[float]:
    """Of each repetition on the slowest rank; all begin together."""
    times = torch.zeros(repetitions, dtype=torch.float64)
    for index in range(repetitions):
        if index == 0 or tensor.numel() > 1:
            dist.barrier(process_group)
        begin = time.perf_counter()
        dist.all_reduce(tensor, group=process_group)
        if tensor.device.type == "cuda":
            torch.cuda.synchronize(tensor.device)
        times[index] = time.perf_counter() - begin
    agreed = times.to(tensor.device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX, group=process_group)
    return agreed.tolist()


def _finding(name: str, rates: Rates, between: str) -> Finding:
    value = f"{rates.bytes_per_second / 1e9:,.2f} GB/s, {rates.latency * 1e6:,.0f} us for 8 bytes, {between}"
    return Finding(section="bandwidth", name=name, status="ok", value=value, data=asdict(rates))


# --------------------------------------------------------------------------------------------------------------------------- ranks


def examine_ranks(everyone: Sequence[RankReport], device: torch.device, timeout: float) -> list[Finding]:
    """Over gloo, and over NCCL where each rank has a GPU of its own. A collective of the default process group, which is gloo's."""
    between = f"{len(everyone)} ranks"
    findings = [_finding("all-reduce gloo", measure(None, torch.device("cpu")), between)]
    gpus = [each.gpu for each in everyone if each.gpu is not None]
    if not gpus or not dist.is_nccl_available():
        return findings
    if len(set(gpus)) < len(everyone):
        way_out = "start at most as many ranks on a machine as it has GPUs: NCCL lets no two of them share one"
        value = f"not measured: ranks: {len(everyone)}, their GPUs: {len(set(gpus))}"
        return [*findings, Finding(section="bandwidth", name="all-reduce NCCL", status="warning", value=value, way_out=way_out)]
    return [*findings, _over_nccl(device, timeout, between)]


def _over_nccl(device: torch.device, timeout: float, between: str) -> Finding:
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a rank that waits in vain gets an exception; otherwise it would be aborted
    torch.cuda.set_device(device)
    try:
        process_group = dist.new_group(backend="nccl", timeout=timedelta(seconds=timeout))
        assert isinstance(process_group, dist.ProcessGroup), "all ranks are in it"
        found = _finding("all-reduce NCCL", measure(process_group, device), between)
    except RuntimeError as error:
        found = Finding(section="bandwidth", name="all-reduce NCCL", status="problem", value=one_line(error), way_out=NO_NCCL)
    return found


# ------------------------------------------------------------------------------------------------------------------ two processes


def examine_pair(timeout: float) -> Finding:
    """Between two processes on this machine, which meet in a temporary folder and end with it."""
    with tempfile.TemporaryDirectory(prefix="sharded-optim-doctor-") as folder:
        failure = _run_pair(folder, timeout)
        if failure is None:
            rates = Rates(**json.loads((Path(folder) / RESULT).read_text()))
            return _finding("all-reduce gloo", rates, "two processes started here")
    value = f"two processes on this machine: {failure}"
    return Finding(section="bandwidth", name="all-reduce gloo", status="problem", value=value, way_out=NO_GLOO)


def _run_pair(folder: str, timeout: float) -> str | None:
    """Why it failed; None: it did not. What the processes print goes to files, which cannot fill as pipes do."""
    logs = [Path(folder) / f"{rank}.log" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", "sharded_optim.tools.doctor.pair", str(rank), folder, str(timeout)]
            with log.open("wb") as stream:
                processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream))
        deadline = time.monotonic() + timeout
        for process, log in zip(processes, logs, strict=True):
            if process.wait(max(0.1, deadline - time.monotonic())):
                lines = log.read_text(errors="replace").strip().splitlines()
                return lines[-1] if lines else f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        return f"no end within {timeout:g} s"
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return None
