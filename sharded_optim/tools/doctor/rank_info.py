"""Read the rank of this process from torchrun's environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["RankInfo", "read_rank_info"]

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """Rank and world size of this process, among all processes and among those on its machine (`local`)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def read_rank_info() -> RankInfo:
    """Read torchrun's variables; without RANK and WORLD_SIZE, this process is the only rank.

    Raises:
        ValueError: the variables are incomplete, no whole numbers, or out of range.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if "RANK" in missing and "WORLD_SIZE" in missing:  # MASTER_ADDR alone may be a cluster's default
        return RankInfo()
    if missing:
        raise ValueError(f"{', '.join(missing)} not in the environment, but others of torchrun's variables are; start with torchrun")
    try:
        rank, world_size, _ = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        info = RankInfo(
            rank=rank,
            world_size=world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
    except ValueError as error:
        raise ValueError(f"torchrun's variables must be whole numbers ({error}); start with torchrun") from None
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK must be from 0 to WORLD_SIZE - 1, got {rank} of {world_size}; start with torchrun")
    return info
