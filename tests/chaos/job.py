"""A training job that does nothing special about being killed: it resumes, trains, and saves by turns here and in the background."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import sharded_optim as so
from benchmarks.given_gradients import Model, Shapes, gradients
from sharded_optim import checkpoint
from sharded_optim.checkpoint.local_store import LocalStore
from tests.chaos.board import RANKS, Board, Phase

__all__ = ["KEEP", "Job", "hash_of", "reference", "resumed", "run_rank", "whole_state"]

LAYERS: Shapes = (((7, 3), (7,)), ((1,),), ((5,),), ((1, 6),), ((3, 5, 2),), ((97, 129), (97,)), ((5, 97), (5,)))
OPTIONS: Mapping[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "decay_form": "coupled", "backend": "eager"}
KEEP = 3
TRAINED = 2  # steps between saves
BETWEEN = 1  # steps while one is in the background
PAUSE = 0.003  # s, of each step: there is something else to be killed in than saving


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be run.

    Attributes:
        root: of the checkpoints; None: none are saved or loaded.
        acknowledged: folder of files that tell which saves have returned, one per rank.
        result: the state after the last step is hashed into this file.
        board: file of the `Board`.
        last: step; None: goes on until it is killed.
        wrapper: "fsdp2" or "zero".
    """

    root: str | None
    acknowledged: str
    result: str
    board: str
    last: int | None
    wrapper: str


def run_rank(job: Job, rank: int, store: str) -> None:
    """One rank, in a process of its own. What it raises, as when another rank has been killed, goes to a file beside `store`."""
    board = Board(Path(job.board))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()  # that another rank is gone is no news here
    try:
        timeout = datetime.timedelta(seconds=20)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timeout)
        _train(job, rank, board)
        dist.barrier()
    except BaseException:
        Path(f"{store}.failed-{rank}").write_text(traceback.format_exc())
        os._exit(1)  # threads may wait for ranks that are gone
    dist.destroy_process_group()


def _train(job: Job, rank: int, board: Board) -> None:
    model, optimizer = _wrapped(job.wrapper)
    _mark_pruning(board, rank)
    step = 0
    if job.root is not None:
        board.enter(rank, Phase.LOADING)
        found = [checkpoint.steps(job.root)] if rank == 0 else [None]
        dist.broadcast_object_list(found)
        if found[0]:
            step = checkpoint.load(job.root, model=model, optimizer=optimizer)["step"]
    board.enter(rank, Phase.TRAINING)
    background = False
    while job.last is None or step < job.last:
        for _ in range(TRAINED):
            step = _advance(model, optimizer, step, board, rank, job.last)
        if job.root is None:
            continue
        digest = hash_of({f"model/{name}": value for name, value in whole_params(model).items()})
        what: dict[str, Any] = {"model": model, "optimizer": optimizer, "extra": {"step": step}, "keep": KEEP}
        if background:
            with board.during(rank, Phase.SAVING_IN_THE_BACKGROUND):
                saved = step
                saving = checkpoint.async_save(job.root, step, **what)
                for _ in range(BETWEEN):
                    step = _advance(model, optimizer, step, board, rank, job.last)
                saving.wait()
                _acknowledge(job, rank, saved, digest)
        else:
            with board.during(rank, Phase.SAVING):
                checkpoint.save(job.root, step, **what)
                _acknowledge(job, rank, step, digest)
        background = not background
    digest = hash_of(gathered_state(model, optimizer))
    if rank == 0:
        Path(job.result).write_text(json.dumps({"step": step, "hash": digest}))


def _advance(model: nn.Module, optimizer: Any, step: int, board: Board, rank: int, last: int | None) -> int:
    """One step; none after the last."""
    if step == last:
        return step
    model(gradients(step + 1, LAYERS, rank=rank, world_size=RANKS)).backward()
    optimizer.step()
    optimizer.zero_grad()
    if isinstance(optimizer, so.ShardedOptimizer):
        optimizer.wait()
    board.count(rank, step + 1)
    time.sleep(PAUSE)
    return step + 1


def _wrapped(wrapper: str) -> tuple[nn.Module, Any]:
    model = Model(LAYERS)
    if wrapper == "zero":
        return model, so.ShardedOptimizer(model, so.StableAdamW, bucket_mb=0.02, **OPTIONS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)  # pyright: ignore
    fully_shard(model, mesh=mesh)
    return model, so.StableAdamW(model.parameters(), **OPTIONS)


def _mark_pruning(board: Board, rank: int) -> None:
    """On the board: the removal of a checkpoint."""
    remove = LocalStore.remove

    def marked(store: LocalStore, folder: str) -> None:
        if folder.startswith("."):  # a draft
            return remove(store, folder)
        with board.during(rank, Phase.PRUNING):
            return remove(store, folder)

    LocalStore.remove = marked


def _acknowledge(job: Job, rank: int, step: int, digest: str) -> None:
    """On the disk: that a save has returned."""
    line = json.dumps({"step": step, "hash": digest}) + "\n"
    descriptor = os.open(f"{job.acknowledged}/rank-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(descriptor, line.encode())
    os.fsync(descriptor)
    os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------------------------- state


def whole_params(model: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(param) for name, param in model.named_parameters()}


def whole_state(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Of a model without wrapper and its optimizer: all tensors that count."""
    found = {f"model/{name}": param.detach() for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        for kind, value in optimizer.state.get(param, {}).items():
            found[f"{kind}/{name}"] = _whole(value)
    return found


def gathered_state(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """As `whole_state`, of a job. A collective."""
    if not isinstance(optimizer, so.ShardedOptimizer):
        return whole_state(model, optimizer) | {f"model/{name}": value for name, value in whole_params(model).items()}
    mine = {name: dict(optimizer.state.get(param, {})) for name, param in model.named_parameters()}
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, mine)
    found = {f"model/{name}": value for name, value in whole_params(model).items()}
    for name, param in model.named_parameters():
        for kind in sorted(set().union(*(held[name] for held in everyone))):
            pieces = [held[name][kind] for held in everyone if kind in held[name]]
            found[f"{kind}/{name}"] = pieces[0] if kind == "step" else torch.cat([piece.flatten() for piece in pieces]).view(param.shape)
    return found


def reference() -> tuple[Model, Any]:
    """What one process without wrapper begins with."""
    model = Model(LAYERS)
    return model, so.StableAdamW(model.parameters(), **OPTIONS)


def resumed(root: str, step: int) -> dict[str, Tensor]:
    """The state in a checkpoint, loaded into one process."""
    model = Model(LAYERS, seed=1)
    optimizer = so.StableAdamW(model.parameters(), **{**OPTIONS, "lr": 1.0})
    extra = checkpoint.load(root, step=step, model=model, optimizer=optimizer)
    assert extra == {"step": step}, extra
    return whole_state(model, optimizer)


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
