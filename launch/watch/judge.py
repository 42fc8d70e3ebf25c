"""Which rank failed first. Knows nothing of sockets, threads and clocks: it is told what was heard, and when.

an exception      the rank says so itself, before it ends
death             the rank's connection ends, and it has not said goodbye
stopped           the rank is connected, and says nothing
late              the rank speaks, but others are in a collective that it has not begun
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Judge", "Position", "Process", "Verdict"]

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


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a rank is.

    Attributes:
        step: counts from 1; 0 before the first.
        begun: how many collectives it has begun in this step, by process group.
        before: how many in the step before.
        place: for messages.
        patient: whether it may take its time, as while saving.
    """

    step: int = 0
    begun: Mapping[str, int] = field(default_factory=dict)
    before: Mapping[str, int] = field(default_factory=dict)
    place: str = "its start"
    patient: bool = False

    def waits_for(self, other: Position) -> bool:
        """Whether this rank is in something that the other takes part in and has not begun."""
        if self.step != other.step:
            return self.step > other.step
        alike = {group for group in self.begun.keys() & other.begun if self.before.get(group) == other.before.get(group)}
        return any(self.begun[group] > other.begun[group] for group in alike)

    def is_as_far_as(self, other: Position) -> bool:
        return (self.step, self.begun) == (other.step, other.begun)


@dataclass
class _Rank:
    process: Process
    heard: float  # when it last spoke
    moved: float  # when it last began a step or a collective
    position: Position = field(default_factory=Position)


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
        world_size: how many ranks are going to come, from `now` on.
    """

    def __init__(self, heartbeat: float | None, world_size: int, now: float) -> None:
        self._heartbeat = heartbeat
        self._awaited = set(range(world_size))
        self._began = now
        self._ranks: dict[int, _Rank] = {}  # that take part: they have come and not left
        self._troubles: list[_Trouble] = []

    @property
    def is_over(self) -> bool:
        """Whether all ranks have come and left."""
        return not (self._awaited or self._ranks)

    def came(self, process: Process, now: float) -> None:
        self._awaited.discard(process.rank)
        self._ranks[process.rank] = _Rank(process=process, heard=now, moved=now)

    def heard(self, rank: int, position: Position, now: float) -> None:
        """A rank is alive."""
        known = self._ranks.get(rank)
        if known is not None:
            if not position.is_as_far_as(known.position):
                known.moved = now
            known.heard, known.position = now, position

    def slept(self, seconds: float) -> None:
        """Nobody has listened for so long, as when the machine was suspended: ranks may have spoken and moved meanwhile."""
        self._began += seconds
        for known in self._ranks.values():
            known.heard += seconds
            known.moved += seconds

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
            text = f"{known.process} ended first, without a word, at {known.position.place}: it was killed, crashed, or left by os._exit"
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
        if self._awaited and now - self._began >= self._heartbeat:
            rank = min(self._awaited)
            return Verdict(rank=rank, text=f"rank {rank} met the others, and has not been heard of for {now - self._began:.0f} s")
        for rank, known in sorted(self._ranks.items(), key=lambda item: item[1].heard):
            silence = now - known.heard
            if silence >= self._heartbeat:
                text = f"{known.process} has not answered for {silence:.0f} s, at {known.position.place}: it is stopped, or its machine is"
                return Verdict(rank=rank, text=text, process=known.process)
        return None

    def _late(self, now: float) -> Verdict | None:
        everyone = self._ranks.values()
        if self._heartbeat is None or any(known.position.patient or now - known.heard > SECONDS_BEHIND_SILENCE for known in everyone):
            return None
        for rank, known in sorted(self._ranks.items(), key=lambda item: item[1].moved):
            waited = now - known.moved
            if waited < self._heartbeat:
                continue
            others = [other.position for other in everyone if other is not known]
            # A rank that waits for another keeps others waiting, too: who is to blame waits for nobody.
            if any(other.waits_for(known.position) for other in others) and not any(known.position.waits_for(other) for other in others):
                text = f"{known.process} is late: others have waited for it for {waited:.0f} s, at {known.position.place}"
                return Verdict(rank=rank, text=text, process=known.process)
        return None
