"""Hang detection: find a rank that sends no heartbeats, or makes no progress while others wait for it.

It uses no store, thread or clock: its input is heartbeats and the times at which they were read. Other failures need no detection: a rank
that fails, or sees another process of its launcher end, writes the verdict itself (`heartbeats.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["HangDetector", "Heartbeat", "Verdict"]

# While a rank's heartbeats are missing for longer than this, no rank is reported for lack of progress: a rank that waits for a stopped
# rank makes no progress either.
SECONDS_FOR_MISSED_HEARTBEATS = 3.0


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """A record that each rank writes to the store once a second."""

    rank: int
    pid: int  # for messages only; no process is signalled because of it
    host: str
    number: int  # counts heartbeats, so that each differs from the one before
    step: int = 0  # current step, from 1; 0 before the first
    begun: Mapping[str, int] = field(default_factory=dict)  # collectives begun in this step, by process group
    before: Mapping[str, int] = field(default_factory=dict)  # collectives begun in the step before
    location: str = "its start"  # step and line of code, for messages
    has_no_limit: bool = False  # the rank may keep others waiting, as while it saves
    has_left: bool = False  # the rank has done all its work

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @classmethod
    def from_json(cls, rank: int, text: bytes) -> Heartbeat | None:
        """Parse a rank's heartbeat; None if it is missing or malformed: any process may write to the store."""
        try:
            beat = cls(**json.loads(text))
            numbers = (beat.pid, beat.step, *beat.begun.values(), *beat.before.values())
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None
        return beat if beat.rank == rank and all(type(number) is int for number in numbers) else None

    def waits_for(self, other: Heartbeat) -> bool:
        """Return whether this rank is in a later step, or in a collective that the other rank has not begun."""
        if self.step != other.step:
            return self.step > other.step
        alike = {group for group in self.begun.keys() & other.begun if self.before.get(group) == other.before.get(group)}
        return any(self.begun[group] > other.begun[group] for group in alike)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The reason why the job ends; the same on all ranks."""

    rank: int  # the rank that failed first
    who: str  # subject of the message
    what: str  # rest of the message
    shared: str = ""  # key of the counter of ranks that failed with the same error; "" if the cause is not an error
    hangs: bool = False  # the rank may not end by itself

    def text(self, alike: int) -> str:
        """Return the message. It names no rank if `alike`, the number of ranks with the same error, is more than one."""
        if not self.shared:
            return f"{self.who} {self.what}"
        return f"{alike} ranks failed with the same error, {self.what}" if alike > 1 else f"{self.who} failed first, {self.what}"


@dataclass
class _Rank:
    seen: float  # time at which the rank's heartbeat last changed
    moved: float  # time at which the rank last began a step or a collective
    last: Heartbeat | None = None  # the last heartbeat


class HangDetector:
    """Finds ranks that hang by their heartbeats. Times are in seconds.

    Args:
        limit: seconds without a heartbeat, or without progress while others wait, after which a rank is taken to hang; None: no limit.
        ranks: the ranks to observe.
        now: the time at which observation begins.
    """

    def __init__(self, limit: float | None, ranks: Iterable[int], now: float) -> None:
        self._limit = float("inf") if limit is None else limit
        self._ranks = {rank: _Rank(now, now) for rank in ranks}  # ranks that have not left

    @property
    def is_over(self) -> bool:
        """Whether all ranks have left."""
        return not self._ranks

    def read(self, rank: int, heartbeat: Heartbeat | None, now: float) -> None:
        """Record a rank's heartbeat, as read from the store at the time `now`. An unchanged heartbeat is ignored."""
        state = self._ranks.get(rank)
        if state is None or heartbeat is None or heartbeat == state.last:
            return
        if state.last is None or (heartbeat.step, heartbeat.begun) != (state.last.step, state.last.begun):
            state.moved = now
        state.seen, state.last = now, heartbeat
        if heartbeat.has_left:
            del self._ranks[rank]

    def seconds_since_heartbeat(self, now: float) -> dict[int, float]:
        """Return the seconds since each rank's last new heartbeat, except for ranks that have left. Any thread may call it."""
        return {rank: now - state.seen for rank, state in self._ranks.copy().items()}  # a copy: another thread removes ranks that leave

    def slept(self, seconds: float) -> None:
        """Do not count a time in which nothing was read, as when the machine was suspended: ranks may have made progress in it."""
        for state in self._ranks.values():
            state.seen += seconds
            state.moved += seconds

    def verdict(self, now: float) -> Verdict | None:
        """Return a verdict on a rank that hangs at the time `now`; None if no rank does."""
        return self._without_heartbeat(now) or self._without_progress(now)

    def _without_heartbeat(self, now: float) -> Verdict | None:
        rank, state = min(self._ranks.items(), key=lambda item: item[1].seen, default=(0, None))
        if state is None or (seconds := now - state.seen) < self._limit:
            return None
        if state.last is None:
            return Verdict(rank=rank, who=f"rank {rank}", what=f"joined the rendezvous, but has sent no heartbeat for {seconds:.0f} s")
        what = f"has sent no heartbeat for {seconds:.0f} s: it is stopped or holds Python's lock, or its machine is lost"
        return Verdict(rank=rank, who=str(state.last), what=f"{what}. Last heartbeat at {state.last.location}", hangs=True)

    def _without_progress(self, now: float) -> Verdict | None:
        last = {rank: state.last for rank, state in self._ranks.items() if state.last is not None}
        is_missed = any(now - state.seen > SECONDS_FOR_MISSED_HEARTBEATS for state in self._ranks.values())
        if is_missed or any(heartbeat.has_no_limit for heartbeat in last.values()):
            return None
        for rank, heartbeat in sorted(last.items(), key=lambda item: self._ranks[item[0]].moved):
            if (seconds := now - self._ranks[rank].moved) < self._limit:
                break
            # A rank that waits for another keeps others waiting, too. The cause is the rank that waits for no other.
            is_waiting = any(heartbeat.waits_for(other) for other in last.values())
            if not is_waiting and any(other.waits_for(heartbeat) for other in last.values()):
                what = f"has made no progress for {seconds:.0f} s while others wait for it, at {heartbeat.location}"
                return Verdict(rank=rank, who=str(heartbeat), what=what, hangs=True)
        return None
