"""A Chromium without a window, for the tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def started_chromium() -> Iterator[Any]:
    """Start the system's Chromium, or playwright's own; skip the test with the reason where neither starts."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install playwright, and a chromium")

    path = next(filter(None, map(shutil.which, NAMES)), None)
    options = ["--disable-background-networking", *["--no-sandbox"] * (os.geteuid() == 0)]  # Chromium's sandbox does not work for root
    with sync_api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=path, args=options)
        except sync_api.Error as error:
            reason = str(error).splitlines()[0]
            pytest.skip(f"no chromium can be started; apt-get install chromium, or playwright install chromium: {reason}")
        yield opened
        opened.close()
