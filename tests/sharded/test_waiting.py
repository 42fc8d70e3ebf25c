"""A rank that waits long for others says so, and for whom; nobody else does, and neither forks nor exits are in its way."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sharded_optim as so
from sharded_optim.sharding import waiting

LATE = 1.5  # seconds that a rank comes too late


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_waits_long_names_the_one_that_is_missing(world_size: int) -> None:
    """In the first step, which makes a process group, in a later one, and in clipping: the late rank is named, once, by those that wait."""
    lines = Lines()
    logger = logging.getLogger(waiting.__name__)
    late = world_size - 1
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = so.StableAdamW([("w", param)], lr=1e-2)
    calls = [
        (optimizer.step, "making the optimizers' own process group"),
        (optimizer.step, "a step of 'w'"),
        (lambda: so.clip_grad_norm_(optimizer, 1.0), "the norm of the gradients"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting, "LOOK_SECONDS", 0.1)
        patch.setattr(waiting, "HINT_SECONDS", 0.8)
        patch.setattr(logger, "handlers", [lines])
        for call, what in calls:
            dist.barrier()
            if dist.get_rank() == late:
                time.sleep(LATE)
            call()
            if dist.get_rank() == late:
                assert lines.texts == [], what
            else:
                (text,) = lines.texts
                assert text.startswith(f"rank {dist.get_rank()} has waited 1 s for rank {late} in {what}"), text
                assert "process_group=" in text
            lines.texts.clear()
        dist.barrier()
        for _ in range(20):
            optimizer.step()
        assert lines.texts == []
        assert waiting._waits == {}


@pytest.mark.ranks(2)
def test_a_forked_child_has_no_thread_of_its_own_until_it_waits_and_ends() -> None:
    waiting._start()
    assert any(each is waiting._thread for each in threading.enumerate())
    child = os.fork()
    if child == 0:
        os._exit(0 if waiting._thread is None and not waiting._waits else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_process_alone_has_no_thread_and_one_with_a_thread_exits() -> None:
    code = """
import torch, sharded_optim as so
from sharded_optim.sharding import waiting
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
so.StableAdamW([param], lr=1e-2).step()
assert waiting._thread is None
waiting._start()
assert waiting._thread.is_alive()
print("end")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "end"
