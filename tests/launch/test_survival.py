"""A job meets its end, its restart, or its scheduler as docs/survival.md says: a few cells of `make survive`, under all launchers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import sharded_optim as so
from tests.survival.faults import FAULTS, HEARTBEAT
from tests.survival.launched import LAUNCHERS, ROOT, TINY, Outcome, absent, environment, run, write_text

pytestmark = pytest.mark.timeout(180)

FAULT = {fault.name: fault for fault in FAULTS}
SHORT = 5.0  # seconds of heartbeat, so that no test waits for 20
SLACK = 10.0  # seconds that a busy machine may take longer


@pytest.mark.parametrize(
    "cases",
    [
        [("an exception, and a thread left alive", "torchrun", 1), ("SIGKILL", "mpirun (MPICH)", 1)],
        [("exit(0)", "mpirun (Open MPI)", 1), ("an exception inside save", "mpirun (Open MPI)", 1)],
        [("NaN in the loss, from then on", "torchrun", 1), ("a store that is gone", "mpirun (MPICH)", 1)],
        # Most of which is waiting.
        [("SIGSTOP", "mpirun (MPICH)", 0), ("a late rank", "torchrun", 1), ("a store that is stopped", "mpirun (Open MPI)", 1)],
        [("SIGSTOP", "torchrun", 0), ("a call that holds Python's lock", "mpirun (MPICH)", 1), ("a store that is stopped", "torchrun", 1)],
    ],
)
def test_the_first_cause_is_in_the_log_and_the_job_ends_in_time(cases):
    for _, launcher, _ in cases:
        if reason := absent(launcher):
            pytest.skip(reason)

    def happens(case: tuple[str, str, int]) -> Outcome:
        name, launcher, rank = case
        fault = FAULT[name]
        limit = fault.seconds - (HEARTBEAT - SHORT if fault.seconds > HEARTBEAT else 0.0)
        return run(replace(fault, seconds=limit + SLACK, arguments=(*fault.arguments, f"heartbeat={SHORT}")), launcher, rank)

    with ThreadPoolExecutor() as both:
        for outcome in both.map(happens, cases):
            assert outcome.problem is None, f"{outcome.fault.name}, {outcome.launcher}: {outcome.problem}\n{outcome.output}"


# ---------------------------------------------------------------------------------------------------------------- whole jobs


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("survival") / "text"
    write_text(folder)
    return folder


def arguments(folder: Path, text: Path, *more: str) -> list[str]:
    return ["configs/ddp.yaml", *TINY, "log_every=1", f"data.path={text}", f"runs_folder={folder}", "name=job", *more]


def finished(command: list[str]) -> str:
    """The output of a job that ends well."""
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(runs: Path) -> dict[int, float]:
    """Training losses of all runs in a folder, by step."""
    records = [json.loads(line) for path in sorted(runs.glob("2*/metrics.jsonl")) for line in path.read_text().splitlines()]
    return {record["step"]: record["train_loss_bits"] for record in records if "train_loss_bits" in record}


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of a job that nothing happens to, under torchrun."""
    runs = tmp_path_factory.mktemp("undisturbed")
    finished([*LAUNCHERS["torchrun"], "-m", "launch.train", *arguments(runs, text)])
    return losses(runs)


def test_mpirun_gives_bitwise_what_torchrun_gives(text, undisturbed, tmp_path):
    def train(launcher: str) -> None:
        finished([*LAUNCHERS[launcher], "-m", "launch.train", *arguments(tmp_path / launcher, text)])

    launchers = ["mpirun (MPICH)", "mpirun (Open MPI)"]
    if reason := absent(launchers[0]) or absent(launchers[1]):
        pytest.skip(reason)
    with ThreadPoolExecutor() as both:
        list(both.map(train, launchers))
    assert len(undisturbed) == 12
    assert [losses(tmp_path / launcher) for launcher in launchers] == [undisturbed] * 2


@pytest.mark.parametrize(("number", "launcher"), [(signal.SIGTERM, "torchrun"), (signal.SIGUSR1, "mpirun (MPICH)")])
def test_a_signal_to_one_rank_saves_and_ends_all_and_the_job_goes_on_from_there(number, launcher, everything, text, undisturbed, tmp_path):
    """Also on another number of ranks, which is said."""
    if number == signal.SIGUSR1 and not everything:
        pytest.skip("takes as long again: --matrix")
    if reason := absent(launcher):
        pytest.skip(reason)
    job = arguments(tmp_path, text, "processes=auto", "resume=auto")
    process = subprocess.Popen(
        [*LAUNCHERS[launcher], "-m", "tests.survival.slow", *job],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ranks: list[int] = []
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        ranks += [int(found) for found in re.findall(r"slow rank 1 is (\d+)", line)]
        if "step 2/12  loss" in line:
            break
    os.kill(ranks[0], number)
    output += process.stdout.read()
    assert process.wait(60) == 0, output
    run = (tmp_path / "latest").resolve()
    (saved,) = so.checkpoint.steps(run / "checkpoints")
    assert 2 <= saved < 12
    told = f"asked to stop by {number.name}: saved in {run / 'checkpoints'}; resume=auto run={run.name} resumes from it"
    assert f"step {saved}/12  {told}" in output
    assert json.loads((run / "summary.json").read_text())["status"] == f"interrupted after step {saved}"
    world_size = 1 if number == signal.SIGTERM else 2
    rest = finished([sys.executable, "-m", "launch", *job, f"processes={world_size}"])
    assert f"step {saved}/12  resuming from the checkpoint" in rest
    if world_size == 2:
        assert losses(tmp_path) == undisturbed
    else:
        assert "2 ranks saved the checkpoint, and 1 resume from it: with the same state and the same batches" in rest
        assert losses(tmp_path) == pytest.approx(undisturbed, rel=1e-4)


def test_a_node_that_is_taken_away_comes_back_and_the_others_wait_for_it(everything, text, undisturbed, tmp_path):
    """The torchrun of a node that nobody takes away must not believe that all is done."""
    if not everything:
        pytest.skip("takes a minute: --matrix")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = arguments(tmp_path, text, "processes=auto", "resume=auto")
    nodes = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--max-restarts", "3"]
    command = [sys.executable, "-m", *nodes, "--rdzv-endpoint", f"localhost:{port}", "-m", "tests.survival.slow", *job]

    # torch 2.13 otherwise tells nodes that come later nothing of the store that it has shared with the first ones.
    of_nodes = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=ROOT, env=of_nodes, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    stays = start()
    time.sleep(2.0)  # hosts the meeting
    taken = start()
    until = time.monotonic() + 60
    while not any(step >= 2 for step in losses(tmp_path)) and time.monotonic() < until:
        time.sleep(0.1)
    taken.terminate()
    taken.communicate(timeout=60)
    (saved,) = so.checkpoint.steps(tmp_path / "latest" / "checkpoints")
    assert stays.poll() is None
    back = start()
    output, _ = back.communicate(timeout=90)
    rest, _ = stays.communicate(timeout=90)
    assert (stays.returncode, back.returncode) == (0, 0), rest + output
    assert f"step {saved}/12  resuming from the checkpoint" in rest + output
    assert losses(tmp_path) == undisturbed


def test_a_rank_that_is_killed_alone_on_its_machine_is_named_by_those_who_lost_it(text, tmp_path):
    """Two torchruns, each with one rank: no other rank sees in /proc that it has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    job = ["-m", "tests.survival.job", "SIGKILL", "1", str(tmp_path / "time"), *arguments(tmp_path, text, "processes=auto")]
    command = [sys.executable, "-m", *nodes, "--rdzv-endpoint", f"localhost:{port}", *job]
    both = [
        subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [node.communicate(timeout=90)[0] for node in both]
    assert all(node.returncode for node in both)
    (lost,) = re.findall(r"error: (rank 1 \(pid \d+ on .+\) has ended, or its machine is lost; last heartbeat at .+)", "".join(outputs))
    assert "rank 0 (pid" in lost


def test_a_job_that_is_suspended_as_a_whole_goes_on(everything, text, undisturbed, tmp_path):
    """As by a scheduler, for longer than its heartbeat."""
    if not everything:
        pytest.skip("takes half a minute: --matrix")
    command = [*LAUNCHERS["torchrun"], "-m", "tests.survival.slow", *arguments(tmp_path, text, f"heartbeat={SHORT}")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if "step 2/12  loss" in line:
            break
    ranks = [int(found) for found in re.findall(r"slow rank \d is (\d+)", output)]
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    time.sleep(SHORT + 4.0)
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    output += process.stdout.read()
    assert process.wait(60) == 0, output
    assert losses(tmp_path) == undisturbed


def test_a_job_of_which_a_rank_is_killed_starts_anew_and_ends_as_if_nothing_had_happened(text, undisturbed, tmp_path):
    job = arguments(tmp_path, text, "resume=auto", "checkpoint.every=2")
    launcher = [*LAUNCHERS["torchrun"], "--max-restarts", "1"]
    output = finished([*launcher, "-m", "tests.survival.job", "SIGKILL", "1", str(tmp_path / "time"), *job])
    assert re.search(r"rank 1 \(pid \d+ on .+\) ended first, without an error", output)
    assert "resuming from the checkpoint" in output
    assert losses(tmp_path) == undisturbed
    (metrics,) = tmp_path.glob("2*/metrics.jsonl")  # one curve, and each step once
    steps = [record["step"] for record in map(json.loads, metrics.read_text().splitlines()) if "train_loss_bits" in record]
    assert steps == list(range(1, 13))
    assert json.loads((metrics.parent / "summary.json").read_text())["status"] == "finished"
