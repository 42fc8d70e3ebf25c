"""Questions to packages that may abort, hang or print when they are imported: each is asked in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass

__all__ = ["Answer", "Probe"]

# An MPI library that finds these believes that this process is a rank of its job, and talks to its launcher.
LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "HYDRA_", "MPIR_", "MPI_LOCAL")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a probe printed, or why it printed nothing."""

    output: str = ""
    failure: str | None = None


class Probe:
    """Python code that runs beside this process.

    Args:
        code: prints the answer.
    """

    def __init__(self, code: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        self._begin = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        )

    def answer(self, timeout: float) -> Answer:
        """Wait until `timeout` seconds after the start; then end it."""
        try:
            output, errors = self._process.communicate(timeout=max(0.1, self._begin + timeout - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return Answer(failure=f"no answer within {timeout:g} s")
        if self._process.returncode == 0:
            return Answer(output=output.strip("\0\n "))
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        return Answer(failure=lines[-1] if lines else f"exit status {self._process.returncode}")
