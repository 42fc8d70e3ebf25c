"""NVIDIA's compute-sanitizer finds nothing in any kernel: no access out of bounds, no race, nothing read that was not written."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.device import REHEARSAL, environment

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "gpu.every_kernel"]
# Two tools at a time after the program alone: what all may take is less than their stage may.
ALONE = 125
SECONDS = {"memcheck": 150, "racecheck": 110, "synccheck": 110, "initcheck": 110}  # Python is slow under it
pytestmark = pytest.mark.timeout(ALONE + max(SECONDS.values()) + 10)
KERNELS = re.compile(r"\b(?:update|observe|finite|coefficients)_\w+|\bverdict\b")  # as the backend names them
NOT_SUPPORTED = re.compile(r"Device not supported|not supported on this|Unable to find|Internal Sanitizer Error|failed to initialize", re.I)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the program says without a tool. Its kernels then are in Triton's cache, for tools that would each have them compiled."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    told = folder / "every_kernel.txt"
    with (folder / "every_kernel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            found = environment(ROOT, ROOT / "tests")
            done = subprocess.run(PROGRAM, cwd=ROOT, env=found, capture_output=True, text=True, timeout=ALONE, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            told.write_text(done.stdout, encoding="utf-8")
    return told.read_text(encoding="utf-8")


def test_the_small_program_runs_without_it(alone: str) -> None:
    assert "were stepped" in alone


@pytest.mark.parametrize("tool", SECONDS)
def test_compute_sanitizer_finds_nothing(tool: str, request: pytest.FixtureRequest) -> None:
    if REHEARSAL:
        pytest.skip("compute-sanitizer needs a GPU")
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    request.getfixturevalue("alone")
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--print-limit", "20", "--error-exitcode", "86"]
    if tool == "memcheck":  # torch asks the driver for what it may not have, and goes on without
        command += ["--report-api-errors", "no"]
    # Torch's own allocator would give out parts of large blocks, so that what lies beyond a tensor is still allowed.
    found = environment(ROOT, ROOT / "tests") | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run([*command, *PROGRAM], cwd=ROOT, env=found, capture_output=True, text=True, timeout=SECONDS[tool], check=False)
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
