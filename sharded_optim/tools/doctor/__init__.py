"""Whether a machine, or the ranks that torchrun has started on several, can run a training job. `cli/doctor.py` asks and prints.

findings.py    what is found, as data: a Finding, those of a rank, all together
place.py       which of torchrun's ranks this process is
probes.py      what is asked in a process of its own, as it may abort or hang
versions.py    Python, torch, this library, and packages that may be there
devices.py     GPUs, and what communicates
backends.py    which backends run, each stepped and compared with eager
limits.py      shared memory, memory, open files, threads
bandwidth.py   of memory
all_reduce.py  between ranks; pair.py is what each of two processes runs where there are no ranks
storage.py     the folder of checkpoints
ranks.py       what ranks tell each other, and whether they agree

Every rank looks at itself before ranks meet, for a step would communicate in a process group. Then they exchange what they found; what is
measured comes last, by rank 0 or by all together.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace

from sharded_optim.tools.doctor import all_reduce, backends, bandwidth, devices, limits, ranks, storage, versions
from sharded_optim.tools.doctor.findings import Finding, RankReport, Report, Status
from sharded_optim.tools.doctor.place import Place, find_place

__all__ = ["TIMEOUT", "Finding", "RankReport", "Report", "Status", "examine"]

TIMEOUT = 60.0  # seconds: far longer than anything here takes on a machine that is not overloaded


def examine(
    folder: str | os.PathLike[str], *, quick: bool = False, timeout: float = TIMEOUT, tell: Callable[[Report], None] = lambda _: None
) -> bool:
    """Look at this machine. Under torchrun a collective of all ranks.

    Args:
        folder: of checkpoints, on a local or network file system.
        quick: measure nothing that takes seconds.
        timeout: seconds that a rank waits for another, or for a process that it started.
        tell: is given the report, on rank 0, before any rank returns: torchrun ends all ranks when the first ends with a failure.

    Returns:
        Whether there is no problem. The same on all ranks.

    Raises:
        ValueError: the folder is a URL, or torchrun's variables are incomplete.
    """
    place = find_place()
    path = storage.local_path(folder)
    here = _examine_rank(place, path, quick, timeout)
    if place.world_size > 1:
        return ranks.meet(place, here, timeout, lambda group, everyone: _examine_together(group, everyone, path, quick), tell)
    together = () if quick else (all_reduce.examine_pair(timeout),)
    report = Report(ranks=(here if quick else _measured(here, place, path),), together=together)
    tell(report)
    return report.status != "problem"


def _examine_rank(place: Place, folder: str, quick: bool, timeout: float) -> RankReport:
    """Without communication and, but for the backends' tiny steps, without work."""
    # They answer while the rest is looked at, and before other ranks give up. One rank of a machine is enough to try a long import.
    packages = versions.Packages(imports=not quick and place.local_rank == 0, timeout=timeout / 2)
    device = devices.at_hand(place)
    rest = [*devices.examine(device), *backends.examine(device), *limits.examine(place), *storage.examine(folder)]
    findings = (*packages.findings(), *rest)
    return RankReport(rank=place.rank, host=socket.gethostname(), gpu=devices.identity_of(device), findings=findings)


def _measured(here: RankReport, place: Place, folder: str) -> RankReport:
    measured = bandwidth.examine(devices.at_hand(place))
    if not any(each.section == "storage" and each.status == "problem" for each in here.findings):
        measured += storage.measure(folder)
    return replace(here, findings=(*here.findings, *measured))


def _examine_together(meeting: ranks.Meeting, everyone: list[RankReport], folder: str, quick: bool) -> Report:
    together = [*ranks.compare(everyone), ranks.compare_clocks(meeting), ranks.compare_folders(meeting, folder)]
    if not quick:
        if meeting.place.rank == 0:
            everyone[0] = _measured(everyone[0], meeting.place, folder)
        together += all_reduce.examine_ranks(everyone, devices.at_hand(meeting.place), meeting.timeout)
    return Report(ranks=tuple(everyone), together=tuple(together))
