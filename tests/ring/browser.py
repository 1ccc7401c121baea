"""The system's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright
from serving import Served

CHROMIUM = shutil.which("chromium")
MISSING = "there is no Chromium: apt-get install chromium"
PATIENCE_MS = 60_000
DESKTOP = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}


@contextmanager
def chromium() -> Iterator[Browser]:
    assert CHROMIUM is not None, MISSING
    with sync_playwright() as playwright:
        expect.set_options(timeout=PATIENCE_MS)
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(browser: Browser, served: Served, **how: Any) -> Iterator[Page]:
    """The page of a server, for a moment.

    Args:
        how: of Playwright's `new_page`.

    Raises:
        AssertionError: its scripts fail, or it asks another host for something.
    """
    page = browser.new_page(**({"viewport": DESKTOP} | how))
    page.set_default_timeout(PATIENCE_MS)
    asked: set[str] = set()
    failures: list[str] = []
    page.on("request", lambda request: asked.add(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(served.url)
    try:
        yield page
    finally:
        page.close()
    assert failures == []
    assert {url for url in asked if not url.startswith(f"{served.url}/")} == set(), "it is whole by itself"


def ask(page: Page, question: str, *, most: int = 24, temperature: float = 0.0, seed: int | None = None) -> None:
    """Types a question and sends it."""
    if not page.locator("#temperature").is_visible():
        page.locator("summary").click()
    page.fill("#temperature", str(temperature))
    page.fill("#most", str(most))
    page.fill("#seed", "" if seed is None else str(seed))
    page.fill("#question", question)
    page.press("#question", "Enter")
