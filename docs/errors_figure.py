"""Draw docs/errors.png: errors of optimizers on flattened models, from the table that `make flattened` writes. `make figures` runs it."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
TABLE = DOCS.parent / "benchmarks" / "results" / "flattened.md"
COLORS = {"torch.optim AdamW": "#9aa5b1", "optimi StableAdamW": "#d1495b", "ours AdamW": "#2e933c", "ours StableAdamW": "#1b6ca8"}
EXACT = 1e-4  # where a bar of height 0 stands on the logarithmic axis


def read_table() -> tuple[list[str], dict[str, list[float]]]:
    """The settings, and the errors of each optimizer that has a color in them; 0 is bitwise."""
    section = TABLE.read_text().partition("## The worst of all settings")[2].partition("\n## ")[0]
    header, _, *rows = [re.findall(r"(?<=\|)[^|]*(?=\|)", line) for line in section.splitlines() if line.startswith("|")]
    names = [name.strip() for name in header[1:]]
    cells = [[cell.strip() for cell in row] for row in rows]
    errors = {
        name: [0.0 if row[1 + k] == "bitwise" else float(row[1 + k]) for row in cells] for k, name in enumerate(names) if name in COLORS
    }
    return [row[0].replace(" use_orig_params=", "\norig_params=").replace("DeepSpeed ", "DeepSpeed\n") for row in cells], errors


if __name__ == "__main__":
    settings, errors = read_table()
    figure, axes = plt.subplots(figsize=(8, 3.4))
    width = 0.8 / len(errors)
    for k, (name, values) in enumerate(errors.items()):
        places = [index + (k - (len(errors) - 1) / 2) * width for index in range(len(settings))]
        axes.bar(places, [max(value, EXACT) for value in values], width * 0.9, bottom=0, label=name, color=COLORS[name])
        for place, value in zip(places, values, strict=True):
            if value == 0:
                axes.text(place, EXACT * 1.1, "0", ha="center", va="bottom", fontsize=8, color=COLORS[name])
    axes.set(
        yscale="log", ylim=(EXACT * 0.95, 0.1), ylabel="largest relative error", title="Parameters after 10 steps, against one process"
    )
    axes.set_xticks(range(len(settings)), settings, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center")
    figure.tight_layout()
    figure.savefig(DOCS / "errors.png", dpi=120)
