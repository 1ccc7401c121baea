"""What operators see of a server: its metrics, its log, and requests that take too long. Real ranks, real deaths."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_serve import PROMPT, Served
from waiting import wait_until

ENDLESS = {"257": -100}  # the token that ends a text of tiny models
TIMEOUT_S = 6
MOST_ANSWERS = 3

Series = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def served(endless: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    words = [
        "cluster.workers=2",
        f"serve.request_timeout_s={TIMEOUT_S}",
        f"serve.max_queue={MOST_ANSWERS}",
        "log_format=json",
    ]
    server = Served(endless, tmp_path_factory.mktemp("watched"), *words)
    try:
        yield server
    finally:
        ended = server.end()
    assert ended == 0
    assert any(each["message"].startswith("ending with ") for each in lines(server))


class Scrape:
    """All series as they are now; `counters` are those that never fall."""

    def __init__(self, served: Served) -> None:
        answer = httpx2.get(f"{served.url}/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        self.series: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.counters: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(answer.text):
            found = {(each.name, frozenset(each.labels.items())): each.value for each in family.samples}
            self.series |= found
            if family.type in ("counter", "histogram"):
                self.counters |= found

    def __call__(self, name: str, **labels: str) -> float:
        return self.series.get((f"distllm_{name}", frozenset(labels.items())), 0)

    def by_rank(self, name: str) -> dict[str, float]:
        return {
            dict(labels)["rank"]: value for (each, labels), value in self.series.items() if each == f"distllm_{name}"
        }

    def fell_to(self, later: Scrape) -> dict[object, tuple[float, float | None]]:
        """Counters that are less later, or gone."""
        return {
            key: (value, later.counters.get(key))
            for key, value in self.counters.items()
            if later.counters.get(key, -1) < value
        }


def ask(served: Served, **asked: object) -> httpx2.Response:
    words = {"model": "little", "prompt": PROMPT, "max_tokens": 8, "logit_bias": ENDLESS} | asked
    return httpx2.post(f"{served.url}/v1/completions", json=words, timeout=60)


def line_of(served: Served, request: str) -> dict[str, Any]:
    """What the log has of a request; it is written when the answer has been."""

    def found() -> list[dict[str, Any]]:
        return [each for each in lines(served) if each.get("request") == request]

    wait_until(found, "it is not logged", 5)
    (line,) = found()
    return line


def lines(served: Served) -> list[dict[str, Any]]:
    return [json.loads(line) for line in served.errors().splitlines()]


def test_requests_answers_and_tokens_are_counted(served: Served) -> None:
    before = Scrape(served)
    whole = ask(served, n=2).json()["usage"]
    assert list(served.client.completions.create(model="little", prompt="a", max_tokens=5, seed=1, stream=True))
    assert ask(served, model="big").status_code == 404
    assert ask(served, prompt="a" * 60_000).status_code == 400
    assert httpx2.get(f"{served.url}/v1/nothing").status_code == 404
    other = {"endpoint": "other", "status": "404"}
    wait_until(lambda: Scrape(served)("http_requests_total", **other) == 1, "requests are not counted")
    wait_until(lambda: Scrape(served)("steps_total") >= before("steps_total") + 8, "steps are not told")
    after = Scrape(served)

    def grown(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    path = {"endpoint": "/v1/completions"}
    statuses = [grown("http_requests_total", status=status, **path) for status in ("200", "404", "400")]
    assert statuses == [2, 1, 1]
    assert grown("http_request_seconds_count", **path) == 4
    ends = {each: grown("answers_total", outcome=each) for each in ("stop", "length", "refused")}
    assert ends["stop"] + ends["length"] == 3
    assert ends["refused"] == 1
    assert grown("time_to_first_token_seconds_count") == 3
    assert grown("time_per_output_token_seconds_count") == 3
    assert whole["completion_tokens"] == 16
    assert 16 < grown("completion_tokens_total") <= 21
    assert grown("prompt_tokens_total") == whole["prompt_tokens"] + 1
    assert grown("stream_events_total") == grown("completion_tokens_total") - 16 + 1, "a token each, and the end"
    assert (after("ready"), after("answers_in_flight"), after("kv_blocks_used")) == (1, 0, 0)
    assert after("kv_blocks") > 0
    assert after("journal_bytes") > 4096
    ranks = {str(rank["rank"]) for rank in served.cluster()["ranks"]}
    for name in ("stage_busy_seconds_total", "stage_wait_seconds_total", "stage_sent_bytes_total"):
        assert after.by_rank(name).keys() == ranks
        assert all(value > 0 for value in after.by_rank(name).values())
    assert after("rank0_comings_total") == 1
    assert after("prefix_tokens_total") >= 0
    assert before.fell_to(after) == {}


def test_a_killed_worker_is_a_fault_and_another_epoch(served: Served) -> None:
    ask(served)
    before = Scrape(served)
    killed = {"kind": "killed"}

    with httpx2.stream("POST", f"{served.url}/v1/completions", json=long(), timeout=60) as answer:
        came = answer.iter_lines()
        next(came)
        assert Scrape(served)("answers_in_flight") == 1
        wait_until(lambda: Scrape(served)("kv_blocks_used") > 0, "it does not run")
        assert Scrape(served)("answers_running") == 1
        worker = served.workers()[0]
        worker.kill()
        worker.wait(10)
        wait_until(lambda: Scrape(served)("faults_total", **killed) == before("faults_total", **killed) + 1, "no fault")
        wait_until(lambda: Scrape(served)("epochs_total") > before("epochs_total"), "no epoch")
    assert before.fell_to(Scrape(served)) == {}
    assert len(served.cluster()["verdicts"]) == 1
    wait_until(lambda: len(served.cluster()["ranks"]) == 2, "it does not come back")
    ask(served)
    assert before.fell_to(Scrape(served)) == {}


def test_counts_go_on_when_rank_0_begins_anew(served: Served) -> None:
    ask(served)
    before = Scrape(served)
    rank0 = served.rank0()
    rank0.kill()
    rank0.wait(10)
    wait_until(lambda: Scrape(served)("ready") == 0, "its death is not noticed")
    wait_until(lambda: Scrape(served)("ready") == 1, served.errors)
    ask(served)
    wait_until(lambda: Scrape(served)("steps_total") > before("steps_total"), "its steps are not counted")
    after = Scrape(served)
    assert before.fell_to(after) == {}
    assert after("rank0_comings_total") == before("rank0_comings_total") + 1
    assert after("faults_total", kind="killed") == before("faults_total", kind="killed") + 1
    assert after("epochs_total") > before("epochs_total")
    assert served.cluster()["verdicts"] == [], "it has begun anew"


def long(**asked: object) -> dict[str, object]:
    """What takes longer than it may."""
    return {"model": "little", "prompt": PROMPT, "max_tokens": 49_000, "logit_bias": ENDLESS, "stream": True} | asked


def test_an_answer_that_takes_too_long_ends_with_an_error(served: Served) -> None:
    before = Scrape(served)
    refused: list[openai.APIStatusError] = []

    def wait_for_all() -> None:
        with pytest.raises(openai.InternalServerError) as late:
            served.client.completions.create(**long(stream=False, n=2))  # type: ignore[call-overload]
        refused.append(late.value)

    waiting = threading.Thread(target=wait_for_all)
    waiting.start()
    stream = served.client.completions.create(**long())  # type: ignore[call-overload]
    wait_until(lambda: Scrape(served)("answers_in_flight") == MOST_ANSWERS, "they are not begun")
    assert ask(served).status_code == 429
    with pytest.raises(openai.APIError) as late:
        list(stream)
    waiting.join(30)
    for each in (late.value, *refused):
        assert (each.code, each.body["type"]) == ("timeout", "server_error")  # type: ignore[index]
        assert f"longer than {TIMEOUT_S} s" in str(each)
    assert [each.status_code for each in refused] == [504]
    late_ones = {"endpoint": "/v1/completions", "status": "504"}
    counted = before("http_requests_total", **late_ones) + 1
    wait_until(lambda: Scrape(served)("http_requests_total", **late_ones) == counted, "it is not counted")
    wait_until(lambda: Scrape(served)("kv_blocks_used") == Scrape(served)("answers_in_flight") == 0, "it goes on")
    after = Scrape(served)
    assert after("answers_total", outcome="timeout") == before("answers_total", outcome="timeout") + 3
    full = late_ones | {"status": "429"}
    assert after("http_requests_total", **full) == before("http_requests_total", **full) + 1


def test_who_goes_away_is_counted(served: Served) -> None:
    before = Scrape(served)
    with httpx2.stream("POST", f"{served.url}/v1/completions", json=long(), timeout=60) as answer:
        next(answer.iter_lines())
    gone = {"endpoint": "/v1/completions", "status": "499"}

    def grown(name: str, **labels: str) -> float:
        return Scrape(served)(name, **labels) - before(name, **labels)

    wait_until(lambda: grown("http_requests_total", **gone) == 1, "it is not noticed", 5)
    wait_until(lambda: grown("answers_total", outcome="left") == 1, "it is not given up", 5)


def test_a_request_has_an_id_and_a_line_in_the_log(served: Served) -> None:
    answer = served.client.completions.create(
        model="little", prompt="a secret", max_tokens=3, seed=1, extra_headers={"X-Request-Id": "mine/7"}
    )
    assert answer._request_id == "mine/7"
    line = line_of(served, "mine/7")
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["level"], line["logger"], line["answer"]) == ("info", "distllm.serve.access", answer.id)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (8, 3)
    assert line["pid"] == served.process.pid
    assert line["seconds"] >= 0
    for strange in ("", "two words", "x" * 129):
        given = httpx2.get(f"{served.url}/v1/nothing%0Aat%20all", headers={"X-Request-Id": strange})
        assert re.fullmatch("req-[0-9a-f]{32}", given.headers["x-request-id"])
        line = line_of(served, given.headers["x-request-id"])
        assert (line["path"], line["status"]) == ("/v1/nothing%0Aat%20all", 404)
    assert "secret" not in served.errors()


def test_every_line_of_the_log_is_json_and_says_whose_it_is(served: Served) -> None:
    found = lines(served)
    assert {"time", "level", "logger", "message", "pid"} <= set.intersection(*(set(each) for each in found))
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", each["time"]) for each in found)
    assert {each.get("rank") for each in found} >= {None, 0}
    about = [each for each in found if "takes longer than serve.request_timeout_s" in each["message"]]
    asked = {each["request"] for each in found if each.get("path") == "/v1/completions"}
    assert about
    assert {each["request"] for each in about} <= asked


def test_the_dashboard_draws_what_is_exported(served: Served) -> None:
    path = Path(__file__).parents[2] / "docs" / "grafana.json"
    text = path.read_text()
    exported = {name for name, _ in Scrape(served).series}
    panels = [panel for panel in json.loads(text)["panels"] if panel["type"] != "row"]
    used = {
        name for panel in panels for target in panel["targets"] for name in re.findall(r"distllm_\w+", target["expr"])
    }
    assert used - exported == set()
    counted = {re.sub("_(bucket|sum|count)$", "", name) for name in exported if name.startswith("distllm_")}
    drawn = {re.sub("_(bucket|sum|count)$", "", name) for name in used}
    assert {name for name in counted if not name.endswith("_created")} == drawn, "something is exported and not drawn"
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)
