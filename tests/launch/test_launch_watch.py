"""Which rank failed first: the hang detector's verdicts, and that a forged entry in the store can do no more than end the job."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from launch import rendezvous, threads
from launch.launchers import RankInfo
from launch.rendezvous import RendezvousStore
from launch.watch import CONSEQUENCE, Watch, heartbeats
from launch.watch.hang_detector import HangDetector, Heartbeat, Verdict
from launch.watch.heartbeats import HeartbeatExchange
from launch.watch.siblings import Sibling, siblings, wait_for_exit

HEARTBEAT = 20.0
SOON = 5.0  # seconds in which a failure or a death ends a job
ROOT = Path(__file__).parents[2]


def detector(ranks: int = 3, heartbeat: float | None = HEARTBEAT) -> HangDetector:
    made = HangDetector(heartbeat, range(ranks), 0.0)
    for rank in range(ranks):
        made.read(rank, at(0).of(rank, 0), 0.0)
    return made


class at:  # noqa: N801
    """Where a rank is."""

    def __init__(self, step: int = 5, /, before: dict[str, int] | None = None, *, has_no_limit: bool = False, **begun: int) -> None:
        self._fields: dict[str, Any] = {"step": step, "begun": begun, "before": before or {}}
        self._fields |= {"location": f"step {step}", "has_no_limit": has_no_limit}

    def of(self, rank: int, number: int, **more: Any) -> Heartbeat:
        return Heartbeat(**({"rank": rank, "pid": 100 + rank, "host": f"node{rank // 2}", "number": number} | self._fields | more))


def watched(made: HangDetector, places: dict[int, at], seconds: int = 40) -> tuple[Verdict | None, int]:
    """The verdict on ranks that stay where they are, and after how many seconds."""
    for second in range(1, seconds):
        for rank, place in places.items():
            made.read(rank, place.of(rank, second), float(second))
        verdict = made.verdict(float(second))
        if verdict is not None:
            return verdict, second
    return None, seconds


# --------------------------------------------------------------------------------------------------------------- hang detection


def test_a_rank_without_heartbeats_is_named_with_the_location_of_its_last():
    verdict, second = watched(detector(), {0: at(), 2: at()})
    assert verdict is not None
    assert (verdict.rank, verdict.hangs, second) == (1, True, 20)
    assert verdict.text(1).startswith("rank 1 (pid 101 on node0) has sent no heartbeat for 20 s: it is stopped or holds Python's lock")
    assert verdict.text(1).endswith("Last heartbeat at step 0")


def test_without_a_limit_no_rank_hangs():
    assert watched(detector(heartbeat=None), {0: at()}) == (None, 40)


def test_a_heartbeat_that_does_not_change_is_none():
    """The store keeps the last one for ever."""
    made = detector()
    for second in range(1, 25):
        made.read(0, at().of(0, second), float(second))
        made.read(1, at().of(1, 1), float(second))
        made.read(2, at().of(2, second), float(second))
    verdict = made.verdict(24.0)
    assert verdict is not None
    assert verdict.rank == 1


def test_the_seconds_since_each_ranks_heartbeat_are_known_but_for_ranks_that_have_left():
    made = detector()
    made.read(0, at().of(0, 1), 5.0)
    made.read(1, at().of(1, 1, has_left=True), 5.0)
    assert made.seconds_since_heartbeat(8.0) == {0: 3.0, 2: 8.0}


def test_the_seconds_since_a_heartbeat_leave_out_those_in_which_the_job_was_suspended():
    made = detector()
    made.slept(2.0)
    assert made.seconds_since_heartbeat(8.0) == {0: 6.0, 1: 6.0, 2: 6.0}


def test_a_process_that_is_alone_has_always_just_sent_a_heartbeat():
    assert Watch().seconds_since_heartbeat() == {0: 0.0}


def test_a_rank_that_never_comes_is_named():
    verdict, second = watched(HangDetector(HEARTBEAT, range(2), 0.0), {0: at()})
    assert verdict is not None
    assert (verdict.rank, verdict.hangs, second) == (1, False, 20)
    assert verdict.text(1) == "rank 1 joined the rendezvous, but has sent no heartbeat for 20 s"


def test_a_rank_hangs_that_others_wait_for():
    """Ranks 0 and 2 have begun a collective that rank 1 has not."""
    verdict, second = watched(detector(), {0: at(a=6), 1: at(a=5), 2: at(a=6)})
    assert verdict is not None
    assert (verdict.rank, second) == (1, 21)
    assert verdict.text(1) == "rank 1 (pid 101 on node0) has made no progress for 20 s while others wait for it, at step 5"


def test_a_rank_that_is_a_step_behind_others_hangs_whatever_it_has_begun():
    verdict, _ = watched(detector(), {0: at(6), 1: at(6), 2: at(5, a=9)})
    assert verdict is not None
    assert verdict.rank == 2


def test_a_rank_that_waits_for_one_that_hangs_is_not_blamed():
    """Rank 0 waits for rank 1 in one group, and so keeps rank 2 waiting in another."""
    verdict, _ = watched(detector(), {0: at(a=6, b=3), 1: at(a=5), 2: at(b=4)})
    assert verdict is not None
    assert verdict.rank == 1


@pytest.mark.parametrize(
    "places",
    [
        {0: at(a=5, first=90), 1: at(a=5, second=10), 2: at(a=5)},  # as when all compile; each has groups of its own
        {0: at(5, {"a": 7}, a=5), 1: at(5, {"a": 9}, a=7), 2: at(5, {"a": 7}, a=5)},  # sends and receives of some ranks count too
        {0: at(a=6), 1: at(a=5, has_no_limit=True), 2: at(a=6)},  # rank 1 writes a checkpoint for which the others wait
    ],
)
def test_ranks_that_are_slow_together_or_have_no_time_limit_do_not_hang(places):
    assert watched(detector(), places, 100) == (None, 100)


def test_a_rank_that_waits_for_a_stopped_rank_does_not_hang():
    """Rank 0 made no progress before rank 2's heartbeats ended, and rank 1 waits for it."""
    made = detector()
    for second in range(1, 30):
        for rank, place in {0: at(a=5, b=1), 1: at(b=2), 2: at(a=4)}.items():
            if rank < 2 or second < 5:
                made.read(rank, place.of(rank, second), float(second))
        verdict = made.verdict(float(second))
        if verdict is not None:
            break
    assert verdict is not None
    assert (verdict.rank, second) == (2, 24)


def test_a_job_that_was_suspended_as_a_whole_goes_on():
    """As by a scheduler, or with its virtual machine."""
    made = detector()
    for rank in range(3):
        made.read(rank, at(a=5).of(rank, 1), 1.0)
    made.slept(600.0)
    assert made.verdict(602.0) is None
    verdict, second = watched(made, {0: at(a=6), 1: at(a=6)}, 700)
    assert verdict is not None
    assert second == 621


def test_a_rank_that_has_left_need_send_no_heartbeats():
    made = detector()
    made.read(1, at().of(1, 1, has_left=True), 1.0)
    assert watched(made, {0: at(a=1), 2: at(a=1)}) == (None, 40)


def test_all_is_over_once_every_rank_has_left():
    made = detector()
    for rank in range(3):
        assert not made.is_over
        made.read(rank, at().of(rank, 99, has_left=True), 40.0)
    assert made.is_over


@pytest.mark.parametrize(
    ("alike", "text"),
    [
        (1, "rank 0 (pid 1 on a) failed first, at step 3: ValueError: bad"),
        (8, "8 ranks failed with the same error, at step 3: ValueError: bad"),  # nobody is blamed
    ],
)
def test_a_rank_is_blamed_for_an_error_only_if_no_other_has_it(alike, text):
    verdict = Verdict(rank=0, who="rank 0 (pid 1 on a)", what="at step 3: ValueError: bad", shared="same/1")
    assert verdict.text(alike) == text


@pytest.mark.parametrize(
    "nonsense",
    [
        b"",
        b"1",
        b"[]",
        b"[" * 100_000,
        b"\xff\xfe",
        b"{}",
        json.dumps(asdict(at().of(2, 1))).encode(),  # of another rank
        json.dumps(asdict(at().of(1, 1, begun={"a": "many"}))).encode(),
        json.dumps(asdict(at().of(1, 1, begun=[3]))).encode(),
        json.dumps(asdict(at().of(1, 1, step="last"))).encode(),
    ],
)
def test_text_that_is_no_heartbeat_is_not_read(nonsense):
    assert Heartbeat.from_json(1, nonsense) is None


def test_a_heartbeat_is_read_as_it_was_written():
    heartbeat = at(a=3).of(1, 1)
    assert Heartbeat.from_json(1, json.dumps(asdict(heartbeat)).encode()) == heartbeat


@pytest.mark.parametrize(
    ("error", "follows"),
    [
        ("RuntimeError: [../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2093", True),
        ("RuntimeError: Timed out waiting 300000ms for recv operation to complete", True),
        ("torch.distributed.DistBackendError: NCCL error: remote process exited or there was a network error", True),
        ("torch.distributed.DistNetworkError: failed to recv, got 0 bytes", True),
        ("RuntimeError: CUDA out of memory", False),
        ("RuntimeError: mat1 and mat2 shapes cannot be multiplied", False),
        ("OSError: [Errno 28] No space left on device", False),
    ],
)
def test_errors_that_follow_from_another_ranks_end_are_known(error, follows):
    assert (CONSEQUENCE.search(error) is not None) == follows


# ------------------------------------------------------------------------------------------------------------------ over a store


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What would have ended this process, by the name of the thread. Waits until no watch is left."""
    names: list[str] = []
    monkeypatch.setattr(heartbeats, "end", lambda: names.append(threading.current_thread().name))
    yield names
    until = time.monotonic() + 10.0
    while left := [thread.name for thread in threading.enumerate() if thread.name.startswith("watch")]:
        assert time.monotonic() < until, left
        time.sleep(0.02)


class Ranks:
    """Three ranks over one store, in threads of this process.

    Args:
        ends: where it is written down that one would end.
        heartbeat: of all.
        others: what a rank sees of other processes.
        absent: ranks that are not there.
    """

    def __init__(
        self,
        ends: list[str],
        store: Store | None = None,
        heartbeat: float | None = HEARTBEAT,
        others: dict[int, list[Sibling]] | None = None,
        absent: tuple[int, ...] = (),
    ) -> None:
        self.store = store or HashStore()
        self.ends = ends
        self.stopped: set[int] = set()
        self.pids = dict.fromkeys(range(3), os.getpid())
        self.all = {
            rank: HeartbeatExchange(
                self.store, RankInfo(rank=rank, world_size=3), heartbeat, (others or {}).get(rank, []), self._maker(rank)
            )
            for rank in range(3)
            if rank not in absent
        }

    def _maker(self, rank: int) -> Any:
        def make(number: int, has_left: bool) -> Heartbeat:
            if rank in self.stopped:
                number = 1
            return at(6, a=number).of(rank, number, pid=self.pids[rank], has_left=has_left)

        return make

    def wait(self, seconds: float = SOON) -> list[str]:
        """The verdicts of all ranks that are there, once all have ended."""
        until = time.monotonic() + seconds
        while (len(self.ends) < len(self.all) or self._undecided()) and time.monotonic() < until:
            time.sleep(0.02)
        assert len(self.ends) >= len(self.all)
        return [each._verdict.text(1) for each in self.all.values() if each._verdict is not None]

    def _undecided(self) -> bool:
        return any(each._verdict is None for each in self.all.values())


def fail(ranks: Ranks, rank: int, error: str, *, follows: bool = False) -> None:
    threading.Thread(target=ranks.all[rank].fail, args=(error, "step 3", SOON), kwargs={"follows": follows}).start()


def test_every_rank_ends_by_the_first_cause_which_rank_0s_log_has_once(ends, capfd):
    ranks = Ranks(ends)
    fail(ranks, 1, "ValueError: bad")
    assert ranks.wait() == [f"rank 1 (pid {os.getpid()} on node0) failed first, at step 3: ValueError: bad"] * 3
    told = capfd.readouterr().err
    assert told.count("error: rank 1") == 1
    assert told.index("error: rank 1") < told.index("rank 2 ends: rank 1")


def test_an_error_that_all_ranks_have_is_nobodys(ends, capfd):
    ranks = Ranks(ends)
    for rank in (0, 2, 1):
        fail(ranks, rank, "FloatingPointError: 'w' on 1 rank")
    ranks.wait()
    told = capfd.readouterr().err
    assert "error: 3 ranks failed with the same error, at step 3: FloatingPointError: 'w' on 1 rank" in told
    assert "failed first" not in told


def test_an_error_that_follows_waits_for_its_cause(ends):
    ranks = Ranks(ends)
    fail(ranks, 0, "RuntimeError: Connection closed by peer", follows=True)
    time.sleep(0.5)
    fail(ranks, 2, "ValueError: bad")
    assert {text.partition(" (")[0] for text in ranks.wait()} == {"rank 2"}


def test_the_rank_that_was_lost_is_named_by_those_who_lost_it(ends):
    """It is alone on its machine, where no rank sees its process end."""
    ranks = Ranks(ends)
    time.sleep(0.5)
    ranks.stopped.add(2)
    time.sleep(1.2)  # its last heartbeat
    fail(ranks, 1, "RuntimeError: Connection closed by peer", follows=True)
    fail(ranks, 0, "RuntimeError: Connection reset", follows=True)
    (text,) = set(ranks.wait())
    assert text.startswith(f"rank 2 (pid {os.getpid()} on node1) has ended, or its machine is lost; last heartbeat at step 6. rank ")
    assert "lost its connection at step 3: RuntimeError: Connection" in text


def test_an_error_of_the_network_alone_is_the_cause_after_a_while(ends):
    ranks = Ranks(ends)
    fail(ranks, 2, "RuntimeError: Connection closed by peer", follows=True)
    (text,) = set(ranks.wait())
    assert text == f"rank 2 (pid {os.getpid()} on node1) failed first, at step 3: RuntimeError: Connection closed by peer"


def test_rank_0_knows_the_seconds_since_each_ranks_heartbeat(ends):
    def seconds(rank: int) -> dict[int, float]:
        return ranks.all[rank].hang_detector.seconds_since_heartbeat(time.monotonic())

    ranks = Ranks(ends)
    ranks.all[2]._leaving = True
    until = time.monotonic() + SOON
    while set(seconds(0)) != {0, 1} and time.monotonic() < until:
        time.sleep(0.02)
    assert all(each < SOON for each in seconds(0).values())
    assert set(seconds(0)) == {0, 1}
    assert set(seconds(1)) == {0}
    with ThreadPoolExecutor(3) as leaving:
        list(leaving.map(lambda rank: ranks.all[rank].leave(SOON), (0, 2, 1)))
    assert not ranks.ends


def test_a_job_that_ends_well_ends_without_a_word(ends, capfd):
    ranks = Ranks(ends)
    with ThreadPoolExecutor(3) as leaving:
        list(leaving.map(lambda rank: ranks.all[rank].leave(SOON), (0, 2, 1)))
    assert capfd.readouterr().err == ""
    assert not ranks.ends
    time.sleep(0.5)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("watch")]


def test_a_rank_that_leaves_while_its_heartbeat_is_made_reports_that_before_it_ends(ends):
    """Else its end would be taken for a failure."""
    store, made = HashStore(), list[HeartbeatExchange]()

    def make(number: int, has_left: bool) -> Heartbeat:
        made[0]._leaving = True  # as the main thread may at any time
        return at().of(1, number, has_left=has_left)

    store.set("beat/0", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: None)
        made.append(HeartbeatExchange(store, RankInfo(rank=1, world_size=2), HEARTBEAT, [], make))
    assert made[0]._wait_for_verdict() is None
    left = Heartbeat.from_json(1, store.get("beat/1"))
    assert left is not None
    assert left.has_left


def test_rank_0_waits_for_those_who_are_not_done_and_ends_by_their_failure(ends):
    ranks = Ranks(ends)
    ranks.all[1].leave(SOON)
    leaving = threading.Thread(target=ranks.all[0].leave, args=(SOON,))
    leaving.start()
    time.sleep(0.5)
    assert leaving.is_alive()
    fail(ranks, 2, "ValueError: bad")
    del ranks.all[1]
    assert len(ranks.wait()) == 2


def test_a_stopped_rank_0_is_named_by_the_others(ends):
    ranks = Ranks(ends, heartbeat=3.0)
    ranks.stopped.add(0)
    assert all(text.startswith(f"rank 0 (pid {os.getpid()} on node0) has sent no heartbeat for ") for text in ranks.wait(10.0))


@contextmanager
def store_server() -> Iterator[tuple[Store, int]]:
    """A store that a process serves, and its pid."""
    server, port = rendezvous._serve(0)
    try:
        yield PrefixStore("attempt", TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=3), wait_for_workers=False)), server.pid
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(("number", "told"), [(signal.SIGSTOP, "which has not answered for 2 s"), (signal.SIGKILL, "cannot use the store")])
def test_a_store_that_is_lost_ends_the_job(ends, capfd, number, told):
    """A request to a server that is stopped waits for longer than the store's timeout."""
    with store_server() as (store, server):
        ranks = Ranks(ends, store, heartbeat=2.0)
        time.sleep(0.5)
        os.kill(server, number)
        assert all(told in text for text in ranks.wait(10.0))
        assert told in capfd.readouterr().err


STARTS_A_SERVER = """
import time
from launch import rendezvous
server, port = rendezvous._serve(0)
print(port, server.pid, flush=True)
time.sleep(60)
"""


def test_the_store_outlives_the_stop_of_rank_0_and_ends_with_its_end():
    command = [sys.executable, "-c", STARTS_A_SERVER]
    rank_0 = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert rank_0.stdout is not None
    port, server = map(int, rank_0.stdout.readline().split())
    rank_0.send_signal(signal.SIGSTOP)
    store = TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=3), wait_for_workers=False)
    store.set("key", "value")
    assert store.get("key") == b"value"
    rank_0.kill()
    rank_0.wait()
    store.set("key", "the last word")  # the others learn of rank 0's end
    until = time.monotonic() + 10.0
    while Path(f"/proc/{server}").exists() and "(zombie)" not in Path(f"/proc/{server}/status").read_text() and time.monotonic() < until:
        time.sleep(0.1)
    assert time.monotonic() < until


# ------------------------------------------------------------------------------------------------------------------- other processes


@contextmanager
def process(**variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A child of this process."""
    started = subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"]} | variables)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


@contextmanager
def grandchild(**variables: str) -> Iterator[int]:
    """The pid of a process that another one has started."""
    shell = subprocess.Popen(
        ["bash", "-c", "sleep 60 & echo $!; wait"], env={"PATH": os.environ["PATH"]} | variables, stdout=subprocess.PIPE
    )
    assert shell.stdout is not None
    pid = int(shell.stdout.readline())
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        shell.kill()
        shell.wait()


def test_siblings_are_the_ranks_of_the_same_launcher_and_no_other_process():
    with process(SO_RANK="1") as one, process(SO_RANK="2"), process() as other, process(SO_RANK="x"), grandchild(SO_RANK="3") as below:
        found = {sibling.rank: sibling for sibling in siblings(os.getpid(), "SO_RANK") if sibling.pid != below}
        assert found.keys() == {1, 2, 3}  # the shell is a child, too; what it has started is not
        assert found[1].pid == one.pid
        assert other.pid not in {sibling.pid for sibling in found.values()}
        assert below not in {sibling.pid for sibling in siblings(os.getpid(), "SO_RANK")}
    for sibling in found.values():
        os.close(sibling.process)


@pytest.mark.parametrize("launcher", [None, os.getppid()])
def test_without_a_launcher_or_under_another_there_are_no_siblings(launcher):
    with process(SO_RANK="1"):
        assert siblings(launcher, "SO_RANK") == []


def test_the_exit_of_a_sibling_is_seen_before_its_parent_has_waited_for_it():
    with process(SO_RANK="1") as one, process(SO_RANK="2"):
        found = {sibling.rank: sibling for sibling in siblings(os.getpid(), "SO_RANK")}
        assert wait_for_exit(found.values(), 0.0) == []
        one.kill()
        assert wait_for_exit(found.values(), SOON) == [found[1]]
    for sibling in found.values():
        os.close(sibling.process)


def test_a_rank_that_is_killed_is_named_at_once_with_the_location_of_its_last_heartbeat(ends, capfd):
    with process(SO_RANK="1") as dies:
        ranks = Ranks(ends, heartbeat=None, others={0: siblings(os.getpid(), "SO_RANK")})
        ranks.pids[1] = dies.pid
        time.sleep(1.5)
        dies.kill()
        (text,) = set(ranks.wait())
        assert text.startswith(f"rank 1 (pid {dies.pid} on node0) ended first, without an error: it was killed, crashed, or called ")
        assert text.endswith(" Last heartbeat at step 6")
    assert "error: rank 1" in capfd.readouterr().err


def test_a_process_that_an_earlier_attempt_has_left_may_end(ends):
    """As a worker of a data loader that has become a child of the launcher: it has a rank in its environment, too."""
    with process(SO_RANK="1") as dies:
        ranks = Ranks(ends, heartbeat=None, others={0: siblings(os.getpid(), "SO_RANK")})
        time.sleep(0.5)
        dies.kill()
        time.sleep(1.5)
        assert not ranks.ends
        fail(ranks, 1, "ValueError: bad")
        ranks.wait()


@pytest.mark.parametrize("forged", ["beat", "verdict"])
def test_who_writes_to_the_store_can_have_no_process_killed(ends, forged):
    """Not even one of the same user that is named as a rank, whether it has that rank in its environment or not."""
    with process() as bystander, grandchild(RANK="1") as below, process(SO_RANK="1") as stopped:
        ranks = Ranks(ends, heartbeat=3.0, others={0: siblings(os.getpid(), "SO_RANK")}, absent=(1,))
        for pid in (bystander.pid, below):
            ranks.store.set("beat/1", json.dumps(asdict(at().of(1, pid, pid=pid))))
            time.sleep(0.5)
        if forged == "verdict":
            ranks.store.set("verdict", json.dumps(asdict(Verdict(rank=1, who=f"rank 1 (pid {bystander.pid})", what="hangs", hangs=True))))
        assert all(text.startswith("rank 1 (pid ") for text in ranks.wait(10.0))
        assert bystander.poll() is None
        assert Path(f"/proc/{below}").exists()
        assert stopped.wait(SOON) == -signal.SIGKILL  # the launcher's own process of that rank, which does not end by itself


def test_nonsense_in_the_store_ends_the_job_and_does_no_more(ends):
    ranks = Ranks(ends)
    ranks.store.set("verdict", "nonsense")
    assert all("cannot use the store that carries heartbeats" in text for text in ranks.wait())


def listening() -> set[str]:
    """The sockets on which this process listens."""
    own = set()
    for path in Path("/proc/self/fd").iterdir():
        try:
            own.add(os.readlink(path))
        except OSError:  # the folder itself
            continue
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[9] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


@pytest.mark.usefixtures("ends")
def test_a_watch_listens_on_no_socket():
    store = TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=20), wait_for_workers=False)
    before = listening()
    assert len(before) == 1, "torch's own"
    watches = [Watch(RendezvousStore(store=store), RankInfo(rank=rank, world_size=2), heartbeat=HEARTBEAT) for rank in (0, 1)]
    time.sleep(0.5)
    assert listening() == before
    with ThreadPoolExecutor(2) as leaving:
        list(leaving.map(lambda watch: watch.__exit__(None, None, None), watches))


def open_files() -> set[int]:
    listed = os.listdir("/proc/self/fd")  # with the folder's own, which is closed again
    return {int(number) for number in listed if os.path.exists(f"/proc/self/fd/{number}")}


def test_idle_connections_to_the_store_cost_a_rank_no_file(ends):
    with store_server() as (store, _):
        ranks = Ranks(ends, store)
        before = open_files()
        port = store.underlying_store.port
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        time.sleep(0.5)
        assert open_files() - before <= {connection.fileno() for connection in idle}, "beside this test's own"
        fail(ranks, 1, "ValueError: bad")
        assert len(ranks.wait(15.0)) == 3  # torch is busy with so many new connections for 5 s
        for connection in idle:
            connection.close()


# ------------------------------------------------------------------------------------------------------------------- this process


def test_threads_that_a_job_leaves_behind_are_named(monkeypatch):
    monkeypatch.setattr(threads, "SECONDS_FOR_THREADS", 0.1)
    release = threading.Event()
    left = threading.Thread(target=release.wait, name="left-behind")
    left.start()
    with pytest.raises(RuntimeError, match=r"its work is done, but threads .*left-behind"):
        threads.check_none_left()
    release.set()
    left.join()


def test_threads_of_a_pool_end_by_themselves_and_are_not_left_behind():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        assert [name for name in threads._threads_left() if "pytest" not in name] == []


def test_a_process_that_is_alone_is_not_watched():
    before = threading.active_count()
    with Watch() as watch:
        watch.begin_step(3)
        assert threading.active_count() == before


def test_the_location_of_a_rank_is_a_line_of_the_job():
    def work(watch: Watch) -> Heartbeat:
        return watch._heartbeat(7, has_left=False)

    watch = Watch(info=RankInfo(rank=3))
    watch.begin_step(5)
    assert work(watch).location.startswith("step 5, in work (tests/launch/test_launch_watch.py:")


def test_a_heartbeat_differs_from_the_one_before_by_its_number():
    heartbeat = Watch()._heartbeat(7, has_left=False)
    assert replace(heartbeat, number=8) != heartbeat
