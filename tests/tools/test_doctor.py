"""`sharded-optim doctor`: what it finds wrong on machines that are, what it leaves behind, and that it ends whatever ranks do."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sharded_optim.backends import cpu
from sharded_optim.checkpoint.local_store import LocalFile
from sharded_optim.cli import doctor as command
from sharded_optim.cli.commands import app
from sharded_optim.tools import doctor
from sharded_optim.tools.doctor import Finding, RankReport, Report, backends, environment, ranks, storage
from sharded_optim.tools.doctor.rank_info import RankInfo, read_rank_info

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of a whole run on this machine."""
    folder = tmp_path_factory.mktemp("folder")
    reports: list[Report] = []
    assert doctor.examine(folder, report_to=reports.append)
    assert not list(folder.iterdir()), "something was left in the folder"
    (found,) = reports
    return found


def finding(findings: Any, name: str, section: str | None = None) -> Finding:
    (found,) = (each for each in findings if each.name == name and section in (None, each.section))
    return found


def number(found: Finding, key: str) -> float:
    value = found.data[key]
    assert isinstance(value, int | float)
    return value


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, float):
        yield value


# --------------------------------------------------------------------------------------------------------------------- this machine


def test_this_machine_can_train(report: Report) -> None:
    """What runs the tests runs a job; and what was measured is plausible."""
    assert report.status != "problem"
    assert {each.section for each in report.findings} == {"environment", "backends", "storage"}
    assert finding(report.findings, "python").value == ".".join(map(str, sys.version_info[:3]))
    assert finding(report.findings, "device").value == "cpu"
    assert finding(report.findings, "eager").data == {"usable": True, "device": "cpu"}
    assert number(finding(report.findings, "write speed"), "bytes_per_second") > 1e5
    assert "PyTorch version" in str(report.environment), "torch's own report"


def test_a_whole_run_fits_on_a_screen(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    command._print(report)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45
    assert max(map(len, (line.rstrip() for line in lines))) <= 100


def test_a_screen_is_enough_when_everything_is_wrong_on_every_rank(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    (here,) = report.ranks
    long = "a very long reason " * 20
    reports = [
        replace(
            here,
            rank=rank,
            findings=tuple(replace(each, status="problem", value=f"{long}{rank}", way_out=long) for each in here.findings),
        )
        for rank in range(16)
    ]
    command._print(Report(ranks=tuple(reports), together=report.together))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100
    assert "--json has all" in lines[-2]
    assert "problems" in lines[-1]


def test_what_is_wrong_stands_whole_below_the_table_with_its_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = Finding(section="storage", name="folder", status="warning", value="at most 12", way_out="ulimit -n 65536")
    good = Finding(section="storage", name="folder", status="ok", value="at most 4,096")
    reports = [RankReport(rank=rank, host="host", findings=(good if rank == 0 else wrong,)) for rank in range(3)]
    command._print(Report(ranks=tuple(reports), together=()))
    assert "warning on ranks 1, 2: storage folder: at most 12; ulimit -n 65536\n" in capsys.readouterr().out


def test_json_is_all_of_stdout_whatever_libraries_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from C++, which knows nothing of sys.stdout."""

    def chatty(info: RankInfo) -> list[Finding]:
        print("from Python")
        os.write(1, b"from C++\n")
        return []

    monkeypatch.setattr(environment, "examine", chatty)
    result = run("--quick", "--json", "--folder", tmp_path)
    data = json.loads(result.stdout)
    assert result.exit_code == 0
    assert data["status"] in ("ok", "warning")
    assert data["world_size"] == len(data["ranks"]) == 1
    assert all(map(math.isfinite, numbers(data)))
    assert data["environment"] is None


def test_quick_measures_nothing_and_is_quick(tmp_path: Path) -> None:
    begin = time.perf_counter()
    result = run("--quick", "--folder", tmp_path)
    assert time.perf_counter() - begin < 10
    assert result.exit_code == 0
    assert "ready to train" in result.stdout
    assert "write speed" not in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_finding_that_json_cannot_hold_is_not_made() -> None:
    with pytest.raises(AssertionError, match="no number"):
        Finding(section="storage", name="folder", status="ok", value="", data={"free": math.nan})
    with pytest.raises(AssertionError, match="way out"):
        Finding(section="storage", name="folder", status="problem", value="")


# ------------------------------------------------------------------------------------------------------------------------- packages


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    version = metadata.version

    def pretended(name: str) -> str:
        if name in names:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", pretended)
    monkeypatch.setattr(environment, "find_spec", lambda name: None)


def test_missing_packages_are_absent_and_say_how_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *environment.OPTIONAL)
    found = environment.examine(RankInfo())
    for name, extra in environment.OPTIONAL.items():
        each = finding(found, name)
        assert (each.status, each.value, each.way_out) == ("absent", "not installed", f"pip install {extra}")
    assert not [each for each in found if each.status == "problem"]


def test_numpy_that_is_missing_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not bring it, and torch.distributed cannot gather objects without it."""
    without(monkeypatch, "numpy")
    found = finding(environment.examine(RankInfo()), "numpy")
    assert (found.status, found.way_out) == ("problem", "pip install numpy")


def test_versions_that_are_too_old_or_too_new_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    pretended = {"llvmlite": "0.44.9", "deepspeed": "0.20.0"}
    monkeypatch.setattr(metadata, "version", lambda name: pretended.get(name) or version(name))
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    found = environment.examine(RankInfo())
    assert finding(found, "torch").status == "problem"
    assert finding(found, "torch").way_out == "pip install 'torch>=2.9'"
    assert finding(found, "llvmlite").status == "warning"
    assert finding(found, "deepspeed").value == "0.20.0; so.deepspeed attaches to >=0.19,<0.20"


def test_more_threads_than_cores_is_a_warning_with_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert finding(environment.examine(RankInfo()), "threads").status == "ok"
    found = finding(environment.examine(RankInfo(world_size=4, local_world_size=4)), "threads")
    assert (found.status, found.way_out) == ("warning", "set OMP_NUM_THREADS=2 for 4 ranks")


def test_the_least_versions_are_those_that_are_installed() -> None:
    pyproject = (Path(doctor.__file__).parents[3] / "pyproject.toml").read_text()
    for name, oldest in environment.MINIMUM.items():
        assert f'"{name}>={".".join(map(str, oldest))}' in pyproject


# ---------------------------------------------------------------------------------------------------------------- devices, backends


def test_a_backend_that_gives_wrong_bits_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    update = cpu.BACKEND.update

    def wrong(algorithm: Any, operands: Any, *rest: Any) -> None:
        update(algorithm, operands, *rest)
        first = operands.param.tensors[1].view(-1)
        first[:1] = (
            torch.nextafter(first[:1].float(), torch.tensor(torch.inf)).to(first.dtype) if first.dtype == torch.float32 else first[:1]
        )

    monkeypatch.setattr(cpu.BACKEND, "update", wrong)
    found = finding(backends.examine(CPU), "cpu")
    assert found.status == "problem"
    assert "differs from eager on cpu in" in found.value
    assert not found.data["usable"]


def test_a_backend_that_fails_is_a_problem_and_one_without_its_package_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no compiler\nat length")

    with monkeypatch.context() as patch:
        patch.setattr(cpu.BACKEND, "update", fail)
        assert "fails on cpu: no compiler" in finding(backends.examine(CPU), "cpu").value
    import_module = backends.import_module
    missing = ModuleNotFoundError("No module named 'llvmlite'")

    def import_without(name: str) -> Any:
        if name.endswith(".cpu"):
            raise missing
        return import_module(name)

    monkeypatch.setattr(backends, "import_module", import_without)
    found = finding(backends.examine(CPU), "cpu")
    assert (found.status, found.way_out) == ("warning", "pip install llvmlite")
    assert "No module named 'llvmlite'" in found.value
    assert finding(backends.examine(CPU), "triton").status == "absent"


# --------------------------------------------------------------------------------------------------------------------------- limits


# -------------------------------------------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize(("inside", "reason"), [("file/below", "Not a directory"), ("missing", "No such file or directory")])
def test_a_folder_that_cannot_be_written_is_a_problem(inside: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / inside
    result = run("--quick", "--json", "--folder", folder)
    assert result.exit_code == 1
    (found,) = (each for each in json.loads(result.stdout)["ranks"][0]["findings"] if each["status"] == "problem")
    assert found["value"] == f"cannot write in {folder}: {reason}"
    assert found["way_out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_folder_that_exists_and_cannot_be_written_says_why() -> None:
    """/proc refuses root too."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("no /proc on this system")
    (found,) = storage.examine("/proc")
    assert (found.status, found.way_out) == ("problem", "give a --folder that this user can write")
    assert found.value.startswith("cannot write in /proc: ")


def test_what_a_write_that_fails_has_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: LocalFile, content: memoryview) -> None:
        os.write(self._descriptor, content[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalFile, "write", full)
    (found,) = storage.measure(str(tmp_path))
    assert (found.status, found.value) == ("problem", f"cannot write in {tmp_path}: No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_url_is_refused_before_anything_is_looked_at() -> None:
    result = run("--folder", "s3://bucket/run")
    assert result.exit_code == 2
    assert "must be on a local or network file system, got 's3://bucket/run'" in result.stderr


# ---------------------------------------------------------------------------------------------------------------------------- ranks


def test_differences_between_ranks_name_ranks_and_values(report: Report) -> None:
    (here,) = report.ranks
    other = tuple(replace(each, alike="2.99", value="2.99") if each.name == "torch" else each for each in here.findings)
    third = tuple(each for each in here.findings if each.name != "torch")
    everyone = [replace(here, rank=0), replace(here, rank=1, findings=other, host="elsewhere"), replace(here, rank=2, findings=third)]
    (found,) = ranks.compare(everyone)
    assert (found.name, found.status) == ("torch", "problem")
    assert found.value == f"rank 0: {torch.__version__}; rank 1: 2.99; rank 2: not examined"
    (found,) = ranks.compare([everyone[0], replace(everyone[1], findings=here.findings)])
    assert found.value == "2 ranks on 2 hosts have alike what they must"


def test_clocks_may_be_apart_by_a_second() -> None:
    assert ranks.clocks_finding([0.0, 0.9, -0.1]).status == "ok"
    found = ranks.clocks_finding([0.0, 0.1, 2.5, -3.0])
    assert found.status == "problem"
    assert found.value == "5.5 s apart; from rank 0's, rank 2: +2.5 s; rank 3: -3.0 s"


def test_torchruns_variables_are_whole_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_rank_info() == RankInfo(rank=1, world_size=2)
    for name, value, message in (
        ("RANK", "2", "from 0 to WORLD_SIZE - 1, got 2 of 2"),
        ("WORLD_SIZE", "two", "whole numbers"),
        ("MASTER_ADDR", None, "MASTER_ADDR not in"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value) if value else patch.delenv(name)
            with pytest.raises(ValueError, match=message):
                read_rank_info()


def test_ranks_that_did_not_come_are_named() -> None:
    store = torch.distributed.HashStore()
    store.set(ranks._key(1), "host")
    found = ranks._lost(RankInfo(world_size=4), 60.0, store, RuntimeError())
    assert found.value == "ranks 0, 2, 3 of 4 did not come within 60 s"
    store.set(ranks._key(0), "host")
    assert ranks._lost(RankInfo(world_size=2), 60.0, store, RuntimeError("closed\nat")).value == "the 2 ranks lost each other: closed"


BEGIN = """
import os, sys
rank, folder = int(os.environ["RANK"]), {folder!r}
sys.argv = ["sharded-optim", "doctor", "--json", "--folder", folder]
"""
END = """
from sharded_optim.cli import main
try:
    main()
except SystemExit as end:
    open(f"{folder}/exit{rank}", "w").write(str(end.code))
    raise
"""


def script_of(tmp_path: Path, middle: str) -> tuple[Path, dict[str, str]]:
    """What a rank runs, and its environment."""
    script = tmp_path / "script.py"
    (tmp_path / "run").mkdir()
    script.write_text(BEGIN.format(folder=str(tmp_path / "run")) + middle + END)
    path = os.pathsep.join(filter(None, (str(Path(doctor.__file__).parents[3]), os.environ.get("PYTHONPATH"))))
    return script, os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def statuses_in(tmp_path: Path) -> str:
    assert not list((tmp_path / "run").rglob(".*")), "something was left in the folder"
    return " ".join(path.read_text() for path in sorted((tmp_path / "run").glob("exit*")))


def under_torchrun(tmp_path: Path, middle: str) -> tuple[dict[str, Any], str]:
    """What two ranks print, and their exit statuses."""
    script, environment = script_of(tmp_path, middle)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run(torchrun, capture_output=True, text=True, timeout=100, env=environment, check=False)
    assert "exitcode  : -15" not in result.stderr, "torchrun has ended a rank that was about to end"
    return json.loads(result.stdout), statuses_in(tmp_path)


def test_two_ranks_agree(tmp_path: Path) -> None:
    data, statuses = under_torchrun(tmp_path, "")
    assert statuses == "0 0"
    assert data["world_size"] == len(data["ranks"]) == 2
    together = {each["name"]: each for each in data["together"]}
    assert {name: each["status"] for name, each in together.items()} == dict.fromkeys(together, "ok")
    assert together.keys() == {"agreement", "clocks", "folder"}
    assert together["folder"]["data"]["shared"]


def test_ranks_that_disagree_all_fail_and_say_on_what(tmp_path: Path) -> None:
    middle = """
os.environ["OMP_NUM_THREADS"] = str(1 + rank)
os.makedirs(f"{folder}/{rank}", exist_ok=True)
sys.argv[-1] = f"{folder}/{rank}"
sys.argv.append("--quick")
"""
    data, statuses = under_torchrun(tmp_path, middle)
    assert statuses == "1 1"
    together = {each["name"]: each for each in data["together"]}
    threads, folder = together["threads"], together["folder"]
    assert threads["value"] == "rank 0: 1 (OMP_NUM_THREADS=1); rank 1: 2 (OMP_NUM_THREADS=2)"
    assert threads["status"] == "problem"
    assert threads["way_out"].startswith("make it the same for every rank")
    assert (folder["status"], folder["data"]) == ("warning", {"shared": False})
    assert "rank 1:" in folder["value"]


@pytest.mark.parametrize(
    ("world", "death", "seconds"),
    [
        (1, "", 2),  # rank 1 is never started
        (2, "ranks.compare_folders = lambda *_: os._exit(9)", 50),  # the others notice at once, not when their time is over
    ],
    ids=["before ranks meet", "while ranks compare"],
)
def test_a_rank_that_dies_leaves_no_rank_waiting(world: int, death: str, seconds: int, tmp_path: Path) -> None:
    """Without torchrun, which would end the others."""
    middle = f"""
from sharded_optim.tools.doctor import backends, ranks
backends.examine = lambda device: []
if rank == 1:
    {death or "pass"}
sys.argv += ["--quick", "--timeout", "{seconds}"]
"""
    script, environment = script_of(tmp_path, middle)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    begin = time.perf_counter()
    processes = [
        subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment | {"RANK": str(rank)})
        for rank in range(world)
    ]
    try:
        printed = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert time.perf_counter() - begin < 45
    data = json.loads(printed[0])
    assert statuses_in(tmp_path) == "1"
    assert not any(printed[1:])
    (found,) = data["together"]
    assert found["status"] == "problem"
    assert "the 2 ranks lost each other: " in found["value"]
    assert data["world_size"] == 2
