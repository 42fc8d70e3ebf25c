"""The training job, as every process runs it.

Ways to start it, from the repository:
`python -m launch configs/fsdp2.yaml` starts as many processes as the config says;
`torchrun --nproc-per-node 2 -m launch.train configs/fsdp2.yaml steps=50` does the same by hand;
`mpirun -n 2 python -m launch.train configs/fsdp2.yaml` and `srun -n 2 python -m launch.train configs/fsdp2.yaml` give the same result;
`deepspeed --num_accelerators 2 --module launch.train configs/deepspeed.yaml` does so with DeepSpeed's launcher;
`python -m launch.train configs/single.yaml` is one process.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import sharded_optim as so
from launch import corpus, deepspeed_extension, process_group, threads
from launch.batches import training_batch, validation_batch
from launch.checkpoints import Checkpoints
from launch.config import Config, ConfigError, from_arguments
from launch.corpus import Corpus
from launch.launchers import TORCHRUN, RankInfo, is_restart, read_rank_info
from launch.model import GPT
from launch.optimizer import build_schedule
from launch.preemption import Preemption
from launch.progress import Display
from launch.records import Listener, Summary, Training, Validation
from launch.rendezvous import RendezvousError
from launch.run_folder import RunFolder, find_run
from launch.sharding import shard
from launch.tracking import Tracking, check_installed
from launch.watch import Watch
from launch.watch.heartbeats import before_end
from sharded_optim.checkpoint import CheckpointError
from sharded_optim.sharding.ranks import named_ranks, ranks_where
from sharded_optim.trackers.run_files import FINISHED, RUNNING

# Exit status of ranks that have saved and stopped because another machine is taken away: torchrun is to restart them once there is a
# replacement. With 0, torchrun would take the job for finished.
STOPPED_ELSEWHERE = 75
EXPECTED = (CheckpointError, so.DivergenceError, FloatingPointError)  # errors whose messages name the remedy; shown without a traceback


def main(arguments: list[str]) -> int:
    started = time.perf_counter()
    done = folder = path = None
    try:  # all checks of user input come before the ranks wait for each other
        config = from_arguments(arguments, "python -m launch.train")
        info = read_rank_info(config)
        config = config.with_processes(info.world_size)
        device = process_group.pick_device(info, config.device)
        text = corpus.load(config)
        if config.sharding == "deepspeed":
            deepspeed_extension.build(device.type)
        if info.rank == 0:
            check_installed(config)
            path, done = find_run(config, is_restart=is_restart())
            folder = None if done else RunFolder(config, path)
        rendezvous = process_group.start(info, device, config.threads)
    except (ConfigError, RendezvousError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with Watch(rendezvous, info, heartbeat=config.heartbeat, expected=EXPECTED) as watch:
        status = 0
        path = broadcast_path(folder)
        if path is None:
            print(done or "", end="\n" if done else "")
        else:
            status = run(config, info, device, text, path, folder, started, watch)
        process_group.stop()
        threads.check_none_left()
    rendezvous.close()
    return status


def broadcast_path(folder: RunFolder | None) -> Path | None:
    """Return the path of rank 0's run folder on every rank; None if all steps are done."""
    paths = [None if folder is None else folder.path]
    dist.broadcast_object_list(paths)
    return paths[0]


def run(
    config: Config, info: RankInfo, device: torch.device, text: Corpus, path: Path, folder: RunFolder | None, started: float, watch: Watch
) -> int:
    """Build the model, train, validate, and pass records to the listeners.

    Args:
        path: the path of the run's folder.
        folder: the listener that writes to that folder, on rank 0; None on other ranks.
        started: when the job started, by `time.perf_counter`.
        watch: failure detection.

    Returns:
        The exit status: 0 if all steps are done, or the job has been saved and is to stop; STOPPED_ELSEWHERE if only another machine is
        taken away, and torchrun is to restart the ranks on this one.
    """
    unigram, zlib = corpus.unigram_bits_per_byte(text.train, text.validation), corpus.zlib_bits_per_byte(text.validation)
    listeners: list[Listener] = []  # on rank 0 only; but every rank takes part in computing the records
    if folder is not None:
        listeners = [folder, Display(steps=config.steps, unigram=unigram, zlib=zlib, folder=folder.path)]
        if config.trackers:
            tracking = Tracking(config, folder.path, watch.seconds_since_heartbeat)
            before_end(tracking.fail)
            listeners.append(tracking)

    torch.manual_seed(config.seed)  # the same weights on every rank
    model = GPT(**config.model.model_dump(), sequence_length=config.sequence_length).to(device)
    parameters = sum(param.numel() for param in model.parameters())  # before they are cut into shards
    sharded = shard(model, config, device)
    schedule = build_schedule(sharded.optimizer, config.warmup_steps, config.steps)
    checkpoints = Checkpoints(config, path, sharded, schedule)
    divergence = so.DivergenceCheck(sharded.optimizer, model=sharded.model)
    preemption = Preemption()
    with watch.no_time_limit():
        resumption = checkpoints.resume()
        for listener in listeners:
            listener.start(resumption)
    meter = Meter(config.batch_size * config.sequence_length, device)

    def summarize(status: str, training: Training, validation: Validation | None) -> Summary:
        return Summary(
            status=status,
            val_bits_per_byte=None if validation is None else validation.val_bits_per_byte,
            unigram_bits_per_byte=unigram,
            zlib_bits_per_byte=zlib,
            train_loss_bits=training.train_loss_bits,
            steps=training.step,
            skipped_steps=training.skipped_steps,
            seconds=time.perf_counter() - started,
            tokens_per_second=meter.overall_tokens_per_second(),
            parameters=parameters,
            optimizer=config.optimizer.name,
            sharding=config.sharding,
            world_size=info.world_size,
            device=device.type,
            torch=torch.__version__,
            text=str(text.source),
        )

    training = validation = stopped = None
    for step in range(resumption.step + 1 if resumption else 1, config.steps + 1):
        watch.begin_step(step)
        loss = mean_loss(sharded.model, training_batch(text.train, config, info, step).to(device))
        try:
            sharded.step(loss)
        except FloatingPointError as error:  # raised on all ranks
            raise FloatingPointError(f"{error}. {describe_losses(loss)}") from None
        if config.divergence_every is not None and (step % config.divergence_every == 0 or checkpoints.is_due(step)):
            divergence()
        meter.count(loss)
        if step % config.log_every == 0 or step == config.steps:
            has_metrics = step % (config.metrics_every or config.log_every) == 0 or step == config.steps
            training = describe_training(step, meter, sharded.optimizer, has_metrics=has_metrics)
            for listener in listeners:
                listener.training(training)
                listener.progress(summarize(RUNNING, training, validation))
        schedule.step()
        if step % config.validation_every == 0 or step == config.steps:
            meter.pause()
            validation = Validation(step=step, val_bits_per_byte=validate(sharded.model, config, info, text, device))
            for listener in listeners:
                listener.validation(validation)
            meter.resume()
        with watch.no_time_limit():  # a rank may write more slowly than others
            checkpoints.after(step)
        if step < config.steps and (stopped := preemption.after_step()) is not None:
            break
    preemption.finish()
    with watch.no_time_limit():  # also for trackers, which send their queued records
        checkpoints.finish()
        if stopped is None:
            assert training is not None, "there is at least one step"
            for listener in listeners:
                listener.finish(summarize(FINISHED, training, validation))
            return 0
        saved = checkpoints.save_now(watch.step)
        for listener in listeners:
            listener.stop(watch.step, f"asked to stop by {stopped}: saved in {saved}; resume=auto run={path.name} resumes from it")
    is_elsewhere = info.launcher is TORCHRUN and info.world_size > info.local_world_size and not preemption.received
    return STOPPED_ELSEWHERE if is_elsewhere else 0


def mean_loss(model: nn.Module, sequences: Tensor) -> Tensor:
    """Compute the cross-entropy, in nats per byte, of int64 (batch, length + 1) sequences. A token is a byte."""
    logits = model(sequences[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten())


def describe_losses(loss: Tensor) -> str:
    """Name the ranks whose rows of the batch have a non-finite loss; a wrapper may have spread their gradients to all. A collective."""
    ranks = ranks_where(not math.isfinite(loss.item()), dist.group.WORLD)
    return f"The loss of its own rows is not finite on {named_ranks(ranks)}" if ranks else "The loss is finite on all ranks"


@torch.no_grad()
def validate(model: nn.Module, config: Config, info: RankInfo, text: Corpus, device: torch.device) -> float:
    """Compute the bits per byte of the whole validation set, the same on every rank. Each rank takes its rows of every batch."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index in range(config.validation_batches):
        total += mean_loss(model, validation_batch(text.validation, config, info, index).to(device))
    dist.all_reduce(total)
    return total.item() / (config.validation_batches * info.world_size) / math.log(2.0)


def describe_training(step: int, meter: Meter, optimizer: Any, *, has_metrics: bool) -> Training:
    """Make the record of the steps since the previous record. Waits for the device, so it is not called in every step. A collective.

    Args:
        optimizer: an optimizer of sharded_optim.
        has_metrics: whether the record has the optimizer's metrics.
    """
    loss_bits, tokens_per_second = meter.read()
    metrics: dict[str, float] = optimizer.metrics() if has_metrics else {}  # already reduced over ranks
    name, largest = largest_rms(metrics)
    return Training(
        step=step,
        train_loss_bits=loss_bits,
        lr=float(optimizer.param_groups[0]["lr"]),
        tokens_per_second=tokens_per_second,
        largest_rms=largest,
        largest_rms_name=name,
        skipped_steps=optimizer.skipped_steps,
        optimizer=metrics | optimizer.performance() if has_metrics else {},
        non_finite_ranks=optimizer.non_finite_ranks() if has_metrics else {},
    )


def largest_rms(metrics: dict[str, float]) -> tuple[str | None, float | None]:
    """Return the name and the RMS of the tensor with the largest RMS, NaN counting as largest; (None, None) if there is no RMS."""
    rms = {key.removeprefix("rms/"): value for key, value in metrics.items() if key.startswith("rms/")}
    name = max(rms, key=lambda key: math.inf if math.isnan(rms[key]) else rms[key], default=None)
    return name, None if name is None else rms[name]


class Meter:
    """Measures the mean loss and the speed of training. The loss is added up on its device, so that no step waits for it."""

    def __init__(self, tokens_per_step: int, device: torch.device) -> None:
        self._tokens_per_step = tokens_per_step
        self._loss = torch.zeros((), device=device)
        self._read = self._steps, self._seconds = 0, 0.0  # at the last reading, and now
        self._since = time.perf_counter()

    def count(self, loss: Tensor) -> None:
        self._loss += loss.detach()
        self._steps += 1

    def read(self) -> tuple[float, float]:
        """Return (bits per byte, mean over steps and ranks; tokens per second) since the last reading. A collective."""
        loss = self._loss.double()
        dist.all_reduce(loss)
        nats = loss.item()  # waits for the device, before the time is read
        self.pause()
        self.resume()
        steps, seconds = self._steps - self._read[0], self._seconds - self._read[1]
        self._read = (self._steps, self._seconds)
        self._loss.zero_()
        return nats / (steps * dist.get_world_size()) / math.log(2.0), steps * self._tokens_per_step / seconds

    def pause(self) -> None:
        self._seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        self._since = time.perf_counter()

    def overall_tokens_per_second(self) -> float:
        """Return the mean tokens per second up to the last reading."""
        return self._read[0] * self._tokens_per_step / self._read[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
