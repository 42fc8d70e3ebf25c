"""The training job, in which a fault happens to one rank: `python -m tests.survival.job FAULT RANK TIME_FILE CONFIG KEY=VALUE ...`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import launch.train
from tests.survival import faults

RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def main(arguments: list[str]) -> int:
    name, rank, time_file, *rest = arguments
    here = next(os.environ[variable] for variable in RANK_VARIABLES if variable in os.environ)
    if here == rank:
        faults.install(next(fault for fault in faults.FAULTS if fault.name == name), Path(time_file))
    return launch.train.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
