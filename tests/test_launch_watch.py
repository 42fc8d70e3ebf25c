"""Which rank failed first: what the judge decides, and that everyone hears of it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from launch import watch as watch_module
from launch.watch import CONSEQUENCE, Watch
from launch.watch.hub import Hub
from launch.watch.judge import Judge, Position, Process, Verdict
from launch.watch.member import Member, this_process

HEARTBEAT = 20.0


def process(rank: int) -> Process:
    return Process(rank=rank, pid=100 + rank, host=f"node{rank // 2}", machine=f"m{rank // 2}", began=1)


def judge(ranks: int = 3, heartbeat: float | None = HEARTBEAT) -> Judge:
    made = Judge(heartbeat, ranks, 0.0)
    for rank in range(ranks):
        made.came(process(rank), 0.0)
    return made


def at(step: int = 5, /, before: dict[str, int] | None = None, *, patient: bool = False, **begun: int) -> Position:
    return Position(step=step, begun=begun, before=before or {}, place=f"step {step}", patient=patient)


def watched(made: Judge, positions: dict[int, Position], seconds: int = 40) -> tuple[Verdict | None, int]:
    """What the judge says when ranks stay where they are, and after how many seconds."""
    for second in range(1, seconds):
        for rank, position in positions.items():
            made.heard(rank, position, float(second))
        verdict = made.verdict(float(second))
        if verdict is not None:
            return verdict, second
    return None, seconds


# ------------------------------------------------------------------------------------------------------------------------- judge


def test_an_exception_is_the_cause_and_named_at_once():
    made = judge()
    made.failed(1, "ValueError: no such thing", "step 7", follows=False, now=5.0)
    made.gone(2, 5.1)
    verdict = made.verdict(5.1)
    assert verdict is not None
    assert verdict.rank == 1
    assert verdict.text == "rank 1 (pid 101 on node0) failed first, at step 7: ValueError: no such thing"
    assert verdict.process is None


def test_errors_of_those_who_lost_a_peer_wait_for_the_peers_own_end():
    """The survivor's error may be heard before the connection of the dead rank ends."""
    made = judge()
    made.failed(0, "RuntimeError: Connection closed by peer", "step 7", follows=True, now=5.0)
    assert made.verdict(5.5) is None
    made.gone(2, 5.6)
    verdict = made.verdict(5.6)
    assert verdict is not None
    assert verdict.rank == 2
    assert "ended first, without a word" in verdict.text


def test_an_error_of_the_network_alone_is_the_cause_after_a_while():
    made = judge()
    made.failed(2, "RuntimeError: Connection closed by peer", "step 7", follows=True, now=5.0)
    made.failed(0, "RuntimeError: Connection closed by peer", "step 7", follows=True, now=5.2)
    assert made.verdict(5.9) is None
    verdict = made.verdict(6.1)
    assert verdict is not None
    assert verdict.rank == 2


def test_a_silent_rank_is_stopped_and_to_be_ended_by_its_neighbours():
    verdict, second = watched(judge(), {0: at(), 2: at()})
    assert verdict is not None
    assert (verdict.rank, verdict.process, second) == (1, process(1), 20)
    assert "has not answered for 20 s" in verdict.text
    assert watched(judge(heartbeat=None), {0: at()}) == (None, 40)


def test_a_rank_that_never_comes_is_named():
    made = Judge(HEARTBEAT, 2, 0.0)
    made.came(process(0), 0.0)
    verdict, second = watched(made, {0: at()})
    assert verdict is not None
    assert (verdict.rank, verdict.process, second) == (1, None, 20)


def test_a_late_rank_is_the_one_that_others_wait_for():
    """Ranks 0 and 2 have begun a collective that rank 1 has not. Before the heartbeat has passed, nobody is late."""
    verdict, second = watched(judge(), {0: at(a=6), 1: at(a=5), 2: at(a=6)})
    assert verdict is not None
    assert (verdict.rank, second) == (1, 21)
    assert verdict.text == "rank 1 (pid 101 on node0) is late: others have waited for it for 20 s, at step 5"


def test_a_rank_that_others_have_left_in_a_step_is_late_whatever_it_has_begun():
    verdict, _ = watched(judge(), {0: at(6), 1: at(6), 2: at(5, a=9)})
    assert verdict is not None
    assert verdict.rank == 2


def test_a_rank_that_waits_for_a_late_one_is_not_blamed():
    """Rank 0 waits for rank 1 in one group, and so keeps rank 2 waiting in another."""
    verdict, _ = watched(judge(), {0: at(a=6, b=3), 1: at(a=5), 2: at(b=4)})
    assert verdict is not None
    assert verdict.rank == 1


@pytest.mark.parametrize(
    "positions",
    [
        {0: at(a=5, first=90), 1: at(a=5, second=10), 2: at(a=5)},  # as when all compile; each has groups of its own
        {0: at(5, {"a": 7}, a=5), 1: at(5, {"a": 9}, a=7), 2: at(5, {"a": 7}, a=5)},  # sends and receives of some ranks count too
        {0: at(a=6), 1: at(a=5, patient=True), 2: at(a=6)},  # rank 1 writes a checkpoint for which the others wait
    ],
)
def test_ranks_that_are_slow_together_or_may_take_their_time_are_not_late(positions):
    assert watched(judge(), positions, 100) == (None, 100)


def test_who_waits_for_a_stopped_rank_is_not_late():
    """Rank 0 stopped moving before rank 2 fell silent, and rank 1 waits for it."""
    made = judge()
    for second in range(1, 30):
        for rank, position in {0: at(a=5, b=1), 1: at(b=2), 2: at(a=4)}.items():
            if rank < 2 or second < 5:
                made.heard(rank, position, float(second))
        verdict = made.verdict(float(second))
        if verdict is not None:
            break
    assert verdict is not None
    assert (verdict.rank, second) == (2, 24)


def test_a_job_that_was_suspended_as_a_whole_goes_on():
    """As by a scheduler, or with its virtual machine."""
    made = judge()
    for rank in range(3):
        made.heard(rank, at(a=5), 1.0)
    made.slept(600.0)
    assert made.verdict(602.0) is None
    verdict, second = watched(made, {0: at(a=6), 1: at(a=6)}, 700)
    assert verdict is not None
    assert second == 621


def test_who_has_left_is_neither_silent_nor_dead():
    made = judge()
    made.left(1)
    made.gone(1, 2.0)
    assert watched(made, {0: at(a=1), 2: at(a=1)}) == (None, 40)
    assert not made.is_over
    made.left(0)
    made.left(2)
    assert made.is_over


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


# ----------------------------------------------------------------------------------------------------------------- over sockets


class Ranks:
    """Three members of one hub, in threads of this process."""

    def __init__(self, heartbeat: float | None = HEARTBEAT) -> None:
        self.hub = Hub(Judge(heartbeat, 3, time.monotonic()), "secret")
        self.verdicts: dict[int, Any] = {}
        self.members = [self._member(rank, heartbeat) for rank in range(3)]

    def _member(self, rank: int, heartbeat: float | None) -> Member:
        def decided(verdict: Verdict) -> None:
            self.verdicts[rank] = verdict

        address = ("127.0.0.1", self.hub.port)
        return Member(address, "secret", this_process(rank), this_process(0), heartbeat, None, at, decided)

    def leave(self) -> None:
        for member in self.members:
            member.leave()
        assert self.hub.close() is None

    def wait(self, ranks: int) -> dict[int, Any]:
        until = time.monotonic() + 10
        while len(self.verdicts) < ranks and time.monotonic() < until:
            time.sleep(0.02)
        return self.verdicts


def test_every_rank_hears_the_first_cause_after_rank_0s_log_has_it(capfd):
    ranks = Ranks()
    ranks.members[1].report("ValueError: bad", "step 3", follows=False)
    found = ranks.wait(3)
    assert {verdict.text for verdict in found.values()} == {f"{this_process(1)} failed first, at step 3: ValueError: bad"}
    assert capfd.readouterr().err.count("failed first") == 1
    ranks.hub.close()


def test_a_rank_whose_connection_ends_has_died_and_one_that_has_said_goodbye_has_not():
    ranks = Ranks()
    ranks.members[2].leave()
    time.sleep(0.5)
    assert not ranks.verdicts
    ranks.members[1]._line._socket.shutdown(socket.SHUT_RDWR)
    assert "rank 1" in ranks.wait(1)[0].text
    assert "ended first" in ranks.verdicts[0].text
    ranks.hub.close()


def test_a_job_that_ends_well_ends_without_a_word(capfd):
    ranks = Ranks()
    for member in reversed(ranks.members):
        member.leave()
    assert ranks.hub.close() is None
    assert not ranks.verdicts
    assert capfd.readouterr().err == ""
    assert not any(member._thread.is_alive() for member in ranks.members)


def test_a_rank_that_dies_after_rank_0_has_done_its_work_is_seen():
    ranks = Ranks()
    ranks.members[0].leave()
    ranks.members[1].leave()
    closing = threading.Timer(0.5, ranks.members[2]._line._socket.shutdown, [socket.SHUT_RDWR])
    closing.start()
    verdict = ranks.hub.close()
    assert verdict is not None
    assert verdict.rank == 2


@pytest.mark.parametrize("family", ["127.0.0.1", "::1"])
@pytest.mark.parametrize(
    "nonsense",
    [
        b'{"secret": "guess", "process": {}}\n{"failed": "all is lost", "place": "", "follows": false}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"1\n",
        b"[" * 100000 + b"\n",
        b'{"secret": "secret", "process": 3}\n',
        b"\xff\xfe\n",
        b"x" * 3_000_000,
    ],
)
def test_strangers_are_not_heard_and_do_no_harm(nonsense, family):
    ranks = Ranks()
    try:
        stranger = socket.create_connection((family, ranks.hub.port))
    except OSError:
        ranks.leave()
        pytest.skip(f"this machine has no {family}")
    with stranger:
        stranger.settimeout(5)
        try:
            stranger.sendall(nonsense)
            while stranger.recv(1000):  # until it is hung up on
                pass
        except ConnectionError:
            pass
    assert ranks.hub._thread.is_alive()
    assert not ranks.verdicts
    ranks.members[1].report("ValueError: bad", "step 3", follows=False)
    assert {verdict.rank for verdict in ranks.wait(3).values()} == {1}  # it hears those whom it should
    ranks.hub.close()


def test_a_forked_child_does_not_hide_the_end_of_its_parent():
    """As a worker of a data loader: it has the parent's connection too."""
    ranks = Ranks()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        line = ranks.members[1]._line
        line._socket.close()  # as the kernel does when the parent is killed
        assert "rank 1" in ranks.wait(1)[0].text
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ranks.hub.close()


def test_threads_that_a_job_leaves_behind_are_named_but_not_those_that_end_by_themselves(monkeypatch):
    monkeypatch.setattr(watch_module, "SECONDS_FOR_THREADS", 0.1)
    release = threading.Event()
    left = threading.Thread(target=release.wait, name="left-behind")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        left.start()
        assert "left-behind" in watch_module._threads_left()
        release.set()
        left.join()
        assert [name for name in watch_module._threads_left() if "pytest" not in name] == []


def test_a_process_that_is_alone_is_not_watched(monkeypatch):
    monkeypatch.setattr(watch_module, "_threads_left", list)  # pytest has one
    before = threading.active_count()
    with Watch() as watch:
        watch.step = 3
        assert threading.active_count() == before
