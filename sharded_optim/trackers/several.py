"""Pass each record to several trackers, whose errors do not end training: the result of `so.trackers.open`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

import torch.distributed as dist
from torch import Tensor

from sharded_optim.trackers.background import Background
from sharded_optim.trackers.destination import Run, Status, Tracker
from sharded_optim.trackers.registry import check_installed, check_options, destination

__all__ = ["Trackers", "check_every", "open_trackers"]

SECONDS_TO_FINISH = 60.0  # for the remaining records when a run ends; creating MLflow's database alone takes 7 s on an idle core


class Trackers:
    """The open trackers of a run: `log(step, values)` and `finish()`. Also a context manager, which finishes them.

    If a tracker fails, a warning names it and its error, once, and training goes on.
    """

    def __init__(self, opens: Mapping[str, Callable[[], Tracker]], *, metrics_every: int = 1) -> None:
        self._metrics_every = metrics_every
        self._warned: set[str] = set()
        self._is_finished = False
        self._trackers: dict[str, Tracker] = {}
        for name, open_one in opens.items():
            self._call(name, lambda name=name, open_one=open_one: self._trackers.update({name: open_one()}))

    def log(
        self, step: int, values: Mapping[str, SupportsFloat], *, metrics: Callable[[], Mapping[str, SupportsFloat]] | None = None
    ) -> None:
        """Record values of a step, on every rank or on rank 0; only rank 0 writes.

        Args:
            step: the step, counted from 0 or 1, not smaller than in earlier calls.
            values: finite or not; a `/` in a key separates levels. Tensors of one element are read, which waits for their device.
            metrics: returns more values, such as `optimizer.metrics` or `lambda: so.metrics(trainer)`. It is called in steps that
                `metrics_every` divides: other steps compute nothing, and wait for no device. It is called on rank 0 alone: a function in
                which all ranks communicate, such as `optimizer.non_finite_ranks`, would wait there for ever.

        Raises:
            TypeError: a value is no number.
            ValueError: a key is "step", which is the name of the step itself; or the trackers are finished.
        """
        if self._is_finished:
            raise ValueError(f"step {step} cannot be logged: the trackers are finished; call finish() after the last step")
        if "step" in values:
            raise ValueError("the key 'step' is the step itself, which is log's first argument; give the value another name")
        if metrics is not None and self._trackers and step % self._metrics_every == 0:
            values = {**values, **metrics()}
        floats = {key: _float(key, value) for key, value in values.items()}
        for name, tracker in self._trackers.items():
            self._call(name, partial(tracker.log, step, floats))

    def finish(self, status: Status = "finished") -> None:
        """Write the remaining records, for at most 60 s, 10 s if the run has failed, and close all trackers.

        A second call does nothing.

        Args:
            status: how the run ended; "interrupted" for a run that is to be resumed.
        """
        if not self._is_finished:
            self._is_finished = True
            for tracker in self._trackers.values():
                if isinstance(tracker, Background):
                    tracker.begin_finish(status)
            for name, tracker in self._trackers.items():
                self._call(name, partial(tracker.finish, status))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.finish("finished" if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed")

    def _call(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if name not in self._warned:
                self._warned.add(name)
                text = f"the tracker {name!r} failed: {type(error).__name__}: {error}. Training goes on; this is said once"
                warnings.warn(text, UserWarning, stacklevel=3)


def open_trackers(
    names: Iterable[str],
    folder: str | Path,
    *,
    run: str,
    config: Mapping[str, Any] | None = None,
    resume_after: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    metrics_every: int = 1,
) -> Trackers:
    """Open the trackers to which a run sends its metrics: `so.trackers.open`.

    Call it on every rank, after torch's process group exists, or on rank 0 alone. Only rank 0 opens and writes anything.

    Args:
        names: the destinations: "jsonl", "tensorboard", "wandb", "mlflow", "prometheus".
        folder: the folder of all runs.
        run: the name of this run, and of its folder in `folder`.
        config: the configuration of the run, shown beside its metrics; nested dicts of values that JSON can write.
        resume_after: the step of the checkpoint from which the run of this name is resumed: records of later steps are dropped, or not
            logged again. None begins a new run.
        options: options by destination: `{"wandb": {"mode": "offline"}, "prometheus": {"port": 9500}}`.
        metrics_every: steps between calls of the function `metrics` of `log`, as reading and storing hundreds of values takes time, and
            waits for the device. It is no option of the optimizer, which has the metrics of a step whether they are read or not.

    Raises:
        ImportError: on rank 0, a client is not installed. The message says what to install.
        ValueError: a name or option is unknown, a name is given twice, options are for a tracker that is not among `names`, `run` is no
            name of a folder, or `metrics_every` no positive int. On all ranks.
    """
    chosen = [names] if isinstance(names, str) else list(names)
    given = {} if options is None else options
    for name in [*chosen, *given]:
        check_options(name, given.get(name, {}))
    for name in given:
        if name not in chosen:
            raise ValueError(f"options are given for {name!r}, which is not among names={chosen!r}; add it there, or leave them out")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"a tracker is opened once, got names={chosen!r}; leave out what is named twice")
    check_every("metrics_every", metrics_every)
    if re.fullmatch(r"[A-Za-z0-9._-]+", run) is None or run in (".", ".."):
        raise ValueError(f"run is the name of a folder and may have letters, digits, '.', '_' and '-', got {run!r}")
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return Trackers({}, metrics_every=metrics_every)
    check_installed(chosen)
    described = Run(folder=Path(folder), name=run, config=dict(config or {}), resume_after=resume_after)
    return Trackers({name: partial(_open, name, described, given.get(name, {})) for name in chosen}, metrics_every=metrics_every)


def check_every(name: str, steps: Any) -> None:
    """Check an argument that is a number of steps.

    Raises:
        ValueError: it is no positive int. The message has its name and value.
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(f"{name} is a number of steps, a positive int, got {steps!r}; leave it out for 1")


def _open(name: str, run: Run, options: Mapping[str, Any]) -> Tracker:
    found = destination(name)
    opens = partial(found.opens, run, **options)
    return Background(name, opens, seconds=SECONDS_TO_FINISH) if found.may_block else opens()


def _float(key: str, value: SupportsFloat) -> float:
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"a tracker's value must be a number or a tensor of one element, got {key}={value!r}") from None
