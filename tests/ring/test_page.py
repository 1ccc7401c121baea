"""The live page in a real browser, of a server of real ranks that die."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from browser import CHROMIUM, MISSING, PHONE, ask, chromium, visit
from playwright.sync_api import Browser, Page, Route, expect
from serving import Served
from waiting import wait_until

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)

FIRST, SECOND = "What is the capital of France?", "And of Italy?"
STORY = "Tell me a long story."
LONG = 1  # a seed with which that has more than 1,500 tokens
LEAST_CONTRAST = 4.5  # WCAG 2, level AA, for text of any size
# The contrast of each text that is seen with what is behind it, the least first.
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const light = (colour) => colour.map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const texts = [...document.querySelectorAll("body *")].filter((each) => each.checkVisibility()
    && !each.closest("svg, .unseen, button:disabled")
    && [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  return texts.map((each) => {
    const grounds = [];
    for (let at = each; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
    const [ink, ground] = [light(over([...grounds, getComputedStyle(each).color])), light(over(grounds))];
    return [(Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05), each.textContent.slice(0, 40)];
  }).sort((one, other) => one[0] - other[0]);
}"""


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(smollm2, tmp_path_factory.mktemp("served"))
    try:
        yield server
    finally:
        server.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    with visit(browser, served) as page:
        yield page


def answer(served: Served, *said: str, **how: Any) -> str:
    """The API's answer to a conversation."""
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
    how = {"temperature": 0.0, "max_completion_tokens": 24} | how
    whole = served.client.chat.completions.create(model="little", messages=messages, **how)  # type: ignore[call-overload]
    return str(whole.choices[0].message.content)


def last_answer(page: Page) -> Any:
    return page.locator("#turns .assistant p").last


def test_the_ring_is_shown(page: Page, served: Served) -> None:
    expect(page.locator("#state")).to_have_text("Ready")
    expect(page.locator("#stages .stage")).to_have_count(3)
    told = served.cluster()
    for stage, row in zip(told["ranks"], page.locator("#stages .stage").all(), strict=True):
        expect(row).to_contain_text(f"rank {stage['rank']}")
        expect(row).to_contain_text(stage["span"].replace("-", "–"))
        expect(row).to_contain_text(f"host {stage['host']} · pid {stage['pid']}")
    expect(page.locator("#ring-picture .part")).to_have_count(32)  # embeddings, 30 layers, head
    held = [f"rank {stage['rank']} holds {stage['span']}" for stage in told["ranks"]]
    expect(page.get_by_role("img", name=f"A ring of 3 stages: {', '.join(held)}")).to_be_visible()
    expect(page.get_by_role("log", name="Events").get_by_text("Ready", exact=True).first).to_be_visible()
    expect(page.locator("#no-requests")).to_be_visible()


def test_a_chat_streams_what_the_api_answers(page: Page, served: Served) -> None:
    expect(page.locator("#send")).to_be_enabled()
    page.evaluate("""() => {
      window.lengths = new Set();
      new MutationObserver(() => window.lengths.add(document.querySelector("#turns .assistant p")?.textContent.length))
        .observe(document.getElementById("turns"), { subtree: true, childList: true, characterData: true });
    }""")
    first = answer(served, FIRST)
    ask(page, FIRST)
    expect(last_answer(page)).to_have_text(first)
    assert page.evaluate("window.lengths.size") > 5, "it came piece by piece"
    expect(page.locator("#send")).to_be_visible()
    ask(page, SECOND)
    expect(last_answer(page)).to_have_text(answer(served, FIRST, first, SECOND))
    page.get_by_role("button", name="New conversation").click()
    ask(page, FIRST)
    expect(page.locator("#turns .assistant p")).to_have_count(1)
    expect(last_answer(page)).to_have_text(first)


def test_what_goes_wrong_is_said_in_words_and_an_answer_can_be_stopped(page: Page, served: Served) -> None:
    expect(page.locator("#send")).to_be_enabled()
    ask(page, FIRST, temperature=3)
    expect(page.locator("#turns .failed small")).to_have_text(re.compile("temperature: .* less than or equal to 2"))
    page.fill("#temperature", "0")
    page.get_by_role("button", name="Try again").click()
    expect(last_answer(page)).to_have_text(answer(served, FIRST))
    page.get_by_role("button", name="New conversation").click()
    ask(page, STORY, most=4000, temperature=1, seed=LONG)
    expect(page.locator("#request-list .running")).to_have_count(1)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#turns .assistant small").last).to_have_text("Stopped.")
    wait_until(lambda: served.cluster()["unfinished"] == 0, "it goes on", 10)
    expect(page.locator("#no-requests")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_a_phone_and_in_both_schemes(browser: Browser, served: Served, scheme: Any) -> None:
    with visit(browser, served, viewport=PHONE, color_scheme=scheme, reduced_motion="reduce") as page:
        expect(page.locator("#stages .stage")).to_have_count(3)
        ask(page, "x" * 300, most=9)
        expect(page.locator("#turns [data-done]")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", ground)[0]) > 128) == (scheme == "light")
        least, text = page.evaluate(CONTRASTS)[0]
        assert least >= LEAST_CONTRAST, text


def test_a_death_is_seen_and_the_chat_ends_whole(page: Page, served: Served) -> None:
    expect(page.locator("#stages .stage")).to_have_count(3)
    expected = answer(served, STORY, max_completion_tokens=120)
    ask(page, STORY, most=120)
    expect(last_answer(page)).to_have_text(re.compile(r"\w+ \w+ \w+"))
    victim = served.workers()[0]
    victim.kill()
    wait_until(lambda: served.cluster()["mending"], "it is not told at once, and it is soon over")
    lost = page.locator("#stages .lost")
    expect(lost).to_contain_text("Killed by SIGKILL")
    expect(lost).to_contain_text(f"pid {victim.pid}")
    expect(page.locator("#state")).to_have_attribute("data-state", "mending")
    rank = (lost.locator(".who").text_content() or "").split()[-1]
    event = page.locator("#event-list .lost").first
    host = served.cluster()["ranks"][0]["host"]
    expect(event).to_contain_text(f"Rank {rank} (host {host}, pid {victim.pid}) is lost: killed by SIGKILL")
    expect(page.locator("#event-list .recovered").first).to_contain_text("The ranks go on after")
    expect(page.locator("#stages .stage")).to_have_count(2)
    spans = [stage["span"].replace("-", "–") for stage in served.cluster()["ranks"]]
    assert page.locator("#stages .stage .holds").all_text_contents() == spans
    expect(last_answer(page)).to_have_text(expected)
    expect(page.locator("#stages .lost")).to_have_count(0)
    expect(page.locator("#event-list .joined").first).to_contain_text(f"Rank {rank}")
    expect(page.locator("#state")).to_have_text("Ready")


def test_an_answer_whose_stream_breaks_before_its_first_event_is_not_asked_for_anew(page: Page, served: Served) -> None:
    expect(page.locator("#send")).to_be_enabled()
    heads: list[str | None] = []

    def lose_first(route: Route) -> None:
        heads.append(route.request.headers.get("last-event-id"))
        if len(heads) == 1:
            route.fulfill(response=route.fetch(), body="")
        else:
            route.continue_()

    page.route("**/v1/chat/completions", lose_first)
    ask(page, FIRST)
    expect(page.locator("#turns [data-done=stop], #turns [data-done=length]")).to_be_visible()
    assert last_answer(page).text_content() == answer(served, FIRST)
    assert len(heads) == 2
    assert heads[0] is None
    assert re.fullmatch(r"chatcmpl-\w+:0", heads[1] or "")


def test_rank_0_is_told_of_when_it_dies_and_comes_back(page: Page, served: Served) -> None:
    expect(page.locator("#state")).to_have_text("Ready")
    served.rank0().kill()
    expect(page.locator("#state")).to_have_text("Rank 0 is being started again")
    expect(page.locator("#event-list .ended").first).to_contain_text("Rank 0 was killed by SIGKILL")
    expect(page.locator("#state")).to_have_text("Ready")
    expect(page.locator("#stages .stage")).to_have_count(3)


@pytest.mark.slow
def test_the_page_waits_for_a_server_that_is_away_and_its_chat_goes_on(page: Page, served: Served) -> None:
    expect(page.locator("#state")).to_have_text("Ready")
    expected = answer(served, STORY, max_completion_tokens=200)
    ask(page, STORY, most=200)
    expect(last_answer(page)).to_have_text(re.compile(r"\w+ \w+ \w+"))
    rank0 = served.rank0()
    served.process.kill()
    served.process.wait(10)
    expect(page.locator("#state")).to_have_text("The server does not answer; trying again")
    expect(page.locator("#turns .assistant small").last).to_contain_text("The connection broke")
    assert (last_answer(page).text_content() or "") != expected, "it was struck in the middle"
    psutil.wait_procs([rank0], 30)
    starting = threading.Thread(target=served.start)
    starting.start()
    expect(page.locator("#state")).to_have_text("The model is loading")
    expect(page.locator("#state")).to_have_text("Ready", timeout=90_000)
    starting.join(90)
    expect(last_answer(page)).to_have_text(expected)


def test_without_a_key_nothing_is_told(browser: Browser, model: Path, tmp_path: Path) -> None:
    key = "a-key-for-this-test"
    (tmp_path / "keys").write_text(f"ann {key}\n")
    served = Served(model, tmp_path, "cluster.workers=1", f"serve.api_keys_file={tmp_path / 'keys'}")
    try:
        with visit(browser, served) as page:
            expect(page.get_by_label("This server wants an API key")).to_be_visible()
            assert "little" not in page.content()
            expect(page.locator("#stages li")).to_have_count(0)
            for given, seen in (("wrong", "That key is not valid."), (key, "")):
                page.get_by_label("This server wants an API key").fill(given)
                page.get_by_role("button", name="Use it").click()
                expect(page.locator("#key-error")).to_have_text(seen)
            expect(page.locator("#state")).to_have_text("Ready")
            expect(page.locator("#model")).to_have_text("little")
            assert page.evaluate("[localStorage.length, document.cookie, location.href]") == [0, "", f"{served.url}/"]
            page.reload()
            expect(page.locator("#state")).to_have_text("Ready")
        with_key = {"Authorization": f"Bearer {key}"}
        assert httpx2.get(served.url).content == httpx2.get(served.url, headers=with_key).content
        assert httpx2.get(f"{served.url}/v1/cluster").status_code == 401
    finally:
        served.end()
