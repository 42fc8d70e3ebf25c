"""Callbacks for trainers: log metrics, attach to DeepSpeed, and consolidate state before it is saved.

A trainer's package is imported only when its callback is requested.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from torch import nn

from sharded_optim import deepspeed
from sharded_optim.step.engine import Engine
from sharded_optim.trackers.several import check_every
from sharded_optim.training.containers import contained_optimizers, metrics
from sharded_optim.zero import ShardedOptimizer

__all__ = ["hugging_face", "lightning"]


def hugging_face(trainer: Any, *, metrics_every: int = 1) -> None:
    """Add callbacks to a Hugging Face Trainer. Call it on every rank, before `train`: `so.callbacks.hugging_face(trainer)`.

    The trainer then logs the optimizer's metrics too, to `state.log_history` and to every tracker of `report_to`. When training begins,
    parameters that the optimizer has without names get the model's names; under DeepSpeed `so.deepspeed.attach` is called. Before the
    trainer saves rank 0's state of a ShardedOptimizer, all ranks call `consolidate_state_dict`.

    Args:
        trainer: a trainer that uses an optimizer of this library, which need not exist yet.
        metrics_every: metrics are read in those steps in which the trainer logs and whose number is a multiple of this.

    Raises:
        ValueError: metrics_every is no positive int.
    """
    check_every("metrics_every", metrics_every)
    base: Any = import_module("transformers").TrainerCallback

    class LogMetrics(base):
        """Placed first, so that the callbacks of `report_to` log the metrics that this one adds."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs is None or state.global_step % metrics_every or not contained_optimizers(trainer.optimizer):
                return
            found = metrics(trainer.optimizer)
            logs |= found
            if state.log_history:
                state.log_history[-1] |= found

    class PrepareTraining(base):
        """Placed last, when earlier callbacks have decided whether the trainer saves."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wrapped = getattr(trainer.accelerator, "deepspeed_engine_wrapped", None)
            if wrapped is not None and contained_optimizers(wrapped.engine):
                deepspeed.attach(wrapped.engine)
            else:
                _name_params(trainer.optimizer, trainer.model)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if control.should_save:
                _consolidate(trainer.optimizer)

        on_epoch_end = on_step_end

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if args.save_strategy == "best":  # the trainer decides after this callback whether to save
                _consolidate(trainer.optimizer)

    trainer.callback_handler.callbacks.insert(0, LogMetrics())
    trainer.add_callback(PrepareTraining())


def _name_params(optimizer: Any, model: nn.Module) -> None:
    """Give an optimizer without parameter names those of the model, for metrics, errors and stochastic rounding."""
    names = {param: name for name, param in model.named_parameters()}
    for each in contained_optimizers(optimizer):
        groups = each.param_groups
        is_named = any(group.get("param_names") for group in groups)
        if isinstance(each, Engine) and not is_named and all(param in names for group in groups for param in group["params"]):
            for group in groups:
                group["param_names"] = [names[param] for param in group["params"]]


def _consolidate(optimizer: Any) -> None:
    for each in contained_optimizers(optimizer):
        if isinstance(each, ShardedOptimizer):
            each.consolidate_state_dict()


def lightning(*, metrics_every: int = 1) -> Any:
    """Return a callback for Lightning's Trainer that logs the optimizers' metrics: `Trainer(callbacks=[so.callbacks.lightning()])`.

    It logs once in every step in which the trainer logs, however many batches it accumulates; reading metrics waits for the device.
    Parameters that the optimizer has without names get the module's names.

    Args:
        metrics_every: metrics are read in those steps in which the trainer logs and whose number is a multiple of this.

    Raises:
        ValueError: metrics_every is no positive int.
    """
    check_every("metrics_every", metrics_every)
    is_old = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules  # the same package under its older name
    base: Any = import_module("pytorch_lightning" if is_old else "lightning.pytorch").Callback

    class LogMetrics(base):
        seen_step = 0  # `global_step` after the last batch; unchanged while gradients accumulate

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.seen_step = trainer.global_step
            _name_params(trainer, pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            has_stepped = trainer.global_step != self.seen_step
            self.seen_step = trainer.global_step
            is_due = trainer.global_step % trainer.log_every_n_steps == 0 and trainer.global_step % metrics_every == 0
            if has_stepped and is_due and contained_optimizers(trainer):
                pl_module.log_dict(metrics(trainer))

    return LogMetrics()
