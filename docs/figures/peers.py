"""docs/peers.png: a step of GPT-2's tensors beside other libraries, from the records that `make bench` writes."""

from __future__ import annotations

import json

from style import BROWN, GRAY, INK, OURS, RESULTS, VIOLET, label_bars, new, save

BARS = {  # labels, contenders of which the faster counts, colors
    "torch AdamW, foreach": (("torch AdamW foreach",), GRAY),
    "optimi AdamW": (("optimi AdamW foreach", "optimi AdamW loop"), BROWN),
    "DeepSpeedCPUAdam": (("DeepSpeedCPUAdam",), VIOLET),
    "AdamW, this library": (("ours AdamW cpu",), OURS),
    "optimi StableAdamW": (("optimi StableAdamW foreach", "optimi StableAdamW loop"), BROWN),
    "StableAdamW, this library": (("ours StableAdamW cpu",), OURS),
}


def draw() -> None:
    run = json.loads((RESULTS / "step_cpu.json").read_text())
    (case,) = (case for case in run["cases"] if (case["name"], case["dtype"]) == ("GPT-2", "fp32"))
    of = {result["contender"]: result["ratio"] for result in case["results"]}
    ratios = [min(of[name] for name in names) for names, _ in BARS.values()]
    figure, axes = new(height=2.8)
    places = list(range(len(BARS)))[::-1]
    axes.barh(places, ratios, height=0.7, color=[color for _, color in BARS.values()])
    label_bars(axes, places, ratios, [f"{ratio:.2f}" for ratio in ratios])
    axes.axvline(1.0, color=INK, linewidth=1, linestyle="--", zorder=0)
    axes.set_yticks(places, list(BARS))
    environment = run["environment"]
    axes.set(xlabel=f"time of a step, ratio to {run['baseline']} (dashed); {environment['threads']} threads", xlim=(0, 1.1 * max(ratios)))
    axes.set_title("124M float32 elements in 148 tensors, as GPT-2 has them")
    print("  ".join(f"{name} {ratio:.2f}" for name, ratio in zip(BARS, ratios, strict=True)))
    save(figure, "peers")
