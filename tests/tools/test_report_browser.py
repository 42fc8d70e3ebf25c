"""The page of a report in a real browser: no errors, no requests, both color schemes, wide and narrow windows, pointer and keyboard.

Needs playwright and a Chromium: `pip install playwright`, and the system's chromium or `playwright install chromium`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from PIL import Image

from sharded_optim.tools.report import write_report
from sharded_optim.tools.report.palette import DARK, LIGHT
from tests.chromium import started_chromium
from tests.run_folders import tensor_names, write_run

pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pip install playwright, and a chromium")

HOSTILE = "</script><script>document.title='broken'</script>\"' onload=x $a$"
WINDOWS = {"desktop": (1200, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started_chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a page about two runs, of which one has a hostile tensor name and a spike."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "first", tensors=[*tensor_names(19), HOSTILE], spikes={50: HOSTILE})
    write_run(folder / "second", seed=1)
    path, _ = write_report([folder / "first", folder / "second"])
    return path.as_uri()


@dataclass
class Opened:
    """A page in a window."""

    page: Any
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(params=[(scheme, window) for scheme in ("light", "dark") for window in WINDOWS], ids="-".join)
def opened(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Opened]:
    scheme, window = request.param
    width, height = WINDOWS[window]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    found = Opened(context.new_page())
    found.page.on("console", lambda message: found.messages.append(message.text))
    found.page.on("pageerror", lambda error: found.messages.append(str(error)))
    found.page.on("dialog", lambda dialog: (found.messages.append(dialog.message), dialog.dismiss()))
    found.page.on("request", lambda made: found.requests.append(made.url))
    found.page.goto(address)
    yield found
    context.close()


def color(text: str) -> tuple[int, ...]:
    return tuple(int(text[at : at + 2], 16) for at in (1, 3, 5))


def test_the_page_opens_without_errors_requests_or_overflow(opened: Opened, address: str) -> None:
    page = opened.page
    assert opened.messages == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [address]
    assert page.title() == "Training report: first, second"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page scrolls sideways"
    narrow = page.viewport_size["width"] < 640
    for name, shown in (("wide", not narrow), ("narrow", narrow)):
        plots = page.locator(f".plot.{name}")
        assert plots.count() > 5
        assert {plots.nth(index).is_visible() for index in range(plots.count())} == {shown}


def test_letters_of_figures_can_be_read(opened: Opened) -> None:
    """Those of axes have 9 pixels or more; the names of a heat map's rows, which its table repeats, 7."""
    heights = opened.page.evaluate(
        "[...document.querySelectorAll('.plot svg text')].filter(each => each.checkVisibility()).map(each =>"
        " parseFloat(getComputedStyle(each).fontSize) * each.ownerSVGElement.getScreenCTM().a)"
    )
    assert len(heights) > 50
    assert min(heights) >= 7.0
    assert sorted(heights)[len(heights) // 2] >= 9.0


def test_colors_follow_the_readers_scheme(opened: Opened) -> None:
    page = opened.page
    colors = DARK if page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") else LIGHT
    figure = page.locator("figure").first.locator(".drawing")
    with Image.open(io.BytesIO(figure.screenshot())) as image:
        pixels = image.convert("RGB").getcolors(maxcolors=1 << 24)
    found = {pixel for _, pixel in pixels}
    assert max(pixels)[1] == color(colors["surface"])
    assert color(colors["series-0"]) in found


def test_the_keyboard_moves_the_values(opened: Opened) -> None:
    figure = opened.page.locator("figure").first
    output, slider = figure.locator("output"), figure.locator("input")
    assert output.inner_text().startswith("step 100 ")
    slider.focus()
    slider.press("ArrowLeft")
    assert output.inner_text().startswith("step 90 ")
    assert "validation, first: 4.7" in output.inner_text(), "that of step 50, the last one before"
    assert "(step 50)" in output.inner_text()
    assert slider.get_attribute("aria-valuetext") == output.inner_text()


def test_the_pointer_moves_the_values(opened: Opened) -> None:
    """In a heat map also the tensor: the last row at the middle is that with the spike."""
    figure = next(each for each in opened.page.locator("figure").all() if each.locator("select").count())
    plot = next(each for each in figure.locator(".plot").all() if each.is_visible())
    plot.scroll_into_view_if_needed()
    box = {name: float(plot.get_attribute(f"data-{name}")) for name in ("left", "right", "top", "bottom", "first", "last")}
    area = plot.bounding_box()
    across = box["left"] + (50 - box["first"]) / (box["last"] - box["first"]) * (box["right"] - box["left"])
    down = box["bottom"] - 0.25 * (box["bottom"] - box["top"]) / 20
    plot.hover(position={"x": across * area["width"], "y": down * area["height"]})
    text = figure.locator("output").inner_text()
    assert text.startswith("step 50 ")
    assert text.endswith(f"{HOSTILE}: 5")


def test_tab_reaches_links_sliders_and_tables_in_the_order_of_the_page(opened: Opened) -> None:
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    places = []
    for _ in range(25):
        page.keyboard.press("Tab")
        places.append(page.evaluate("document.activeElement.getBoundingClientRect().top + window.scrollY"))
        assert page.evaluate("document.activeElement.matches(':focus-visible')")
    assert all(later > earlier - 10 for earlier, later in pairwise(places)), "but for elements in one line"
    assert page.evaluate("[...document.querySelectorAll('input, select')].every(each => each.getAttribute('aria-label'))")


def test_without_scripts_figures_and_tables_are_there(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 1200, "height": 800})
    page = context.new_page()
    page.goto(address)
    assert page.locator("figure svg:visible").count() > 5
    page.locator("summary").first.click()
    assert page.locator("details table").first.is_visible()
    context.close()


def test_a_printed_page_is_light(browser: Any, address: str) -> None:
    context = browser.new_context(color_scheme="dark", viewport={"width": 1200, "height": 800})
    page = context.new_page()
    page.goto(address)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    context.close()
