"""Run all recipes, or those named, one after the other, each in processes of its own: `make recipes`, `make recipes ARGS="peft_lora"`.

Prints a table. A recipe that fails is run once more, and the table says so. Exits with 1 if it fails again, or if its framework is missing
and pip has not refused to install it.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from install import REASONS, ROOT

TIMEOUT = 600  # seconds for a recipe; most take 20 on two idle cores
COLUMNS = ("recipe", "tested with", "losses", "parameters", "resume", "seconds")

# What each needs beside torch, first the one whose recipe it is.
RECIPES: dict[str, tuple[str, ...]] = {
    "pytorch_ddp": (),
    "pytorch_fsdp2": (),
    "pytorch_fsdp1": (),
    "pytorch_sharded_optimizer": (),
    "deepspeed_zero2": ("deepspeed",),
    "accelerate_ddp": ("accelerate",),
    "accelerate_fsdp2": ("accelerate",),
    "accelerate_fsdp1": ("accelerate",),
    "accelerate_deepspeed": ("accelerate", "deepspeed"),
    "hugging_face_ddp": ("transformers", "accelerate"),
    "hugging_face_fsdp2": ("transformers", "accelerate"),
    "hugging_face_sharded_optimizer": ("transformers", "accelerate"),
    "hugging_face_deepspeed": ("transformers", "accelerate", "deepspeed"),
    "peft_lora": ("peft", "transformers", "accelerate"),
    "lightning_ddp": ("lightning", "torchdata"),
    "lightning_fsdp2": ("lightning", "torchdata"),
    "lightning_sharded_optimizer": ("lightning", "torchdata"),
    "mpi_fsdp2": ("mpi4py", "mpich"),
    "torchtitan_fsdp2": ("torchtitan",),
    "ray_train_ddp": ("ray",),
}


@dataclass
class Outcome:
    """A row of the table."""

    recipe: str
    tested_with: str
    found: tuple[str, str, str]  # of losses, parameters and resume
    seconds: float
    failed: bool

    def row(self) -> str:
        """Return it as Markdown."""
        return f"| {' | '.join((self.recipe, self.tested_with, *self.found, f'{self.seconds:.0f}'))} |"


def run(recipe: str, timeout: float) -> Outcome:
    """Run one recipe. Print its output if it fails."""
    versions = []
    for name in RECIPES[recipe] or ("torch",):
        try:
            versions.append(f"{name} {version(name).partition('+')[0]}")
        except PackageNotFoundError:
            reason = REASONS / f"{name}.txt"
            text = (
                reason.read_text() if reason.exists() else f"{name} is missing here, and pip has not refused it; `make recipes` installs it"
            )
            return Outcome(recipe, f"not installed: {text}", ("", "", ""), 0.0, not reason.exists())
    start = time.monotonic()
    # In a session of its own, so that all of its processes can be ended.
    command = [sys.executable, str(Path(__file__).with_name(f"{recipe}.py"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        output += f"\n{recipe} has not ended within {timeout:.0f} s"
    seconds = time.monotonic() - start
    lines = re.findall(rf"^{recipe}; losses: (.*); parameters: (.*); resume: (.*)$", output, re.MULTILINE)
    failed = process.returncode != 0 or len(lines) != 1
    if failed:
        print(*(line[:400] for line in output.splitlines()[-80:]), f"{recipe} exited with {process.returncode}", sep="\n", file=sys.stderr)
    return Outcome(recipe, ", ".join(versions), lines[-1] if lines else ("failed", "", ""), seconds, failed)


def build_extension(recipes: list[str]) -> None:
    """Build what DeepSpeed compiles at its first use, which takes longer than a recipe."""
    if find_spec("deepspeed") is None or not any("deepspeed" in RECIPES[recipe] for recipe in recipes):
        return
    sys.path.append(str(ROOT))
    from launch.deepspeed_extension import build

    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    build()


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipes", nargs="*", choices=[[], *RECIPES], metavar="recipe", help=f"of {', '.join(RECIPES)}; default all")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for each recipe")
    arguments = parser.parse_args()
    recipes = arguments.recipes or list(RECIPES)
    start = time.monotonic()
    build_extension(recipes)
    print(f"\ntorch {version('torch')}, 2 ranks on CPUs with gloo\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    outcomes = []
    for recipe in recipes:
        outcome = run(recipe, arguments.timeout)
        if outcome.failed and not outcome.tested_with.startswith("not installed"):  # frameworks and a busy machine fail now and then
            outcome = run(recipe, arguments.timeout)
            outcome.tested_with += ", second try"
        outcomes.append(outcome)
        print(outcomes[-1].row(), flush=True)
    failed = [outcome.recipe for outcome in outcomes if outcome.failed]
    left_out = [outcome.recipe for outcome in outcomes if outcome.tested_with.startswith("not installed")]
    passed = len(set(recipes) - {*failed, *left_out})
    summary = [f"{passed} of {len(recipes)} recipes passed in {time.monotonic() - start:.0f} s"]
    summary += [f"{what}: {', '.join(names)}" for what, names in (("not installed", left_out), ("failed", failed)) if names]
    print(f"\n{'; '.join(summary)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
