"""A job whose ranks are killed again and again, on a busy machine: `python -m tests.survival.restarts [KILLS [SECONDS]]`.

torchrun starts all ranks anew, they go on from the newest checkpoint, and the last one is that of a job nobody disturbed, bit for bit.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sharded_optim as so
from tests.survival.launched import ROOT, TINY, environment, write_text

__all__ = ["main", "measure"]

KILLS = 20
STEPS_PER_KILL = 150  # more than are taken between two kills
AT_MOST = 10.0  # seconds from a kill to the first step after it
TIMEOUT = 60.0
GOES_ON = b"resuming from the checkpoint"
STEP_TAKEN = re.compile(rb"step \d+/\d+  loss ")


def main(arguments: list[str]) -> int:
    told, is_right = measure(
        int(arguments[0]) if arguments else KILLS,
        float(arguments[1]) if len(arguments) > 1 else AT_MOST,
    )
    print(told)
    return int(not is_right)


def measure(kills: int = KILLS, at_most: float = AT_MOST) -> tuple[str, bool]:
    """Kill so often, and go on each time within so many seconds.

    Returns:
        How it went, and whether that is as it should be.
    """
    steps = kills * STEPS_PER_KILL
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_text(folder / "text")
        quiet = _Job(folder / "quiet", folder / "text", steps, restarts=0)
        assert quiet.finish() == 0, quiet.log.read_text()
        started = time.monotonic()
        with _busy_machine():
            job = _Job(folder / "disturbed", folder / "text", steps, restarts=kills)
            seconds = [job.kill_and_wait(number) for number in range(kills)]
        status = job.finish()
        restarts = job.attempts() - 1
        same = _digest(job.checkpoints) == _digest(quiet.checkpoints)
        told = (
            f"{kills} kills in {time.monotonic() - started:.0f} s: from a kill to the first step after it {min(seconds):.1f} to "
            f"{max(seconds):.1f} s (median {sorted(seconds)[kills // 2]:.1f}), {restarts} restarts, exit status {status}, the last "
            f"checkpoint {'bit for bit that' if same else 'OTHER than that'} of a job that nobody disturbed"
        )
        is_right = max(seconds) <= at_most and restarts == kills and status == 0 and same
        if not is_right:
            print(job.log.read_text()[-20000:], file=sys.stderr)
    return told, is_right


class _Job:
    """A job of two ranks under torchrun, in a folder of its own."""

    def __init__(self, folder: Path, text: Path, steps: int, restarts: int) -> None:
        folder.mkdir()
        self.log, self._run = folder / "log", folder / "runs" / "job"
        self.checkpoints = self._run / "checkpoints"
        overrides = [
            f"steps={steps}",
            "log_every=1",
            f"validation_every={steps}",
            "checkpoint.every=10",
            "checkpoint.keep=2",
            "resume=auto",
        ]
        overrides += [f"data.path={text}", f"runs_folder={folder / 'runs'}", "run=job"]
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *launcher, "-m", "launch.train", "configs/ddp.yaml", *TINY, *overrides],
                cwd=ROOT,
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._random = random.Random(steps)

    def attempts(self) -> int:
        """How many have taken a step: where an attempt goes on is in the log, and then come its steps."""
        return sum(bool(STEP_TAKEN.search(part)) for part in self.log.read_bytes().split(GOES_ON))

    def kill_and_wait(self, number: int) -> float:
        """Kill a rank some time into an attempt, and wait until the next attempt has taken a step. Returns the seconds."""
        if number == 0:
            self._await_step(0)
        time.sleep(self._random.uniform(0.0, 1.0))
        ranks = self._ranks()
        assert len(ranks) == 2, f"there are {len(ranks)} ranks: {self.log.read_text()[-5000:]}"
        os.kill(self._random.choice(ranks), signal.SIGKILL)
        killed = time.monotonic()
        self._await_step(number + 1)
        return time.monotonic() - killed

    def finish(self) -> int:
        try:
            return self._process.wait(TIMEOUT * 5)
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)

    def _ranks(self) -> list[int]:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return [int(child) for child in children if b"launch.train" in Path(f"/proc/{child}/cmdline").read_bytes()]

    def _await_step(self, attempt: int) -> None:
        until = time.monotonic() + TIMEOUT
        while time.monotonic() < until and self._process.poll() is None:
            if self.attempts() > attempt:
                return
            time.sleep(0.02)
        tail = self.log.read_text()[-10000:]
        os.killpg(self._process.pid, signal.SIGKILL)
        raise AssertionError(f"attempt {attempt} has not taken a step within {TIMEOUT:g} s, or torchrun has given up:\n{tail}")


@contextmanager
def _busy_machine() -> Iterator[None]:
    """As many processes as there are cores that do nothing but compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(len(os.sched_getaffinity(0)))]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _digest(checkpoints: Path) -> str:
    """Of the tensors of the newest checkpoint."""
    newest = so.checkpoint.latest(checkpoints)
    found = hashlib.sha256(str(newest).encode())
    for shard in sorted((checkpoints / f"step-{newest:09}").glob("shard-*")):
        found.update(shard.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
