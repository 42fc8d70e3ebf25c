"""Builds sdist and wheel, and runs the README's example with the wheel alone, in a new environment: `make wheel`.

What users install is neither a clone nor the development environment: a dependency that is not declared, or a file that is not packaged,
shows here alone. All of it is in a temporary folder. Needs a package index, for torch and its dependencies.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
CHECK = """
import sharded_optim
assert sharded_optim.__file__.startswith({prefix!r}), sharded_optim.__file__
assert max(value for name, value in optimizer.metrics().items() if name.startswith("rms/")) > 0.0
open({folder!r} + f"/{{dist.get_rank()}}.txt", "w").write(sharded_optim.__version__)
import gc; del model, optimizer; gc.collect(); dist.destroy_process_group()
"""


def main() -> None:
    """Build, install and run; raise where one of these fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*command: str | Path, cwd: Path) -> None:
        print("$", *command, flush=True)
        subprocess.run(command, cwd=cwd, env=environment, check=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, built, new = folder / "source", folder / "built", folder / "venv"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for path in filter(None, listed.stdout.split("\0")):  # as building in a clone leaves files behind
            if (ROOT / path).is_file():
                (source / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, source / path)
        run(sys.executable, "-c", BUILD_SDIST, built, cwd=source)
        (sdist,) = built.glob("*.tar.gz")
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", built, sdist, cwd=folder)
        (wheel,) = built.glob("*.whl")
        venv.create(new, with_pip=True)
        python = new / "bin" / "python"
        (torch,) = re.findall(r"^torch==[\d.]+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", torch, wheel, cwd=folder)
        example, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
        script = folder / "example.py"
        script.write_text(example + CHECK.format(prefix=str(new), folder=str(folder)))
        run(python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, cwd=folder)
        versions = [(folder / f"{rank}.txt").read_text() for rank in range(2)]
        print(f"the README's example ran on 2 ranks with {wheel.name}, version {versions[0]}")


if __name__ == "__main__":
    main()
