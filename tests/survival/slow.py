"""The training job with time between steps, in which something can happen to it. Ranks say which process they are."""

from __future__ import annotations

import os
import sys
import time
from unittest import mock

import launch.train
from tests.survival.job import RANK_VARIABLES

PAUSE = 0.2  # seconds


def main(arguments: list[str]) -> int:
    rank = next(os.environ[variable] for variable in RANK_VARIABLES if variable in os.environ)
    print(f"slow rank {rank} is {os.getpid()}", flush=True)
    training_batch = launch.train.training_batch

    def training_batch_later(*given: object) -> object:
        time.sleep(PAUSE)
        return training_batch(*given)  # type: ignore[arg-type]

    mock.patch.object(launch.train, "training_batch", training_batch_later).start()
    return launch.train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
