"""Decides that a rank is stopped or late. Knows nothing of stores, threads and clocks: it is given beats, and when they were read.

A failure or a death needs no judge: whoever fails, or sees that a process of its launcher is gone, gives the verdict itself (`beats.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["Beat", "Judge", "Verdict"]

SECONDS_BEHIND_SILENCE = 3.0  # in which nobody is late: who waits for a stopped rank looks so until that has been silent for long enough


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank writes once a second."""

    rank: int
    pid: int  # for messages; it is never signalled because it stands here
    host: str
    number: int  # counts beats, so that each differs from the one before
    step: int = 0  # from 1; 0 before the first
    begun: Mapping[str, int] = field(default_factory=dict)  # how many collectives in this step, by process group
    before: Mapping[str, int] = field(default_factory=dict)  # and in the step before
    place: str = "its start"  # for messages
    patient: bool = False  # the rank may take its time, as while saving
    has_left: bool = False  # the rank has done all its work

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @classmethod
    def from_json(cls, rank: int, text: bytes) -> Beat | None:
        """A rank's beat; None for anything else: there is none yet, or somebody has written to the store what is none."""
        try:
            beat = cls(**json.loads(text))
            numbers = (beat.pid, beat.step, *beat.begun.values(), *beat.before.values())
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None
        return beat if beat.rank == rank and all(type(number) is int for number in numbers) else None

    def waits_for(self, other: Beat) -> bool:
        """Whether this rank is in something that the other takes part in and has not begun."""
        if self.step != other.step:
            return self.step > other.step
        alike = {group for group in self.begun.keys() & other.begun if self.before.get(group) == other.before.get(group)}
        return any(self.begun[group] > other.begun[group] for group in alike)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why the job ends; the same on all ranks."""

    rank: int  # that failed first
    who: str  # the sentence that says so, in two parts
    what: str
    shared: str = ""  # the counter of ranks that have failed with the same error; "" where this is no error
    hangs: bool = False  # the rank may not end by itself

    def text(self, alike: int) -> str:
        """The sentence, in which nobody is blamed for an error that several ranks have."""
        if not self.shared:
            return f"{self.who} {self.what}"
        return f"{alike} ranks failed with the same error, {self.what}" if alike > 1 else f"{self.who} failed first, {self.what}"


@dataclass
class _Rank:
    seen: float  # when its beat last changed
    moved: float  # when it last began a step or a collective
    beat: Beat | None = None


class Judge:
    """Reads the beats of some ranks from `now` on and decides. Times are in seconds."""

    def __init__(self, heartbeat: float | None, ranks: Iterable[int], now: float) -> None:
        self._heartbeat = float("inf") if heartbeat is None else heartbeat
        self._ranks = {rank: _Rank(now, now) for rank in ranks}  # that have not left

    @property
    def is_over(self) -> bool:
        """Whether all ranks have left."""
        return not self._ranks

    def read(self, rank: int, beat: Beat | None, now: float) -> None:
        """A rank's beat, as it stands in the store."""
        known = self._ranks.get(rank)
        if known is None or beat is None or beat == known.beat:
            return
        if known.beat is None or (beat.step, beat.begun) != (known.beat.step, known.beat.begun):
            known.moved = now
        known.seen, known.beat = now, beat
        if beat.has_left:
            del self._ranks[rank]

    def silences(self, now: float) -> dict[int, float]:
        """Seconds since a new beat of each rank was read, but for ranks that have left. Any thread may call it."""
        return {rank: now - known.seen for rank, known in self._ranks.copy().items()}  # a copy: another thread removes ranks that leave

    def slept(self, seconds: float) -> None:
        """Nothing was read for so long, as when the machine was suspended: ranks may have beaten and moved meanwhile."""
        for known in self._ranks.values():
            known.seen += seconds
            known.moved += seconds

    def verdict(self, now: float) -> Verdict | None:
        """What ends the job, if anything does."""
        return self._silent(now) or self._late(now)

    def _silent(self, now: float) -> Verdict | None:
        rank, known = min(self._ranks.items(), key=lambda item: item[1].seen, default=(0, None))
        if known is None or (silence := now - known.seen) < self._heartbeat:
            return None
        if known.beat is None:
            return Verdict(rank=rank, who=f"rank {rank}", what=f"met the others, and has not been heard of for {silence:.0f} s")
        what = f"has not answered for {silence:.0f} s: it is stopped or holds Python's lock, or its machine is lost"
        return Verdict(rank=rank, who=str(known.beat), what=f"{what}. Last heard of at {known.beat.place}", hangs=True)

    def _late(self, now: float) -> Verdict | None:
        beats = {rank: known.beat for rank, known in self._ranks.items() if known.beat is not None}
        if any(beat.patient for beat in beats.values()) or any(now - r.seen > SECONDS_BEHIND_SILENCE for r in self._ranks.values()):
            return None
        for rank, beat in sorted(beats.items(), key=lambda item: self._ranks[item[0]].moved):
            if (waited := now - self._ranks[rank].moved) < self._heartbeat:
                break
            # A rank that waits for another keeps others waiting, too: who is to blame waits for nobody.
            if any(other.waits_for(beat) for other in beats.values()) and not any(beat.waits_for(other) for other in beats.values()):
                what = f"is late: others have waited for it for {waited:.0f} s, at {beat.place}"
                return Verdict(rank=rank, who=str(beat), what=what, hangs=True)
        return None
