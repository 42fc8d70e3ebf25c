"""What trainers do not do by themselves, as callbacks of theirs: metrics in their logs, DeepSpeed's layout, whole state in what they save.

The trainers are imported when a callback is asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from sharded_optim import deepspeed
from sharded_optim.training.containers import contained_optimizers, metrics
from sharded_optim.zero import ShardedOptimizer

__all__ = ["hugging_face", "lightning"]


def hugging_face(trainer: Any) -> None:
    """Add to a Trainer of Hugging Face, before `train`: `so.callbacks.hugging_face(trainer)`. On every rank.

    What it logs has the optimizer's metrics too, in `state.log_history` and wherever `report_to` says. Under DeepSpeed it calls
    `so.deepspeed.attach` when training begins. Before it saves what rank 0 has of a ShardedOptimizer, all ranks call
    `consolidate_state_dict`.

    Args:
        trainer: that trains with an optimizer of this library, which it may yet have to make.
    """
    base: Any = import_module("transformers").TrainerCallback

    class LogMetrics(base):
        """First, so that the callbacks of `report_to` log what this adds."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs is None or not contained_optimizers(trainer.optimizer):
                return
            found = metrics(trainer.optimizer)
            logs |= found
            if state.log_history:
                state.log_history[-1] |= found

    class PrepareTraining(base):
        """Last: by then it is decided whether the trainer saves."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wrapped = getattr(trainer.accelerator, "deepspeed_engine_wrapped", None)
            if wrapped is not None and contained_optimizers(wrapped.engine):
                deepspeed.attach(wrapped.engine)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if control.should_save:
                _consolidate(trainer.optimizer)

        on_epoch_end = on_step_end

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if args.save_strategy == "best":  # for which the trainer decides after this
                _consolidate(trainer.optimizer)

    trainer.callback_handler.callbacks.insert(0, LogMetrics())
    trainer.add_callback(PrepareTraining())


def _consolidate(optimizer: Any) -> None:
    for each in contained_optimizers(optimizer):
        if isinstance(each, ShardedOptimizer):
            each.consolidate_state_dict()


def lightning() -> Any:
    """A callback for Lightning's Trainer, which logs the optimizers' metrics: `Trainer(callbacks=[so.callbacks.lightning()])`.

    In every step in which the trainer logs; to read metrics waits for the device.
    """
    is_old = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules  # the same, by its other name
    base: Any = import_module("pytorch_lightning" if is_old else "lightning.pytorch").Callback

    class LogMetrics(base):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step % trainer.log_every_n_steps == 0 and contained_optimizers(trainer):
                pl_module.log_dict(metrics(trainer))

    return LogMetrics()
