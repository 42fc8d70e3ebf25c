"""Runs the tests of this folder in stages: `python -m tests.gpu [STAGE ...]`.

Each stage is a pytest process of its own with a time limit of its own, so that a hang, or a CUDA context that is lost, hides nothing of the
others. As many run side by side as there are cores for; kernels that are compiled by one are there for all, in Triton's cache.

Exit status: 0 all passed, or skipped for a reason that is told; 1 something failed, or nothing ran; 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"{sys.executable} has no torch; name a Python that has: make gpu-check GPU_PYTHON=...")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_check"
# Read by conftest.py and device.py. Nothing of this folder is imported, so that `python tests/gpu` runs it too: on a machine of others,
# `tests` may be a package that somebody has installed.
RECORD = "GPU_CHECK_RECORD"
REHEARSAL = "GPU_CHECK_REHEARSAL"
SECONDS = 450  # of all stages together
LONGEST_MESSAGE = 300  # characters of a failure, in the table; all of it is in the JSON file
NO_TEST = 5  # pytest's exit status


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Tests that run in one pytest.

    Attributes:
        file: in this folder.
        proves: what, for the table.
        seconds: after which it is ended.
        workers: processes; with more than one, tests of the file are spread over them.
    """

    name: str
    file: str
    proves: str
    seconds: float
    workers: int = 1


# The most important first: they begin in this order, and the last ones wait where there are few cores.
STAGES = (
    Stage(name="kernels", file="test_kernels.py", proves="each kernel gives the bits of the eager backend", seconds=300, workers=5),
    Stage(name="optimizers", file="test_optimizers.py", proves="whole optimizers give the bits of the CPU", seconds=300, workers=3),
    Stage(name="device only", file="test_device_only.py", proves="a step waits for nothing", seconds=240, workers=2),
    Stage(name="graphs", file="test_graphs.py", proves="a CUDA graph replays a step", seconds=180),
    Stage(name="ranks", file="test_ranks.py", proves="FSDP2, HSDP, DDP, ShardedOptimizer; NCCL, or gloo for two ranks", seconds=300),
    Stage(name="training job", file="test_training_job.py", proves="the training job learns on the GPU", seconds=300, workers=2),
    Stage(name="sanitizer", file="test_sanitizer.py", proves="compute-sanitizer finds nothing", seconds=400, workers=2),
)


@dataclass(kw_only=True)
class Outcome:
    """What became of a stage.

    Attributes:
        problem: why it did not come to its end; None if it did.
        skipped: how many tests, by reason.
        failures: the text of each failed test, by its name.
    """

    stage: str
    proves: str
    passed: int = 0
    failed: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    problem: str | None = None
    failures: dict[str, str] = field(default_factory=dict)
    slowest: list[tuple[str, float]] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        return not self.failed and self.problem is None


# --------------------------------------------------------------------------------------------------------------------- one stage


def run(stage: Stage, workers: int, seconds: float, folder: Path, arguments: Sequence[str], *, rehearse: bool) -> Outcome:
    """Run a stage, and end it when its time is over. What its tests have said until then counts."""
    started = time.monotonic()
    record, log = folder / f"{stage.file}.jsonl", folder / f"{stage.file}.log"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb", "short", str(HERE / stage.file), *arguments]
    if find_spec("xdist") is not None and (workers > 1 or not rehearse):  # what ends one worker is then a failure, and another goes on
        command += ["--numprocesses", str(workers), "--dist", "worksteal", "--max-worker-restart", "10"]
    problem = None
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(rehearse=rehearse) | {RECORD: str(record)},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
            ended = record.exists() and '"outcome": "end"' in record.read_text(encoding="utf-8")
            if not ended or status not in (0, 1):
                problem = "no test was selected" if status == NO_TEST else f"pytest ended with status {status}, not as it should"
        except subprocess.TimeoutExpired:
            problem = f"ended after {seconds:.0f} s, its time"
        finally:
            _end(process)
    outcome = _read(stage, record)
    if problem is None and not (outcome.passed or outcome.failed or outcome.skipped):
        problem = "nothing ran"
    if problem is not None:
        text = log.read_text(errors="replace")
        outcome.failures[f"{stage.file}: {problem}"] = text[-6000:]
    outcome.problem, outcome.seconds = problem, round(time.monotonic() - started, 1)
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what a stage has left running, ranks and jobs that it started included, but for those that have begun sessions of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    with contextlib.suppress(subprocess.TimeoutExpired):  # of a process that the driver does not let go the report is not to wait
        process.wait(10)


def _read(stage: Stage, record: Path) -> Outcome:
    outcome = Outcome(stage=stage.name, proves=stage.proves)
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    told = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # of a process that was ended while it wrote
            told.append(json.loads(line))
    told = [each for each in told if each["outcome"] != "end"]
    outcomes = Counter(each["outcome"] for each in told)
    outcome.passed, outcome.failed = outcomes["passed"], outcomes["failed"]
    outcome.skipped = dict(Counter(each["reason"] for each in told if each["outcome"] == "skipped"))
    outcome.failures = {each["test"]: each["reason"] for each in told if each["outcome"] == "failed"}
    longest = sorted(told, key=lambda each: -each["seconds"])[:5]
    outcome.slowest = [(each["test"], each["seconds"]) for each in longest]
    return outcome


def environment(*, rehearse: bool) -> dict[str, str]:
    """Of a stage's processes."""
    told = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))), "PYTHONUNBUFFERED": "1"}
    told["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is a GPU must not keep ranks from being forked
    told["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1" if rehearse else "2")
    if "lo" in (name for _, name in socket.if_nameindex()):  # nothing leaves this machine, which need not have a network
        told |= {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    if rehearse:
        told |= {REHEARSAL: "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # of a pytest that this runs in
    return own | told


# -------------------------------------------------------------------------------------------------------------------- all stages


class _Cores:
    """Lets stages begin in their order, when there are cores for them."""

    def __init__(self, count: int) -> None:
        self._free = self.count = count
        self._changed = threading.Condition()
        self._next = 0

    def take(self, place: int, wanted: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._next == place and self._free >= wanted)
            self._free -= wanted
            self._next += 1
            self._changed.notify_all()

    def give(self, count: int) -> None:
        with self._changed:
            self._free += count
            self._changed.notify_all()


def run_all(stages: Sequence[Stage], seconds: float, arguments: Sequence[str], *, rehearse: bool) -> list[Outcome]:
    deadline = time.monotonic() + seconds
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = _Cores(count)

    def one(place: int, stage: Stage, folder: Path) -> Outcome:
        workers = min(stage.workers, count)
        cores.take(place, workers)
        try:
            left = deadline - time.monotonic()
            if left < 1.0:
                outcome = Outcome(stage=stage.name, proves=stage.proves, problem=f"not begun: the {seconds:.0f} s were over")
            else:
                outcome = run(stage, workers, left if rehearse else min(stage.seconds, left), folder, arguments, rehearse=rehearse)
        except Exception as error:  # no reason to lose what the others have found
            problem = f"{type(error).__name__}: {error}"
            outcome = Outcome(stage=stage.name, proves=stage.proves, problem=problem, failures={stage.file: traceback.format_exc()})
        finally:
            cores.give(workers)
        print(f"{outcome.stage}: {outcome.passed} passed, {outcome.failed} failed, {outcome.seconds:.0f} s", flush=True)
        return outcome

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ThreadPoolExecutor(len(stages)) as pool:
        running = [pool.submit(one, place, stage, Path(folder)) for place, stage in enumerate(stages)]
        return [each.result() for each in running]


# ------------------------------------------------------------------------------------------------------------------------ reports


def machine(*, rehearse: bool) -> dict[str, str]:
    """What was measured on."""
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "llvmlite": _version("llvmlite"),
        "pytest-xdist": _version("pytest-xdist", "not installed: what hangs, or loses the CUDA context, ends its whole stage"),
        "C compiler": _compiler(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
    }
    if rehearse:
        return {"GPU": "none: a rehearsal in Triton's interpreter", **found}
    properties = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "not there"
    return {
        "GPU": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors",
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "CUDA": str(torch.version.cuda),
        "NCCL": nccl,
        "compute-sanitizer": _said_by("compute-sanitizer", "--version"),
        **found,
    }


def _version(package: str, otherwise: str = "not installed") -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise


def _compiler() -> str:
    """What Triton builds its launchers with."""
    command = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang")), "none")
    has_header = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    return f"{Path(command).name}, {'with' if has_header else 'without'} Python.h"


def _said_by(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not on the PATH"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return f"{command[0]} does not answer"
    lines = done.stdout.strip().splitlines()
    return next((line for line in reversed(lines) if "ersion" in line), lines[0] if lines else "unknown")


def table(outcomes: Sequence[Outcome]) -> str:
    lines = ["| stage | passed | failed | skipped | seconds | proves |", "|---|---:|---:|---:|---:|---|"]
    for each in outcomes:
        problem = "" if each.problem is None else f" ({each.problem})"
        skipped = sum(each.skipped.values())
        lines.append(f"| {each.stage} | {each.passed} | {each.failed}{problem} | {skipped} | {each.seconds:.0f} | {each.proves} |")
    reasons = {(each.stage, reason): count for each in outcomes for reason, count in each.skipped.items()}
    lines += ["", *(f"- skipped in {stage}, {count}: {reason}" for (stage, reason), count in reasons.items())] if reasons else []
    return "\n".join(lines)


def short(failure: str) -> str:
    """The line of a failure that says what went wrong."""
    lines = [line for line in failure.splitlines() if line.startswith("E ")] or failure.strip().splitlines()[-1:] or [""]
    return lines[0].removeprefix("E").strip()[:LONGEST_MESSAGE]


def verdict_of(outcomes: Sequence[Outcome], seconds: float) -> str:
    """In a line: whether all that ran passed, and what did not run."""
    if not is_right(outcomes):
        return f"Something is wrong, after {seconds:.0f} s."
    skipped = [f"{each.stage} ({'; '.join(each.skipped)})" for each in outcomes if each.skipped]
    if not skipped:
        return f"All is as it should be, after {seconds:.0f} s."
    return f"All that ran is as it should be, after {seconds:.0f} s. Not proven here, or not all of it: {', '.join(skipped)}."


def is_right(outcomes: Sequence[Outcome]) -> bool:
    return all(each.is_right for each in outcomes) and any(each.passed for each in outcomes)


def write(output: Path, where: dict[str, str], outcomes: Sequence[Outcome], verdict: str) -> None:
    """A JSON file with everything, and a Markdown page beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"machine": where, "verdict": verdict, "stages": [asdict(each) for each in outcomes]}
    output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    facts = "\n".join(f"| {name} | {value} |" for name, value in where.items())
    failures = [f"- {each.stage}, `{test}`: {short(text)}" for each in outcomes for test, text in each.failures.items()]
    page = ["# make gpu-check", f"| | |\n|---|---|\n{facts}", table(outcomes), "\n".join(failures), verdict]
    output.with_suffix(".md").write_text("\n\n".join(part for part in page if part) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description="Prove on a GPU what only a GPU can prove.")
    names = [stage.name for stage in STAGES]
    parser.add_argument("stage", nargs="*", help=f"what to run: parts of {', '.join(names)}; all of them without")
    parser.add_argument("--rehearse", action="store_true", help="the same tests without a GPU, in Triton's interpreter")
    parser.add_argument("--seconds", type=float, help=f"after which everything is ended; {SECONDS}, or an hour for a rehearsal")
    parser.add_argument("--output", type=Path, help=f"results without suffix; {RESULTS.relative_to(ROOT)}, of a rehearsal none")
    parser.add_argument("-k", dest="expression", help="only tests that match, as pytest's -k")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.stage if not any(part in name for name in names)]
    if unknown:
        parser.error(f"no stage is called {unknown[0]!r}; there are {', '.join(names)}")
    if not options.rehearse and not torch.cuda.is_available():
        print("there is no GPU that torch can use; python -m tests.gpu --rehearse runs the same tests without one", file=sys.stderr)
        return 2
    started = time.monotonic()
    where = machine(rehearse=options.rehearse)
    print("\n".join(f"{name}: {value}" for name, value in where.items()), flush=True)
    stages = [stage for stage in STAGES if not options.stage or any(part in stage.name for part in options.stage)]
    seconds = options.seconds or (3600 if options.rehearse else SECONDS)
    selected = [] if options.expression is None else ["-k", options.expression]
    outcomes = run_all(stages, seconds, selected, rehearse=options.rehearse)
    if options.expression is not None:  # which need not select tests of every stage
        outcomes = [each for each in outcomes if each.problem != "no test was selected"]
    for each in outcomes:
        for test, text in each.failures.items():
            print(f"\n{each.stage}: {test}\n    {short(text)}")
    verdict = verdict_of(outcomes, time.monotonic() - started)
    print(f"\n{table(outcomes)}\n\n{verdict}", flush=True)
    output = options.output or (None if options.rehearse else RESULTS)
    if output is not None:
        write(output, where, outcomes, verdict)
        print(f"written to {output.with_suffix('.json')} and {output.with_suffix('.md').name}")
    return int(not is_right(outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
