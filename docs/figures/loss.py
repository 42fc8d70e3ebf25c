"""docs/loss.png: loss, largest RMS and learning rate of the showcase run.

From runs/showcase, which `make showcase` trains; what is drawn of it is kept in showcase.json beside this file, and drawn again from there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from style import BROWN, DOCS, GRAY, GREEN, OURS, RED, legend, new, save

RUN = DOCS.parent / "runs" / "showcase"
KEPT = Path(__file__).with_name("showcase.json")


def read_run() -> dict[str, Any]:
    records = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((RUN / "summary.json").read_text())
    training = [record for record in records if "train_loss_bits" in record]
    return {
        "steps": [record["step"] for record in training],
        "training": [round(record["train_loss_bits"], 4) for record in training],
        "lr": [record["lr"] for record in training],
        "rms": [record["largest_rms"] and round(record["largest_rms"], 3) for record in training],
        "validation": [[record["step"], round(record["val_bits_per_byte"], 4)] for record in records if "val_bits_per_byte" in record],
        **{key: summary[key] for key in ("status", "optimizer", "sharding", "world_size", "zlib_bits_per_byte", "unigram_bits_per_byte")},
    }


def draw() -> None:
    if (RUN / "summary.json").exists():
        KEPT.write_text(json.dumps(read_run()) + "\n")
    run = json.loads(KEPT.read_text())
    figure, (loss, rms, lr) = new(height=5.4, rows=3, sharex=True, height_ratios=(3, 1, 1))
    loss.plot(run["steps"], run["training"], color=OURS, alpha=0.5, linewidth=1.2, label="training")
    steps, values = zip(*run["validation"], strict=True)
    loss.plot(steps, values, color=OURS, marker="o", markersize=4, label=f"validation, last {values[-1]:.2f}")
    loss.axhline(run["zlib_bits_per_byte"], color=RED, linestyle="--", label=f"zlib, level 9: {run['zlib_bits_per_byte']:.2f}")
    loss.set(ylabel="bits per byte", ylim=(1.6, 3.4))
    below = "below" if values[-1] < run["zlib_bits_per_byte"] else "above"
    loss.set_title(f"{run['optimizer']}, {run['sharding']}, {run['world_size']} processes: the last loss is {below} what zlib needs")
    legend(loss, loc="upper right")
    known = [(step, value) for step, value in zip(run["steps"], run["rms"], strict=True) if value is not None]
    rms.plot(*zip(*known, strict=True), color=GREEN, linewidth=1.2)
    rms.axhline(1.0, color=GRAY, linestyle="--", linewidth=1)
    rms.set(ylabel="largest RMS")
    lr.plot(run["steps"], run["lr"], color=BROWN)
    lr.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
    print(f"last validation {values[-1]}, zlib {run['zlib_bits_per_byte']:.4f}")
    save(figure, "loss")
