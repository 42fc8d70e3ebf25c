"""Install the package and the frameworks of requirements.txt into the environment that runs this: `make recipes` calls it.

All frameworks are installed together. If pip refuses that, they are installed one after the other, and pip's reason for each that it
refuses is kept for run.py to print.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
REASONS = Path(sys.prefix) / "not_installed"  # a file for each framework that pip refused


def pip(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run pip, and print its errors."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"DS_BUILD_OPS": "0"}, stderr=subprocess.PIPE, text=True, check=False)
    print(*(line for line in done.stderr.splitlines() if line.startswith("ERROR")), sep="\n", end="", flush=True)
    return done


def main() -> None:
    """Raise where torch or the package itself cannot be installed."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "examples/requirements.txt").read_text().splitlines()]
    torch, *frameworks = filter(None, lines)
    REASONS.mkdir(exist_ok=True)
    for old in REASONS.iterdir():
        old.unlink()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.writelines(re.sub(r"\[.*\]", "", line) + "\n" for line in (torch, *frameworks))  # constraints have no extras
        constraints.flush()
        options = ("--constraint", constraints.name, "--no-build-isolation")
        pip("--constraint", "constraints.txt", "pip", "setuptools").check_returncode()
        pip(*options, torch).check_returncode()  # before DeepSpeed, whose setup imports it
        pip(*options, "--editable", ".[cli,cpu,deepspeed,mpi]").check_returncode()
        if pip(*options, *frameworks).returncode == 0:
            return
        print("not all of them together; one after the other:", flush=True)
        for framework in frameworks:
            done = pip(*options, framework)
            if done.returncode:
                errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")]
                name = re.split(r"[\[=]", framework)[0]
                (REASONS / f"{name}.txt").write_text(" ".join(errors) or f"pip exited with {done.returncode}")


if __name__ == "__main__":
    main()
