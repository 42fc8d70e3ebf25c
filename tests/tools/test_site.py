"""The built documentation site in a real browser: no errors, no requests to elsewhere, drawings drawn, nothing wider than a phone's window.

`make docs` builds the site and runs this. Needs playwright and a Chromium: `pip install playwright`, and the system's chromium or
`playwright install chromium`. SCREENSHOTS=FOLDER keeps pictures of what was looked at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chromium import started_chromium

SITE = Path(__file__).parents[2] / "build" / "site"
pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install playwright, and a chromium")
if not (SITE / "docs" / "index.html").exists():
    pytest.skip("the site is not built; make docs", allow_module_level=True)

MOST_LOOKED_AT = ("docs/index", "docs/choosing", "docs/code", "docs/api", "docs/optimizers", "docs/training-job")
EVERY = tuple(str(path.relative_to(SITE).with_suffix("")) for path in sorted(SITE.glob("docs/*.html")))
WINDOWS = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started_chromium() as opened:
        yield opened


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("pages", "window", "scheme"),
    [
        (EVERY, "desktop", "light"),
        (MOST_LOOKED_AT, "desktop", "dark"),
        (MOST_LOOKED_AT, "phone", "light"),
        (EVERY, "phone", "dark"),
    ],
    ids=["every-desktop-light", "desktop-dark", "phone-light", "every-phone-dark"],
)
def test_pages_are_shown_without_errors(browser: Any, pages: tuple[str, ...], window: str, scheme: str) -> None:
    width, height = WINDOWS[window]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    found: list[str] = []
    page.on("console", lambda message: found.append(f"{page.url}: {message.text}"))
    page.on("pageerror", lambda error: found.append(f"{page.url}: {error}"))
    page.on("request", lambda made: None if made.url.startswith(("file:", "data:", "blob:")) else found.append(f"{page.url}: {made.url}"))
    page.on("requestfailed", lambda made: found.append(f"{page.url}: {made.url} is missing"))
    for name in pages:
        page.goto((SITE / f"{name}.html").as_uri())
        drawings = page.locator("pre.mermaid")
        for index in range(drawings.count()):
            drawings.nth(index).locator("svg").wait_for(timeout=20_000)
        broken = page.evaluate("[...document.images].filter(image => image.complete && !image.naturalWidth).map(image => image.src)")
        assert broken == [], name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than the window"
        red, *_ = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
        assert (red > 200) == (scheme == "light"), name
        if (folder := os.environ.get("SCREENSHOTS")) and name in MOST_LOOKED_AT:
            page.screenshot(path=f"{folder}/{name.replace('/', '-')}-{window}-{scheme}.png", full_page=window == "desktop")
    context.close()
    assert found == []


def test_the_search_finds_a_page(browser: Any) -> None:
    page = browser.new_page()
    page.goto((SITE / "search.html").as_uri() + "?q=StableAdamW")
    page.locator("ul.search li").first.wait_for(timeout=20_000)
    assert page.locator("ul.search a[href*='optimizers']").count()
    page.close()


def test_the_first_page_leads_to_the_index(browser: Any) -> None:
    page = browser.new_page()
    page.goto((SITE / "index.html").as_uri())
    page.wait_for_url("**/docs/index.html", timeout=20_000)
    page.close()
