"""Which rank failed first. Knows nothing of sockets, threads and clocks: it is told what was heard, and when.

an exception      the rank says so itself, before it ends
death             the rank's connection ends, and it has not said goodbye
stopped           the rank is connected, and says nothing
late              the rank speaks, but others are in a collective that it has not begun
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Judge", "Process", "Verdict"]

# An error that follows from another rank's end may be heard before that end is.
SECONDS_FOR_CAUSES = 1.0
# A rank that waits for a stopped rank looks late until the stopped one has been silent for long enough.
SECONDS_BEHIND_SILENCE = 3.0


@dataclass(frozen=True, kw_only=True)
class Process:
    """Of a rank, as messages name it and its neighbours find it.

    Attributes:
        machine: the same for processes that see each other's pid.
        began: tells it from a later process with its pid.
    """

    rank: int
    pid: int
    host: str
    machine: str
    began: int

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why the job ends.

    Attributes:
        rank: that failed first.
        text: a sentence that names it.
        process: is to be ended by its neighbours, as it does not end by itself.
    """

    rank: int
    text: str
    process: Process | None = None


@dataclass
class _Rank:
    process: Process
    heard: float  # when it last spoke
    moved: float  # when it last began a collective
    counts: Mapping[str, int] = field(default_factory=dict)
    place: str = "its start"


@dataclass(frozen=True)
class _Trouble:
    rank: int
    text: str
    follows: bool
    time: float


class Judge:
    """Hears of all ranks and decides.

    Args:
        heartbeat: seconds; None: ranks may be silent or late for as long as they like.
    """

    def __init__(self, heartbeat: float | None) -> None:
        self._heartbeat = heartbeat
        self._ranks: dict[int, _Rank] = {}  # that take part: they have come and not left
        self._troubles: list[_Trouble] = []

    def came(self, process: Process, now: float) -> None:
        self._ranks[process.rank] = _Rank(process=process, heard=now, moved=now)

    def heard(self, rank: int, counts: Mapping[str, int], place: str, now: float) -> None:
        """A rank is alive.

        Args:
            counts: how many collectives it has begun, by their process group.
            place: where it is, for messages.
        """
        known = self._ranks.get(rank)
        if known is not None:
            known.heard, known.place = now, place
            if known.counts != counts:
                known.counts, known.moved = counts, now

    def failed(self, rank: int, error: str, place: str, *, follows: bool, now: float) -> None:
        """A rank has raised an exception.

        Args:
            follows: whether it looks like the consequence of another rank's end.
        """
        known = self._ranks.pop(rank, None)
        if known is not None:
            text = f"{known.process} failed first, at {place}: {error}"
            self._troubles.append(_Trouble(rank, text, follows, now))

    def gone(self, rank: int, now: float) -> None:
        """A rank's connection has ended."""
        known = self._ranks.pop(rank, None)
        if known is not None:
            text = f"{known.process} ended first, without a word, at {known.place}: it was killed, crashed, or left by os._exit"
            self._troubles.append(_Trouble(rank, text, follows=False, time=now))

    def left(self, rank: int) -> None:
        """A rank has done all its work."""
        self._ranks.pop(rank, None)

    def verdict(self, now: float) -> Verdict | None:
        """What ends the job, if anything does."""
        causes = [trouble for trouble in self._troubles if not trouble.follows]
        if not causes and self._troubles and now - self._troubles[0].time >= SECONDS_FOR_CAUSES:
            causes = self._troubles
        if causes:
            return Verdict(rank=causes[0].rank, text=causes[0].text)
        return self._silent(now) or self._late(now)

    def _silent(self, now: float) -> Verdict | None:
        if self._heartbeat is None:
            return None
        for rank, known in sorted(self._ranks.items(), key=lambda item: item[1].heard):
            silence = now - known.heard
            if silence >= self._heartbeat:
                text = f"{known.process} has not answered for {silence:.0f} s, at {known.place}: it is stopped, or its machine is"
                return Verdict(rank=rank, text=text, process=known.process)
        return None

    def _late(self, now: float) -> Verdict | None:
        if self._heartbeat is None or any(now - known.heard > SECONDS_BEHIND_SILENCE for known in self._ranks.values()):
            return None
        for rank, known in sorted(self._ranks.items(), key=lambda item: item[1].moved):
            waited = now - known.moved
            # A rank that waits in one group's collective is behind in another's: who is to blame is ahead of nobody.
            if waited >= self._heartbeat and self._is_behind(rank) and not self._is_ahead(rank):
                text = f"{known.process} is late: others have waited for it for {waited:.0f} s, at {known.place}"
                return Verdict(rank=rank, text=text, process=known.process)
        return None

    def _is_behind(self, rank: int) -> bool:
        return any(self._leads(other, self._ranks[rank]) for other in self._others(rank))

    def _is_ahead(self, rank: int) -> bool:
        return any(self._leads(self._ranks[rank], other) for other in self._others(rank))

    def _others(self, rank: int) -> list[_Rank]:
        return [known for other, known in self._ranks.items() if other != rank]

    @staticmethod
    def _leads(one: _Rank, other: _Rank) -> bool:
        """Whether one has begun a collective that the other takes part in and has not begun."""
        return any(count > other.counts[group] for group, count in one.counts.items() if group in other.counts)
