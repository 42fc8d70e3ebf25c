"""Hang detection: whether a rank sends no heartbeats, or makes no progress while others wait for it.

Independent of stores, threads and clocks: its input is heartbeats and the times at which they were read. A rank that fails, and one that
sees a process of its launcher end, need no detection: they write the verdict themselves (`heartbeats.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["HangDetector", "Heartbeat", "Verdict"]

# While a rank's heartbeats are missing for longer than this, no other is taken for hanging: a rank that waits for a stopped one makes no
# progress either.
SECONDS_FOR_MISSED_HEARTBEATS = 3.0


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """A record that each rank writes to the store once a second."""

    rank: int
    pid: int  # for messages only; no process is signalled because of it
    host: str
    number: int  # counts heartbeats, so that each differs from the one before
    step: int = 0  # from 1; 0 before the first
    begun: Mapping[str, int] = field(default_factory=dict)  # collectives begun in this step, by process group
    before: Mapping[str, int] = field(default_factory=dict)  # collectives begun in the step before
    location: str = "its start"  # step and line of code, for messages
    has_no_limit: bool = False  # the rank may keep others waiting, as while it saves
    has_left: bool = False  # the rank has done all its work

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @classmethod
    def from_json(cls, rank: int, text: bytes) -> Heartbeat | None:
        """Parse a rank's heartbeat; None if there is none yet, or the text is anything else, as any process may write to the store."""
        try:
            beat = cls(**json.loads(text))
            numbers = (beat.pid, beat.step, *beat.begun.values(), *beat.before.values())
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None
        return beat if beat.rank == rank and all(type(number) is int for number in numbers) else None

    def waits_for(self, other: Heartbeat) -> bool:
        """Whether this rank is in a later step, or in a collective that the other rank has not begun."""
        if self.step != other.step:
            return self.step > other.step
        alike = {group for group in self.begun.keys() & other.begun if self.before.get(group) == other.before.get(group)}
        return any(self.begun[group] > other.begun[group] for group in alike)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why the job ends; the same on all ranks."""

    rank: int  # that failed first
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
    seen: float  # when its heartbeat last changed
    moved: float  # when it last began a step or a collective
    last: Heartbeat | None = None


class HangDetector:
    """Finds ranks that hang, from the heartbeats of `ranks` from the time `now` on. Times are in seconds.

    Args:
        limit: seconds without a heartbeat, or without progress while others wait, after which a rank hangs; None: any number.
        ranks: those that are observed.
        now: the time.
    """

    def __init__(self, limit: float | None, ranks: Iterable[int], now: float) -> None:
        self._limit = float("inf") if limit is None else limit
        self._ranks = {rank: _Rank(now, now) for rank in ranks}  # that have not left

    @property
    def is_over(self) -> bool:
        """Whether all ranks have left."""
        return not self._ranks

    def read(self, rank: int, heartbeat: Heartbeat | None, now: float) -> None:
        """Take in the heartbeat that the store holds of a rank at the time `now`; the same one as before counts as none."""
        state = self._ranks.get(rank)
        if state is None or heartbeat is None or heartbeat == state.last:
            return
        if state.last is None or (heartbeat.step, heartbeat.begun) != (state.last.step, state.last.begun):
            state.moved = now
        state.seen, state.last = now, heartbeat
        if heartbeat.has_left:
            del self._ranks[rank]

    def seconds_since_heartbeat(self, now: float) -> dict[int, float]:
        """Return the seconds since a new heartbeat of each rank was read, but for ranks that have left. Any thread may call it."""
        return {rank: now - state.seen for rank, state in self._ranks.copy().items()}  # a copy: another thread removes ranks that leave

    def slept(self, seconds: float) -> None:
        """Leave out a time in which nothing was read, as when the machine was suspended: ranks may have made progress in it."""
        for state in self._ranks.values():
            state.seen += seconds
            state.moved += seconds

    def verdict(self, now: float) -> Verdict | None:
        """Return the rank that hangs at the time `now`, if one does."""
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
            # A rank that waits for another keeps others waiting, too. The cause is the one that waits for none.
            is_waiting = any(heartbeat.waits_for(other) for other in last.values())
            if not is_waiting and any(other.waits_for(heartbeat) for other in last.values()):
                what = f"has made no progress for {seconds:.0f} s while others wait for it, at {heartbeat.location}"
                return Verdict(rank=rank, who=str(heartbeat), what=what, hangs=True)
        return None
