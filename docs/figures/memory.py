"""docs/memory.png: memory of a rank by sharding, for Llama-3-8B on 64 ranks, as `sharded-optim plan --json` prints it."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from sharded_optim.cli.commands import app
from style import BROWN, GRAY, GREEN, OURS, VIOLET, label_bars, legend, new, save

LAYERS, WIDTH, KEYS, HIDDEN, VOCABULARY = 32, 4096, 1024, 14336, 128256
PARAMETERS = 8_030_261_248  # of Llama-3-8B
RANKS = 64
PARTS = {"parameters": OURS, "gradients": GREEN, "moments": VIOLET, "masters": BROWN, "buckets": GRAY}


def llama() -> dict[str, list[int]]:
    shapes = {"model.embed_tokens.weight": [VOCABULARY, WIDTH]}
    for layer in range(LAYERS):
        block = {
            "self_attn.q_proj": [WIDTH, WIDTH],
            "self_attn.k_proj": [KEYS, WIDTH],
            "self_attn.v_proj": [KEYS, WIDTH],
            "self_attn.o_proj": [WIDTH, WIDTH],
            "mlp.gate_proj": [HIDDEN, WIDTH],
            "mlp.up_proj": [HIDDEN, WIDTH],
            "mlp.down_proj": [WIDTH, HIDDEN],
            "input_layernorm": [WIDTH],
            "post_attention_layernorm": [WIDTH],
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": sizes for name, sizes in block.items()}
    shapes |= {"model.norm.weight": [WIDTH], "lm_head.weight": [VOCABULARY, WIDTH]}
    assert sum(map(math.prod, shapes.values())) == PARAMETERS
    return shapes


def plan() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shapes.json")
        path.write_text(json.dumps(llama()))
        arguments = ["plan", str(path), "--world-size", str(RANKS), "--dtype", "bf16", "--optimizer", "StableAdamW", "--json"]
        return json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)


def draw() -> None:
    plans = {each["sharding"]: each["memory"] for each in plan()["plans"]}
    figure, axes = new(height=3.0)
    places = list(range(len(plans)))[::-1]
    left = [0.0] * len(plans)
    for part, color in PARTS.items():
        sizes = [memory[part] / 2**30 for memory in plans.values()]
        axes.barh(places, sizes, left=left, height=0.7, color=color, label=part)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    label_bars(axes, places, left, [f"{total:.1f} GiB" for total in left])
    axes.set_yticks(places, list(plans))
    axes.set(xlabel="GiB of a rank, without activations", xlim=(0, 1.12 * max(left)))
    axes.set_title(f"Llama-3-8B, bf16 with fp32 masters, StableAdamW, {RANKS} ranks")
    legend(axes, loc="lower right")
    print("  ".join(f"{name} {total:.1f}" for name, total in zip(plans, left, strict=True)))
    save(figure, "memory")
