"""Runs every command of the Dockerfiles and of compose.yaml on this machine, for there may be no Docker engine: `make docker-check`.

An image is a scratch folder and a fresh virtual environment of this Python; the services of compose.yaml are processes side by side. What
would change the machine is only simulated, and what cannot run at all is skipped. The table at the end has every instruction, and why.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
FOLDERS: tuple[str, ...] = ("/opt/sharded-optim", "/data")  # of the image and of its volume; below the scratch folder here
TINY = ["steps=3", "warmup_steps=1", "batch_size=4", "sequence_length=32", "log_every=1", "validation_every=3", "validation_batches=2"]
TINY += ["device=cpu", "model.layers=2", "model.heads=2", "model.d_model=32"]
TIMEOUT_SECONDS = 1800.0  # of a command: an installation may download
Command = list[str] | str  # the exec form, or a line for the shell


class Bare:
    """The scratch folder, what commands see of the machine, and what became of them."""

    def __init__(self, scratch: Path, arguments: dict[str, str]) -> None:
        self.scratch = scratch
        self.table: list[tuple[str, str]] = []  # (an instruction or command, what was done)
        self._arguments = arguments
        self._workdir = scratch
        self._image = scratch / "image"
        self._volume = scratch / "data"
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self._environment = environment | {"PATH": f"{scratch}/venv/bin:{os.environ['PATH']}"}

    def dockerfile(self, path: Path, *, installs: bool) -> None:
        """Run what is in it. Without `installs` pip only says what it would install, and what needs a GPU is skipped."""
        self._image, self._workdir = self.scratch / path.name, self.scratch
        for keyword, rest in _instructions(path):
            label = f"{path.name}: {keyword} {rest}"
            if keyword == "RUN":
                for part in re.sub(r"--mount=\S+ ", "", rest).split(" && "):
                    self._run_line(f"{path.name}: RUN {part}", part, installs)
            elif keyword == "CMD":
                if not installs:
                    self.table.append((label, "SKIPPED: needs a GPU; Dockerfile.cpu has the same"))
                else:
                    self.finish(label, self.start([*json.loads(rest), *TINY], {"PROCESSES": "2"}))
            elif keyword == "COPY":
                self.table.append((label, self._copy(rest.split())))
            elif keyword == "WORKDIR":
                self._workdir = Path(self._here(rest))
                self._workdir.mkdir(parents=True, exist_ok=True)
                self.table.append((label, "made in the scratch folder"))
            elif keyword == "ARG":
                self.table.append((label, self._argument(*rest.split("=", 1))))
            elif keyword == "ENV":
                self._environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
                self.table.append((label, "set"))
            elif keyword == "FROM":
                self.table.append((label, f"SKIPPED: no engine; in its place Python {sys.version.split()[0]} of this machine"))
            elif keyword in ("USER", "STOPSIGNAL"):
                self.table.append((label, "SKIPPED: no engine; this user runs it"))
            else:
                self.table.append((label, f"FAILED: {Path(__file__).name} does not know this instruction"))

    def compose(self, path: Path) -> None:
        """Run its services side by side, each as a process."""
        services = yaml.safe_load(path.read_text())["services"]
        self._volume = self.scratch / "volume"  # as new as the image's
        self._volume.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        started = []
        for name, service in services.items():
            variables = {key: "127.0.0.1" if value in services else value for key, value in service["environment"].items()}
            command = [*service["command"], *TINY]
            started.append((f"{path.name}: {name}: {shlex.join(service['command'])}", self.start(command, variables | {"PORT": port})))
        for label, process in started:
            self.finish(label, process)
        summary = Path(self._here("/data/runs/latest/summary.json"))
        size = json.loads(summary.read_text())["world_size"] if summary.exists() else "no summary"
        self.table.append((f"{path.name}: all services are ranks of one run", "seen" if size == len(services) else f"FAILED: {size}"))

    def start(self, command: Command, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        print(f"+ {command if isinstance(command, str) else shlex.join(command)}", flush=True)
        here = self._here(command) if isinstance(command, str) else [self._here(word) for word in command]
        environment = self._environment | variables
        if isinstance(here, list):
            here[0] = shutil.which(here[0], path=environment["PATH"]) or here[0]  # Popen would look in the PATH of this process
        return subprocess.Popen(here, shell=isinstance(here, str), cwd=self._workdir, env=environment)

    def finish(self, label: str, process: subprocess.Popen[bytes], how: str = "ran") -> None:
        try:
            code = process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
            code = f"none within {TIMEOUT_SECONDS:g} s"
        self.table.append((label, how if code == 0 else f"FAILED: exit code {code}"))

    def _run_line(self, label: str, line: str, installs: bool) -> None:
        """One command of a RUN, or its stand-in."""
        program = line.split()[0]
        how, skip = "ran", None
        if line.startswith("apt-get install"):
            line, how = line.replace("install", "install --simulate", 1), "simulated"
            if shutil.which("apt-get") is None or not any(Path("/var/lib/apt/lists").glob("*Packages*")):
                skip = "no apt-get, or no lists of packages, on this machine"
        elif program == "apt-get" or "/var/lib/apt/lists" in line:
            skip = "would change this machine's lists of packages"
        elif program == "useradd":
            line, how = line.replace("useradd", f"useradd --prefix {self._empty_system()}", 1), "ran, on an /etc of its own"
            if shutil.which("useradd") is None or os.geteuid() != 0:
                skip = "no useradd on this machine, or not root"
        elif program == "install" and os.geteuid() != 0:
            skip = "gives a folder to another user, and this is not root"
        elif "pip install" in line and not installs:
            line, how = line.replace("pip install", "pip install --dry-run", 1), "resolved, with --dry-run"
        if skip is not None:
            self.table.append((label, f"SKIPPED: {skip}"))
        else:
            self.finish(label, self.start(line, {}), how)

    def _copy(self, words: list[str]) -> str:
        *sources, target = words
        ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
        for source in sources:
            files = [path for path in [ROOT / source, *(ROOT / source).rglob("*")] if path.is_file()]
            sent = [path for path in files if not _is_ignored(path.relative_to(ROOT), ignored)]
            if not sent:
                return f"FAILED: .dockerignore leaves nothing of {source}"
            for path in sent:
                below = path.relative_to(ROOT / source) if (ROOT / source).is_dir() else Path(path.name)
                place = self._workdir / target / below
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, place)
        return "copied"

    def _argument(self, name: str, default: str) -> str:
        value = self._arguments.get(name, "" if name == "PIP_EXTRA_INDEX_URL" else default)
        if not value:  # an empty variable would hide what pip's own configuration says
            return f"SKIPPED: what pip finds by itself on this machine will do; or --argument {name}={default}"
        self._environment[name] = value
        return f"set to {value}"

    def _here(self, text: str) -> str:
        """What a command says of the image's folders, said of those here."""
        places = dict(zip(FOLDERS, (self._image, self._volume), strict=True))
        return re.sub(rf"(?<![\w.])({'|'.join(FOLDERS)})(?![\w-])", lambda found: str(places[found[0]]), text)

    def _empty_system(self) -> Path:
        system = self.scratch / "system"
        shutil.rmtree(system, ignore_errors=True)
        for folder in ("etc", "home"):
            (system / folder).mkdir(parents=True, exist_ok=True)
        for name in ("passwd", "shadow", "group", "gshadow"):
            (system / "etc" / name).write_text("")
        return system


def _instructions(path: Path) -> Iterator[tuple[str, str]]:
    """(Keyword, the rest), with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        if line.strip():
            keyword, rest = line.split(maxsplit=1)
            yield keyword, rest


def _is_ignored(path: Path, patterns: list[str]) -> bool:
    """As Docker decides: the last pattern that fits a path or a folder above it."""
    decision = False
    for pattern in patterns:
        plain = pattern.removeprefix("!").removeprefix("**/")
        candidates = [*path.parts, path] if "**/" in pattern else [path, *path.parents]
        if any(fnmatch.fnmatch(str(candidate), plain) for candidate in candidates if str(candidate) != "."):
            decision = not pattern.startswith("!")
    return decision


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--argument", action="append", default=[], metavar="NAME=VALUE", help="as --build-arg of docker build")
    arguments = dict(argument.split("=", 1) for argument in parser.parse_args().argument)
    with tempfile.TemporaryDirectory(prefix="sharded-optim-docker-") as folder:
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/venv"], check=True)
        bare = Bare(Path(folder), arguments)
        bare.dockerfile(ROOT / "docker" / "Dockerfile.cpu", installs=True)
        bare.compose(ROOT / "docker" / "compose.yaml")
        bare.dockerfile(ROOT / "docker" / "Dockerfile.cuda", installs=False)  # what it would install besides
    print()
    for label, outcome in bare.table:
        print(f"{label}\n    {outcome}")
    failures = sum(outcome.startswith("FAILED") for _, outcome in bare.table)
    skips = sum(outcome.startswith("SKIPPED") for _, outcome in bare.table)
    print(f"{len(bare.table)} instructions: {failures} failed, {skips} skipped")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
