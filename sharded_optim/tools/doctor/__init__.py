"""Check whether a machine, or the ranks that torchrun has started, can run a training job. `cli/doctor.py` prints the report.

findings.py     what is found, as data: a Finding, a RankReport, a Report
rank_info.py    which of torchrun's ranks this process is
environment.py  packages, device and threads
backends.py     which backends run, each stepped and compared with eager
storage.py      the folder of checkpoints
ranks.py        whether ranks agree, see the same folder, and have the same time

Every rank first looks at itself. Then the ranks exchange what they found, and check together what concerns them all.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace

from torch.utils.collect_env import get_pretty_env_info

from sharded_optim.tools.doctor import backends, environment, ranks, storage
from sharded_optim.tools.doctor.findings import Finding, RankReport, Report, Status
from sharded_optim.tools.doctor.rank_info import RankInfo, read_rank_info

__all__ = ["TIMEOUT", "Finding", "RankReport", "Report", "Status", "examine"]

TIMEOUT = 60.0  # seconds: far longer than anything here takes on a machine that is not overloaded


def examine(
    folder: str | os.PathLike[str],
    *,
    quick: bool = False,
    timeout: float = TIMEOUT,
    report_to: Callable[[Report], None] = lambda _: None,
) -> bool:
    """Check this machine. Under torchrun a collective of all ranks.

    Args:
        folder: of checkpoints, on a local or network file system.
        quick: neither measure the write speed nor collect torch's report of the environment.
        timeout: seconds that a rank waits for another.
        report_to: is called with the report, on rank 0, before any rank returns: torchrun ends all ranks when the first one fails.

    Returns:
        Whether there is no problem; the same on all ranks.

    Raises:
        ValueError: the folder is a URL, or torchrun's variables are incomplete.
    """
    info = read_rank_info()
    path = storage.local_path(folder)
    here = _examine_rank(info, path)
    if info.world_size > 1:
        return ranks.meet(info, here, timeout, lambda meeting, everyone: _examine_together(meeting, everyone, path, quick), report_to)
    report = Report(ranks=(here if quick else _measured(here, path),), together=(), environment=None if quick else get_pretty_env_info())
    report_to(report)
    return report.status != "problem"


def _examine_rank(info: RankInfo, folder: str) -> RankReport:
    """Look at this rank, without communication."""
    device = environment.device_of(info)
    findings = (*environment.examine(info), *backends.examine(device), *storage.examine(folder))
    return RankReport(rank=info.rank, host=socket.gethostname(), findings=findings)


def _measured(here: RankReport, folder: str) -> RankReport:
    if any(each.section == "storage" and each.status == "problem" for each in here.findings):
        return here
    return replace(here, findings=(*here.findings, *storage.measure(folder)))


def _examine_together(meeting: ranks.Meeting, everyone: list[RankReport], folder: str, quick: bool) -> Report:
    together = (*ranks.compare(everyone), ranks.compare_clocks(meeting), ranks.compare_folders(meeting, folder))
    is_first = meeting.info.rank == 0
    if not quick and is_first:
        everyone[0] = _measured(everyone[0], folder)
    return Report(ranks=tuple(everyone), together=together, environment=get_pretty_env_info() if is_first and not quick else None)
