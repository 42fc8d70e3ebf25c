"""Linters and schemas accept job files and Docker files. `make lint` installs the linters (extra `lint`) and runs these tests."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
JOBS, DOCKER = ROOT / "launch" / "jobs", ROOT / "docker"
MANIFESTS = sorted(path.name for path in JOBS.glob("*.yaml"))
MISSING = "{} is not installed; make lint installs it and runs this test"


def tool(name: str) -> str:
    """Return the path of a linter."""
    found = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    if found is None:
        pytest.skip(MISSING.format(name))
    return found


def test_shellcheck_finds_nothing():
    files = [*sorted(JOBS.glob("*.sh")), *sorted(JOBS.glob("*.sbatch")), *sorted(DOCKER.glob("*.sh")), ROOT / ".ci" / "run"]
    run = subprocess.run([tool("shellcheck"), "--enable", "quote-safe-variables", *files], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_hadolint_finds_nothing(name):
    command = [tool("hadolint"), "--no-color", "--config", ROOT / ".hadolint.yaml", DOCKER / name]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def models() -> dict[str, Any]:
    """Return the Kubeflow Trainer's class of each kind of document."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=MISSING.format("kubeflow-trainer-api"))

    return {
        "TrainJob": models.TrainerV1alpha1TrainJob,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
        "ClusterTrainingRuntime": models.TrainerV1alpha1ClusterTrainingRuntime,
        "JobSet": models.JobsetV1alpha2JobSet,
    }


def check_kubernetes(document: dict[str, Any]) -> None:
    """Raise ValueError for a document that a strict API server would refuse."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason=MISSING.format("kubernetes-validate"))
    kind = document["kind"]
    if kind in models():
        read = models()[kind].from_dict(copy.deepcopy(document)).to_dict()  # drops keys that it does not know
        if read != document:
            raise ValueError(f"{kind}: unknown keys, read as {read}")
        return
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ValueError(f"{kind}: {error.message}") from None


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_accepts_a_manifest_and_refuses_it_with_an_unknown_key_anywhere(name):
    for document in yaml.safe_load_all((JOBS / name).read_text()):
        check_kubernetes(document)
        sections = list(walk(document["spec"]))
        for path in sections:
            broken = copy.deepcopy(document)
            section = broken["spec"]
            for key in path:
                section = section[key]
            section["replicsa"] = 1
            with pytest.raises(ValueError, match=r"unknown keys|replicsa"):
                check_kubernetes(broken)


def walk(section: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all mappings with fixed keys: labels and resource amounts have keys of their own."""
    if isinstance(section, dict):
        yield path
        for key, value in section.items():
            if key not in ("limits", "requests", "selector", "matchLabels"):
                yield from walk(value, (*path, key))
    elif isinstance(section, list):
        for index, value in enumerate(section):
            yield from walk(value, (*path, index))
