"""The pages in a headless browser: they render without errors, request nothing, and fit a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from lowvram_chat.reporting.suite_page import suite_page
from lowvram_chat.results.record import load_all
from tests.runs import Bench
from tests.samples import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Scheme = Literal["light", "dark"]

pytestmark = pytest.mark.browser
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
]
SIZES = {"phone": (360, 740), "desktop": (1280, 800)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    path = next(found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name)))
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def pages(bench: Bench) -> dict[str, Path]:
    """Return a benchmark page and a run's report, as files."""
    suite = bench.folder / "suite.html"
    suite.write_text(suite_page(load_all([ROOT / "benchmarks" / "results"])), encoding="utf-8")
    run = bench.run("r", output__sample_prompts=["Hello?"], train__max_steps=6, train__eval_steps=3)
    return {"suite": suite, "run": run / "report.html"}


def is_from_outside(url: str) -> bool:
    """Return whether a URL is neither a file nor embedded data."""
    return not url.startswith(("file:", "data:"))


def look(browser: Browser, path: Path, size: tuple[int, int], scheme: Scheme) -> tuple[Page, list[str]]:
    """Return the opened page, with its console messages, errors and requests."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on(
        "request", lambda request: problems.append(f"request: {request.url}") if is_from_outside(request.url) else None
    )
    page.goto(path.as_uri())
    return page, problems


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_a_page_renders_in_any_size_and_scheme(
    size: str, scheme: Scheme, browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    backgrounds: dict[Scheme, str] = {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 21, 26)"}
    for name, path in pages.items():
        page, problems = look(browser, path, SIZES[size], scheme)
        assert problems == []
        assert page.locator("h1").count() == 1
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == backgrounds[scheme]
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0], (
            f"{name} is wider than the window"
        )
        assert page.screenshot(path=tmp_path / "look.png", full_page=True)
        page.close()


def test_charts_are_drawn_and_their_tables_open_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    for name, path in pages.items():
        page, _ = look(browser, path, SIZES["desktop"], "light")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip", name
        assert page.locator("figure").count() >= 2
        for plot in page.locator(".plot:visible").all():
            box = plot.bounding_box()
            assert box is not None
            assert box["height"] > 100
            assert plot.get_attribute("role") == "img"
            assert plot.get_attribute("aria-label")
        summary = page.locator("figure:visible summary").first
        summary.focus()
        page.keyboard.press("Enter")
        assert page.locator("figure:visible details[open] table").first.is_visible()
        page.close()
