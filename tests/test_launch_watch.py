"""Which rank failed first: what the judge decides, and that everyone hears of it."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest

from launch.meeting import Venue, alone
from launch.watch import CONSEQUENCE, Watch
from launch.watch.hub import Hub
from launch.watch.judge import Judge, Process
from launch.watch.member import Member, this_process

HEARTBEAT = 20.0


def process(rank: int) -> Process:
    return Process(rank=rank, pid=100 + rank, host=f"node{rank // 2}", machine=f"m{rank // 2}", began=1)


def judge(ranks: int = 3, heartbeat: float | None = HEARTBEAT) -> Judge:
    made = Judge(heartbeat)
    for rank in range(ranks):
        made.came(process(rank), 0.0)
    return made


def beat(made: Judge, now: float, counts: dict[int, dict[str, int]]) -> None:
    for rank, groups in counts.items():
        made.heard(rank, groups, f"step {groups.get('0', 0)}", now)


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
    made = judge()
    for second in range(30):
        beat(made, float(second), {0: {"0": second}, 2: {"0": second}})
    verdict = made.verdict(HEARTBEAT + 0.1)
    assert verdict is not None
    assert (verdict.rank, verdict.process) == (1, process(1))
    assert "has not answered for 20 s" in verdict.text
    assert judge(heartbeat=None).verdict(1e6) is None


def test_a_late_rank_is_the_one_that_others_wait_for():
    """Ranks 0 and 2 have begun a collective that rank 1 has not. Before the heartbeat has passed, nobody is late."""
    made = judge()
    beat(made, 1.0, {0: {"0": 5}, 1: {"0": 5}, 2: {"0": 5}})
    for second in range(2, 23):
        beat(made, float(second), {0: {"0": 6}, 1: {"0": 5}, 2: {"0": 6}})
        verdict = made.verdict(float(second))
        assert (verdict is None) == (second < 21), second
    assert verdict is not None
    assert verdict.rank == 1
    assert verdict.text.startswith("rank 1 (pid 101 on node0) is late: others have waited for it for 2")
    assert verdict.text.endswith("at step 5")


def test_a_rank_that_waits_for_a_late_one_is_not_blamed():
    """Rank 0 waits for rank 1 in one group, and so keeps rank 2 waiting in another."""
    made = judge()
    for second in range(22):
        beat(made, float(second), {0: {"a": 6, "b": 3}, 1: {"a": 5}, 2: {"b": 4}})
    verdict = made.verdict(21.5)
    assert verdict is not None
    assert verdict.rank == 1


def test_ranks_that_are_all_slow_are_not_late():
    """As when all compile; nor those that have done more in groups that the others are not in."""
    made = judge()
    for second in range(100):
        beat(made, float(second), {0: {"0": 5, "first stage": 90}, 1: {"0": 5, "second stage": 10}, 2: {"0": 5}})
        assert made.verdict(float(second)) is None


def test_who_waits_for_a_stopped_rank_is_not_late():
    """Rank 0 stopped moving before rank 2 fell silent, and it is behind rank 1 in a group."""
    made = judge()
    beat(made, 0.0, {0: {"0": 5, "b": 1}, 1: {"b": 2}, 2: {"0": 4}})
    for second in range(1, 30):
        beat(made, float(second), {0: {"0": 5, "b": 1}, 1: {"b": 2}} | ({2: {"0": 4}} if second < 5 else {}))
        verdict = made.verdict(float(second))
        if verdict is not None:
            break
    assert verdict is not None
    assert (verdict.rank, second) == (2, 24)


def test_who_has_left_is_neither_silent_nor_dead():
    made = judge()
    made.left(1)
    made.gone(1, 2.0)
    for second in range(100):
        beat(made, float(second), {0: {"0": 1}, 2: {"0": 1}})
        assert made.verdict(float(second)) is None


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

    def __init__(self, heartbeat: float | None) -> None:
        self.hub = Hub(Judge(heartbeat), "secret")
        self.verdicts: dict[int, Any] = {}
        self.counts = {rank: {"0": 1} for rank in range(3)}
        self.members = [self._member(rank, heartbeat) for rank in range(3)]

    def _member(self, rank: int, heartbeat: float | None) -> Member:
        own = this_process(rank)
        address = ("127.0.0.1", self.hub.port)
        position = lambda: (self.counts[rank], "step 3")  # noqa: E731
        return Member(address, "secret", own, this_process(0), heartbeat, position, lambda found: self.verdicts.update({rank: found}))

    def wait(self, ranks: int) -> dict[int, Any]:
        until = time.monotonic() + 10
        while len(self.verdicts) < ranks and time.monotonic() < until:
            time.sleep(0.02)
        return self.verdicts


def test_every_rank_hears_the_first_cause_after_rank_0s_log_has_it(capfd):
    ranks = Ranks(HEARTBEAT)
    ranks.members[1].report("ValueError: bad", "step 3", follows=False)
    found = ranks.wait(3)
    assert {verdict.text for verdict in found.values()} == {f"{this_process(1)} failed first, at step 3: ValueError: bad"}
    assert capfd.readouterr().err.count("failed first") == 1
    ranks.hub.close()


def test_a_rank_whose_connection_ends_has_died_and_one_that_has_said_goodbye_has_not():
    ranks = Ranks(HEARTBEAT)
    ranks.members[2].leave()
    time.sleep(0.5)
    assert not ranks.verdicts
    ranks.members[1]._line._socket.shutdown(socket.SHUT_RDWR)
    assert "rank 1" in ranks.wait(1)[0].text
    assert "ended first" in ranks.verdicts[0].text
    ranks.hub.close()


def test_a_job_that_ends_well_ends_without_a_word_and_without_waiting(capfd):
    ranks = Ranks(HEARTBEAT)
    started = time.monotonic()
    for member in reversed(ranks.members):
        member.leave()
    ranks.hub.close()
    assert time.monotonic() - started < 1.0
    assert not ranks.verdicts
    assert capfd.readouterr().err == ""
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("watch")]


def test_strangers_are_not_heard():
    ranks = Ranks(HEARTBEAT)
    with socket.create_connection(("127.0.0.1", ranks.hub.port)) as stranger:
        stranger.sendall(json.dumps({"secret": "guess", "process": vars(process(1))}).encode() + b"\n")
        stranger.sendall(b'{"failed": "all is lost", "place": "", "follows": false}\n')
        stranger.settimeout(5)
        while stranger.recv(1000):  # until it is hung up on
            pass
    with socket.create_connection(("127.0.0.1", ranks.hub.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    time.sleep(0.5)
    assert not ranks.verdicts
    for member in ranks.members:
        member.leave()
    ranks.hub.close()


def test_a_process_that_is_alone_is_not_watched():
    venue: Venue = alone()
    with Watch(venue, rank=0, world_size=1, heartbeat=HEARTBEAT) as watch:
        watch.step = 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("watch")]
