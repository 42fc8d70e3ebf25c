"""ShardedOptimizer when something is wrong: an error that names it, on every rank, before anything hangs or goes apart."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from deepspeed_models import AWKWARD
from test_zero import SMALL, STABLE, contributions, loss_of, sharded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sharded_optim as so
from benchmarks.given_gradients import Model

pytestmark = pytest.mark.filterwarnings("ignore:weight_decay")

TIMEOUT = 3.0  # seconds of the process group


class Raising(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("in backward")


def check_timeout(way: str) -> None:
    """One rank leaves the others alone: both end with an error within the timeout, that of the waiting one names a bucket."""
    process_group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    model = Model(AWKWARD)
    optimizer = sharded(STABLE, model, process_group, bucket_mb=SMALL)
    fails = dist.get_rank() == 1
    started = time.monotonic()
    names = {bucket.homes[0].name for bucket in optimizer._housing.buckets}
    for step in (1, 2):
        grads = contributions(step)
        try:
            if way == "raises in backward" and fails and step == 2:
                with pytest.raises(ArithmeticError):
                    (loss_of(model.layers[4:], grads[6:]) + loss_of(model.layers[:4], map(Raising.apply, grads[:6]))).backward()
                Raising.apply(model.layers[0].weight).sum().backward()
            with optimizer.no_sync() if way == "no_sync on one" and fails and step == 2 else torch.enable_grad():
                model(grads).backward()
            if way == "no step on one" and fails and step == 1:
                continue
            optimizer.step()
            optimizer.zero_grad()
        except (RuntimeError, ArithmeticError) as error:
            assert time.monotonic() - started < 5 * TIMEOUT
            if not fails:
                assert any(name in str(error) for name in names), error
            return
    raise AssertionError(f"rank {dist.get_rank()} has noticed nothing")
