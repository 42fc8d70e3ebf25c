"""Colors of charts. In a page they are CSS variables, so that the reader's light or dark scheme decides; in a PNG they are light."""

from __future__ import annotations

__all__ = ["DARK", "LIGHT", "PLACEHOLDERS", "SERIES", "series_name"]

# Series colors after Okabe and Ito, which people with any color vision tell apart, darkened on white and lightened on black until each has
# a contrast of 3 : 1 or more with the background.
LIGHT = {
    "surface": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#59636e",
    "grid": "#d8dde3",
    "alarm": "#b3202c",
    "series-0": "#0072b2",
    "series-1": "#c25400",
    "series-2": "#007a5a",
    "series-3": "#a0489a",
    "series-4": "#8a6d00",
    "series-5": "#0a84a6",
    "series-6": "#6a4bc4",
    "series-7": "#59636e",
}
DARK = {
    "surface": "#14181d",
    "ink": "#e6eaef",
    "muted": "#9aa5b1",
    "grid": "#353d47",
    "alarm": "#ff7b86",
    "series-0": "#58b1f0",
    "series-1": "#ff9a4d",
    "series-2": "#3cc79a",
    "series-3": "#e29bd6",
    "series-4": "#e0c04a",
    "series-5": "#7fdcf5",
    "series-6": "#b39dff",
    "series-7": "#b4bcc5",
}
SERIES = sum(name.startswith("series-") for name in LIGHT)
# matplotlib accepts no CSS variables: an SVG is drawn in these otherwise unused colors, which are then replaced by variables.
PLACEHOLDERS = {name: f"#01fe{index:02x}" for index, name in enumerate(LIGHT)}


def series_name(color: int) -> str:
    """Return the name of a series color by its index, modulo the number of colors."""
    return f"series-{color % SERIES}"
