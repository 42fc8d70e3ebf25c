"""Run folders with invented values, as the training job writes them: for tests of what reads them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CONFIG", "tensor_names", "training_record", "validation_record", "write_run"]

CONFIG = """\
name: invented
processes: 2
sharding: fsdp2
steps: {steps}
log_every: {log_every}
optimizer:
  name: StableAdamW
  lr: 0.004
  betas: null
data:
  path: null
"""


def tensor_names(count: int) -> list[str]:
    """Names as those of a transformer."""
    parts = ("attention.qkv.weight", "attention.output.weight", "mlp.up.weight", "mlp.down.weight", "norm.weight")
    return [f"blocks.{index // len(parts)}.{parts[index % len(parts)]}" for index in range(count)]


def training_record(
    step: int,
    *,
    tensors: Sequence[str] = (),
    spike: str | None = None,
    seed: int = 0,
    optimizer: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """A record of training.

    Args:
        tensors: that have an RMS.
        spike: a tensor with a large RMS in this step.
        optimizer: whether it has the field `optimizer`.
        changes: other fields.
    """
    draw = random.Random(f"{seed} {step}")
    rms = {name: 5.0 if name == spike else 0.4 + 0.5 * draw.random() for name in tensors}
    largest = max(rms, key=rms.__getitem__, default=None)
    lr = 4e-3 * min(1.0, step / 20)
    record = {
        "step": step,
        "train_loss_bits": 2.0 + 6.0 * math.exp(-step / 60) + 0.05 * draw.random() + (0.8 if spike else 0.0),
        "lr": lr,
        "tokens_per_second": 9000.0 + 500.0 * draw.random(),
        "largest_rms": None if largest is None else rms[largest],
        "largest_rms_name": largest,
        "skipped_steps": 0,
    }
    if optimizer:
        factors = {name: 1.0 / max(1.0, value) for name, value in rms.items()}
        share = {"clipped_share": sum(value < 1.0 for value in factors.values()) / len(factors)} if factors else {}
        record["optimizer"] = {
            "skipped_steps": 0.0,
            **{f"rms/{name}": value for name, value in rms.items()},
            **{f"clip_factor/{name}": value for name, value in factors.items()},
            **share,
            "lr/0": lr,
            "lr/1": lr,
            "weight_decay/0": lr * 0.01,
            "weight_decay/1": 0.0,
            "ms/observe": 3.0 + draw.random(),
            "ms/agree": 1.0 + draw.random(),
            "ms/matrices": 0.0,
            "ms/update": 5.0 + draw.random(),
            "bytes": 24e6,
            "gb_per_s": 2.5 + draw.random(),
        }
    return record | changes


def validation_record(step: int) -> dict[str, Any]:
    return {"step": step, "val_bits_per_byte": 2.1 + 6.0 * math.exp(-step / 60)}


def write_run(
    folder: Path,
    *,
    steps: int = 100,
    log_every: int = 10,
    validation_every: int = 50,
    tensors: Sequence[str] = tuple(tensor_names(10)),
    spikes: Mapping[int, str] | None = None,
    optimizer: bool = True,
    status: str = "finished",
    seed: int = 0,
    config: str = CONFIG,
    summary: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Write a run folder, and return its records.

    Args:
        spikes: the tensor that has a large RMS in a step.
        optimizer: whether records have the field `optimizer`; old runs have not.
        summary: fields that differ from the usual.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for step in range(log_every, steps + 1, log_every):
        spike = (spikes or {}).get(step)
        records.append(training_record(step, tensors=tensors, spike=spike, seed=seed, optimizer=optimizer))
        if step % validation_every == 0:
            records.append(validation_record(step))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (folder / "config.yaml").write_text(config.format(steps=steps, log_every=log_every), encoding="utf-8")
    content = {
        "status": status,
        "val_bits_per_byte": 2.1,
        "unigram_bits_per_byte": 4.576,
        "zlib_bits_per_byte": 1.895,
        "train_loss_bits": 2.0,
        "steps": steps,
        "skipped_steps": 0,
        "seconds": 60.5,
        "tokens_per_second": 9250.0,
        "parameters": 853120,
        "optimizer": "StableAdamW",
        "sharding": "fsdp2",
        "world_size": 2,
        "device": "cpu",
        "torch": "2.13.0",
        "text": "/text",
        **(summary or {}),
    }
    (folder / "summary.json").write_text(json.dumps(content), encoding="utf-8")
    return records
