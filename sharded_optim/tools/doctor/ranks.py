"""Check torchrun's ranks together: whether they agree, see the same folder, and have the same time. No wait exceeds the timeout."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sharded_optim.sharding.ranks import gather_objects, join_messages, named_ranks
from sharded_optim.tools.doctor.findings import Finding, RankReport, Report, one_line
from sharded_optim.tools.doctor.rank_info import RankInfo
from sharded_optim.tools.doctor.storage import PREFIX

__all__ = ["compare", "compare_clocks", "compare_folders", "exchange_reports"]

MOST_SKEW = 1.0  # seconds between two clocks
ROUNDS = 3  # readings of the clocks
VISIBLE_SECONDS = 5.0  # to wait for a file: network file systems may cache that it does not exist
WAYS_OUT = {  # remedies of differences between ranks, by section
    "environment": "make it the same for every rank: install one version, use one kind of device, set OMP_NUM_THREADS",
    "backends": "make the same backends run on every rank",
}


def exchange_reports(
    info: RankInfo,
    here: RankReport,
    timeout: float,
    examine: Callable[[list[RankReport]], Report],
    report_to: Callable[[Report], None],
) -> bool:
    """Gather the reports of all ranks, examine them together, and report on rank 0. Afterwards this process ignores SIGTERM.

    Args:
        examine: makes the joint report from the reports of all ranks. A collective.
        report_to: is called on rank 0, once, before any rank returns.

    Returns:
        Whether there is no problem: the same on all ranks, but False on ranks that have lost the others.
    """
    store: Any = None
    reported = False
    limit = timedelta(seconds=timeout)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))  # pyright: ignore[reportPrivateImportUsage]
        store.set_timeout(limit)
        store.set(_key(info.rank), here.host)
        dist.init_process_group("gloo", store=store, rank=info.rank, world_size=info.world_size, timeout=limit)
        report = examine(_gathered(here))
        if info.rank == 0:
            report_to(report)
            reported = True
        return _gathered(report.status != "problem")[0]
    except RuntimeError as error:  # from the store or gloo
        if info.rank == 0 and not reported:
            report_to(Report(ranks=(here,), together=(_lost(info, timeout, store, error),), world_size=info.world_size))
        return False
    finally:
        # torchrun sends SIGTERM to all ranks as soon as one has failed; each rank is to end with the status that all have agreed on.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if dist.is_initialized():
            dist.destroy_process_group()


def _gathered(value: Any) -> list[Any]:
    return gather_objects(value, dist.group.WORLD)


def _key(rank: int) -> str:
    return f"sharded_optim/doctor/{rank}"


def _lost(info: RankInfo, timeout: float, store: Any, error: Exception) -> Finding:
    way_out = "look at what the other ranks print; see that MASTER_ADDR and MASTER_PORT are rank 0's and reachable from all machines"
    try:
        missing = [] if store is None else [rank for rank in range(info.world_size) if not store.check([_key(rank)])]
    except RuntimeError:  # the store is lost too
        missing = []
    if missing:
        value = f"{named_ranks(missing)} of {info.world_size} did not come within {timeout:g} s"
    else:
        value = f"the {info.world_size} ranks lost each other: {one_line(error)}"
    return _finding("problem", "ranks", value, way_out)


def _finding(status: Any, name: str, value: str, way_out: str | None = None, **data: Any) -> Finding:
    return Finding(section="ranks", name=name, status=status, value=value, way_out=way_out, data=data)


def compare(everyone: Sequence[RankReport]) -> list[Finding]:
    """Return a problem for each value that must be equal on all ranks and is not, or else a finding that the ranks agree."""
    values = [{(each.section, each.name): each.alike for each in report.findings if each.alike is not None} for report in everyone]
    differences = []
    for section, name in dict.fromkeys(key for each in values for key in each):
        of_ranks = [each.get((section, name), "not examined") for each in values]
        if len(set(of_ranks)) > 1:
            value = join_messages(of_ranks).replace("\n", "; ")
            differences.append(_finding("problem", name, value, WAYS_OUT[section]))
    hosts = len({each.host for each in everyone})
    if differences:
        return differences
    value = f"{len(everyone)} ranks on {hosts} host{'' if hosts == 1 else 's'} have alike what they must"
    return [_finding("ok", "agreement", value, ranks=len(everyone), hosts=hosts)]


def compare_clocks() -> Finding:
    """Measure how far apart the clocks are. A collective. The best of a few rounds counts, as ranks leave a barrier at different times."""
    rounds = []
    for _ in range(ROUNDS):
        dist.barrier()
        rounds.append(_gathered(time.time()))
    first = min(rounds, key=lambda clocks: max(clocks) - min(clocks))
    return clocks_finding([clock - first[0] for clock in first])


def clocks_finding(ahead: Sequence[float]) -> Finding:
    """Return the finding about clocks, given the seconds by which each rank's clock is ahead of rank 0's."""
    skew = max(ahead) - min(ahead)
    if skew <= MOST_SKEW:
        return _finding("ok", "clocks", f"at most {max(1, round(skew * 1e3)):,} ms apart", seconds=skew)
    shown = [f"{seconds:+.1f} s" if abs(seconds) > MOST_SKEW / 2 else None for seconds in ahead]
    value = f"{skew:,.1f} s apart; from rank 0's, {join_messages(shown)}".replace("\n", "; ")
    return _finding("problem", "clocks", value, "synchronise the clocks of the machines (NTP)", seconds=skew)


def compare_folders(rank: int, folder: str) -> Finding:
    """Check whether all ranks see the same folder: rank 0 writes a file, the others look for it. A collective."""
    token = None
    try:
        if rank == 0:
            token = _write_token(folder)
        name = _gathered(None if token is None else os.path.basename(token))[0]
        seen = _gathered(name is not None and _appears(os.path.join(folder, name)))
    finally:
        if token is not None:
            with suppress(OSError):
                os.unlink(token)
    if name is None:
        return _finding("warning", "folder", "not known to be shared: rank 0 cannot write there", "see rank 0's problem with the folder")
    blind = [None if each else folder for each in seen]
    if not any(blind):
        return _finding("ok", "folder", "all ranks see the same folder", shared=True)
    value = f"{join_messages(blind)} is not rank 0's".replace("\n", "; ")
    way_out = "give a --folder on a file system that all machines mount: a checkpoint is written by all ranks into one folder"
    return _finding("warning", "folder", value, way_out, shared=False)


def _write_token(folder: str) -> str | None:
    try:
        descriptor, path = tempfile.mkstemp(prefix=PREFIX, dir=folder)
    except OSError:
        return None
    os.close(descriptor)
    return path


def _appears(path: str) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (found := os.path.exists(path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found
