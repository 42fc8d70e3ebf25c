"""Draw the figures of docs/: `python docs/figures`, or some of them by name, as `python docs/figures errors loss`."""

from __future__ import annotations

import importlib
import sys

FIGURES = ("errors", "memory", "parts", "peers", "decay", "loss")

if __name__ == "__main__":
    for name in sys.argv[1:] or FIGURES:
        if name not in FIGURES:
            sys.exit(f"{name}: not one of {', '.join(FIGURES)}")
        importlib.import_module(name).draw()
