"""Versions of Python, torch, this library and the packages that it can use, none of which is imported here."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from importlib.util import find_spec

import torch

from sharded_optim.deepspeed import NEXT, OLDEST, VERSIONS
from sharded_optim.tools.doctor.findings import Finding, Status
from sharded_optim.tools.doctor.probes import Answer, Probe
from sharded_optim.version import __version__

__all__ = ["MINIMUM", "OPTIONAL", "Packages"]

MINIMUM = {"torch": (2, 9), "numba": (0, 61), "triton": (3, 6), "safetensors": (0, 4, 3)}  # as in pyproject.toml
# Packages that may be there, and how they are installed.
OPTIONAL = {
    "numba": "numba",
    "triton": "triton",
    "deepspeed": f"'deepspeed{VERSIONS}'",
    "mpi4py": "mpi4py",
    "safetensors": "safetensors",
    "fsspec": "fsspec",
}
# Importing mpi4py.MPI would initialise MPI; the version of the library may be asked before.
MPI_LIBRARY = "import mpi4py; mpi4py.rc.initialize = mpi4py.rc.finalize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
DEEPSPEED_IMPORT = "import deepspeed"


class Packages:
    """Starts to ask those that answer in processes of their own.

    Args:
        imports: also whether DeepSpeed can be imported, which takes seconds.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, *, imports: bool, timeout: float) -> None:
        self._timeout = timeout
        self._mpi = Probe(MPI_LIBRARY) if _version_of("mpi4py") else None
        self._deepspeed = Probe(DEEPSPEED_IMPORT) if imports and _version_of("deepspeed") else None

    def findings(self) -> list[Finding]:
        python = platform.python_version()
        return [
            _finding("python", "ok", python, version=python),
            _torch(),
            _numpy(),
            _finding("sharded-optim", "ok", __version__, version=__version__),
            *(_optional(name) for name in OPTIONAL if name not in ("deepspeed", "mpi4py")),
            _of_deepspeed(self._deepspeed, self._timeout),
            _of_mpi(self._mpi, self._timeout),
        ]


def _finding(name: str, status: Status, value: str, way_out: str | None = None, **data: str | None) -> Finding:
    return Finding(section="versions", name=name, status=status, value=value, way_out=way_out, data=data, alike=data["version"] or "none")


def _version_of(name: str) -> str | None:
    """None: it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown" if find_spec(name) is not None else None


def numbers_of(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with.

    >>> numbers_of("2.13.0rc1+cpu")
    (2, 13, 0)
    """
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _torch() -> Finding:
    version = str(torch.__version__)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    oldest = ".".join(map(str, MINIMUM["torch"]))
    data = {"version": version, "minimum": oldest, "build": build}
    if numbers_of(version) < MINIMUM["torch"]:
        return _finding("torch", "problem", f"{version}, and >= {oldest} is needed", f"pip install 'torch>={oldest}'", **data)
    return _finding("torch", "ok", f"{version}, a {build} build, >= {oldest}", **data)


def _numpy() -> Finding:
    version = _version_of("numpy")
    if version is None:
        return _finding("numpy", "problem", "not installed, and torch.distributed gathers objects by it", "pip install numpy", version=None)
    return _finding("numpy", "ok", version, version=version)


def _optional(name: str) -> Finding:
    version = _version_of(name)
    if version is None:
        return _finding(name, "absent", "not installed", f"pip install {OPTIONAL[name]}", version=None)
    oldest = MINIMUM.get(name)
    if oldest is not None and version != "unknown" and numbers_of(version) < oldest:
        told = ".".join(map(str, oldest))
        return _finding(name, "warning", f"{version}, and >= {told} is needed", f"pip install '{name}>={told}'", version=version)
    return _finding(name, "ok", version, version=version)


def _of_deepspeed(probe: Probe | None, timeout: float) -> Finding:
    found = _optional("deepspeed")
    version = found.data["version"]
    if not isinstance(version, str):
        return found
    way_out = f"pip install {OPTIONAL['deepspeed']}"
    if not OLDEST <= numbers_of(version)[:2] < NEXT:
        return _finding("deepspeed", "warning", f"{version}; so.deepspeed attaches to {VERSIONS}", way_out, version=version, range=VERSIONS)
    answer = Answer() if probe is None else probe.answer(timeout)
    if answer.failure is not None:
        value = f"{version}, which cannot be imported: {answer.failure}"
        return _finding("deepspeed", "warning", value, f"look at python -c '{DEEPSPEED_IMPORT}', or {way_out}", version=version)
    return _finding("deepspeed", "ok", f"{version}, in {VERSIONS}", version=version, range=VERSIONS)


def _of_mpi(probe: Probe | None, timeout: float) -> Finding:
    found = _optional("mpi4py")
    version = found.data["version"]
    if probe is None or not isinstance(version, str):
        return found
    answer = probe.answer(timeout)
    if answer.failure is not None:
        value = f"{version}, whose MPI library does not load: {answer.failure}"
        return _finding("mpi4py", "warning", value, "install an MPI library, such as Open MPI or MPICH, or remove mpi4py", version=version)
    library = " ".join(answer.output.partition("\n")[0].partition(",")[0].split())  # MPICH aligns its lines, Open MPI has one with commas
    return _finding("mpi4py", "ok", f"{version}, {library}", version=version, library=answer.output)
