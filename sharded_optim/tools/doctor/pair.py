"""One of the two processes between which `all_reduce.py` measures, where there are no ranks.

python -m sharded_optim.tools.doctor.pair RANK FOLDER SECONDS
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sharded_optim.tools.doctor.all_reduce import RESULT, measure


def main(rank: int, folder: Path, timeout: timedelta) -> None:
    """Rank 0 writes what both have measured."""
    store = dist.FileStore(str(folder / "store"), 2)  # pyright: ignore[reportPrivateImportUsage]  # public in the documentation
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    rates = measure(None, torch.device("cpu"))
    if rank == 0:
        (folder / RESULT).write_text(json.dumps(asdict(rates)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), timedelta(seconds=float(sys.argv[3])))
