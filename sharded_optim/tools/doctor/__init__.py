"""Check whether a machine, or the ranks that torchrun has started, can run a training job. `cli/doctor.py` prints the report.

findings.py     the results as data: a Finding, a RankReport, a Report
rank_info.py    torchrun's environment variables
environment.py  packages, device and threads
backends.py     each backend, stepped and compared with eager
storage.py      the folder of checkpoints
ranks.py        whether ranks agree, see the same folder, and have the same time

Every rank first checks itself. Then the ranks exchange their reports, and make the checks that need all ranks.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace

from torch.utils.collect_env import get_pretty_env_info

from sharded_optim.tools.doctor import backends, environment, ranks, storage
from sharded_optim.tools.doctor.findings import Finding, RankReport, Report, Status
from sharded_optim.tools.doctor.rank_info import read_rank_info

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
        folder: the folder of checkpoints, on a local or network file system.
        quick: whether to leave out the write speed and torch's report of the environment.
        timeout: seconds that a rank waits for another rank.
        report_to: is called with the report, on rank 0, before any rank returns: torchrun ends all ranks when the first one fails.

    Returns:
        Whether there is no problem; the same on all ranks.

    Raises:
        ValueError: the folder is a URL, or torchrun's variables are incomplete.
    """
    info = read_rank_info()
    path = storage.local_path(folder)
    findings = (*environment.examine(info), *backends.examine(environment.device_of(info)), *storage.examine(path))
    here = RankReport(rank=info.rank, host=socket.gethostname(), findings=findings)
    if info.world_size > 1:
        return ranks.exchange_reports(info, here, timeout, lambda everyone: _examine_together(info.rank, everyone, path, quick), report_to)
    report = _report([here], (), path, quick)
    report_to(report)
    return report.status != "problem"


def _examine_together(rank: int, everyone: list[RankReport], folder: str, quick: bool) -> Report:
    together = (*ranks.compare(everyone), ranks.compare_clocks(), ranks.compare_folders(rank, folder))
    return _report(everyone, together, folder, quick or rank != 0)


def _report(reports: list[RankReport], together: tuple[Finding, ...], folder: str, quick: bool) -> Report:
    """Make the report. Unless it is to be quick, the write speed is measured, and torch's report of the environment is collected."""
    first, *others = reports
    if quick:
        return Report(ranks=tuple(reports), together=together)
    if not any(each.section == "storage" and each.status == "problem" for each in first.findings):
        first = replace(first, findings=(*first.findings, *storage.measure(folder)))
    return Report(ranks=(first, *others), together=together, environment=get_pretty_env_info())
