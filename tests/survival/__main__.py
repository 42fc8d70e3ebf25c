"""The table of docs/survival.md: every fault under every launcher. `python -m tests.survival [PART OF A FAULT'S NAME]`."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.survival import restarts
from tests.survival.faults import FAULTS
from tests.survival.launched import LAUNCHERS, Outcome, run

AT_ONCE = 3  # jobs: most of a run with a heartbeat is waiting
DOCUMENT = Path(__file__).parents[2] / "docs" / "survival.md"


def main(arguments: list[str]) -> int:
    started = time.monotonic()
    wanted = arguments[0] if arguments else ""
    cases = [
        (fault, launcher, rank)
        for fault in sorted(FAULTS, key=lambda fault: -fault.seconds)
        if wanted in fault.name
        for rank in ((0, 1) if fault.on_each_rank else (1,))
        for launcher in LAUNCHERS
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = []
        for outcome in pool.map(lambda case: run(*case), cases):
            outcomes.append(outcome)
            print(
                f"{outcome.fault.name}, rank {outcome.rank}, {outcome.launcher}: {outcome.seconds:.1f} s  {outcome.problem or ''}",
                flush=True,
            )
            if outcome.problem:
                print(outcome.output, file=sys.stderr)
    found = table(outcomes)
    print(found)
    is_right = all(outcome.problem is None for outcome in outcomes)
    print(f"{len(outcomes)} jobs in {time.monotonic() - started:.0f} s")
    if not wanted:
        told, went_on = restarts.measure()
        print(told)
        is_right = is_right and went_on
        _write("table", found)
        _write("restarts", f"{told}.\n")
        print(f"all in {time.monotonic() - started:.0f} s")
    return int(not is_right)


def _write(block: str, found: str) -> None:
    """Put what was found into the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    begin, end = f"<!-- {block}: make survive -->\n", f"<!-- end of {block} -->\n"
    DOCUMENT.write_text(text[: text.index(begin)] + begin + found + text[text.index(end) :], encoding="utf-8")


def table(outcomes: list[Outcome]) -> str:
    """Seconds from the fault to the end of the job, by fault and launcher."""
    lines = [f"| fault | rank | at most | {' | '.join(LAUNCHERS)} |", "|---|---:|---:|" + "---:|" * len(LAUNCHERS)]
    rows: dict[tuple[str, int], dict[str, Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault((outcome.fault.name, outcome.rank), {})[outcome.launcher] = outcome
    order = [fault.name for fault in FAULTS]
    for (name, rank), by_launcher in sorted(rows.items(), key=lambda row: (order.index(row[0][0]), row[0][1])):
        at_most = next(iter(by_launcher.values())).fault.seconds
        times = [f"{by_launcher[launcher].seconds:.1f}" + (" (!)" if by_launcher[launcher].problem else "") for launcher in LAUNCHERS]
        lines.append(f"| {name} | {rank} | {at_most:g} s | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
