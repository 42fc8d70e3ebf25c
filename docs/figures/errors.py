"""docs/errors.png: errors of optimizers on flattened models, from the table that `make flattened` writes."""

from __future__ import annotations

import re

from style import GRAY, GREEN, INK, OURS, RED, RESULTS, legend, new, save

COLORS = {"torch.optim AdamW": GRAY, "optimi StableAdamW": RED, "ours AdamW": GREEN, "ours StableAdamW": OURS}
EXACT = 1e-4  # where a bar of height 0 stands on the logarithmic axis


def read_table() -> tuple[list[str], dict[str, list[float]]]:
    """The settings, and the errors of each optimizer that has a color in them; 0 is bitwise."""
    section = (RESULTS / "flattened.md").read_text().partition("## The worst of all settings")[2].partition("\n## ")[0]
    header, _, *rows = [re.findall(r"(?<=\|)[^|]*(?=\|)", line) for line in section.splitlines() if line.startswith("|")]
    names = [name.strip() for name in header[1:]]
    cells = [[cell.strip() for cell in row] for row in rows]
    errors = {
        name: [0.0 if row[1 + k] == "bitwise" else float(row[1 + k]) for row in cells] for k, name in enumerate(names) if name in COLORS
    }
    return [row[0].replace(" use_orig_params=", "\noriginal: ").replace("DeepSpeed ", "DeepSpeed\n") for row in cells], errors


def draw() -> None:
    settings, errors = read_table()
    figure, axes = new()
    width = 0.8 / len(errors)
    for k, (name, values) in enumerate(errors.items()):
        places = [index + (k - (len(errors) - 1) / 2) * width for index in range(len(settings))]
        axes.bar(places, [max(value, EXACT) for value in values], width * 0.9, bottom=0, label=name, color=COLORS[name])
        for place, value in zip(places, values, strict=True):
            if value == 0:
                axes.text(place, EXACT * 1.1, "0", ha="center", va="bottom", fontsize=9, color=COLORS[name])
    axes.set(yscale="log", ylim=(EXACT * 0.95, 0.1), ylabel="largest relative error")
    axes.set_title("Parameters after 10 steps, against one process")
    axes.tick_params(which="both", colors=INK)
    axes.set_xticks(range(len(settings)), settings, fontsize=9)
    legend(axes, ncols=4, loc="upper center")
    save(figure, "errors")
