"""NVIDIA's compute-sanitizer finds nothing in any kernel: no access out of bounds, no race, nothing read that was not written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.device import REHEARSAL

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "gpu.every_kernel"]
SECONDS = {"memcheck": 200, "racecheck": 200, "synccheck": 150, "initcheck": 150}  # Python is slow under it
KERNELS = re.compile(r"\b(?:update|observe|finite)_\w+")  # as the backend names them
NOT_SUPPORTED = re.compile(r"Device not supported|not supported on this|Unable to find|Internal Sanitizer Error|failed to initialize", re.I)


def test_the_small_program_runs_without_it() -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(PROGRAM, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "were stepped" in done.stdout


@pytest.mark.timeout(260)
@pytest.mark.parametrize("tool", SECONDS)
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    if REHEARSAL:
        pytest.skip("compute-sanitizer needs a GPU")
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--print-limit", "20", "--error-exitcode", "86"]
    if tool == "memcheck":  # torch asks the driver for what it may not have, and goes on without
        command += ["--report-api-errors", "no"]
    # Torch's own allocator would give out parts of large blocks, so that what lies beyond a tensor is still allowed.
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, *PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS[tool], check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} took more than {SECONDS[tool]} s")
    output = done.stdout + done.stderr
    if "were stepped" not in output and NOT_SUPPORTED.search(output):
        pytest.skip(f"compute-sanitizer does not work here: {output.strip().splitlines()[0]}")
    assert "were stepped" in output, output[-4000:]
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    assert summary is not None, output[-4000:]
    if tool == "initcheck":  # torch's own kernels read what they then do not use; ours must not
        assert not KERNELS.search(output), output[-4000:]
        return
    assert (summary[1], done.returncode) == ("0", 0), output[-4000:]
