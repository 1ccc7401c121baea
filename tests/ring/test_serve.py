"""The HTTP server as people meet it: real ranks, the real client of OpenAI, real deaths."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from serving import Served
from waiting import wait_until

from distllm import LLM, SamplingParams

PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
STRANGE = rb"""{"model": "little", "prompt": "a", "response_format": {"type": "json_schema", "json_schema":
    {"name": "x", "schema": {"const": "\ud800"}}}}"""
ENDLESS = {"2": -100}  # the token that ends a text
SEEDED = {"seed": 7, "temperature": 0.9, "top_p": 0.9}


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(smollm2, tmp_path_factory.mktemp("served"))
    try:
        yield server
    finally:
        ended = server.end()
    assert ended == 0


@pytest.fixture(scope="module")
def alone(smollm2: Path) -> Iterator[LLM]:
    """The same model in this process."""
    with LLM(smollm2, dtype="float32") as llm:
        yield llm


def streamed(client: openai.OpenAI, **asked: object) -> list[str]:
    """The texts of a streamed completion."""
    chunks = client.completions.create(model="little", stream=True, **asked)  # type: ignore[call-overload]
    return [chunk.choices[0].text for chunk in chunks]


@pytest.mark.parametrize("how", [{"temperature": 0.0}, SEEDED], ids=["greedy", "seeded"])
def test_answers_are_those_of_the_library(served: Served, alone: LLM, how: dict[str, float]) -> None:
    params = SamplingParams(max_tokens=24, **how)  # type: ignore[arg-type]
    expected = alone.chat(MESSAGES, params)
    answer = served.client.chat.completions.create(model="little", messages=MESSAGES, max_tokens=24, **how)  # type: ignore
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.completion_tokens == expected.usage.completion_tokens

    chunks = list(
        served.client.chat.completions.create(  # type: ignore[call-overload]
            model="little",
            messages=MESSAGES,
            max_completion_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
            **how,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected.text
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.total_tokens) == (answer.usage.prompt_tokens, answer.usage.total_tokens)
    assert usage.prompt_tokens > usage.prompt_tokens_details.cached_tokens >= 16, "it has been answered before"


def test_several_prompts_and_choices_differ_by_their_seeds(served: Served, alone: LLM) -> None:
    prompts = [PROMPT, alone.request("Once upon a time").tokens]
    expected = [
        alone.generate(prompt, SamplingParams(max_tokens=9, **(SEEDED | {"seed": seed})))[0].text  # type: ignore
        for prompt in prompts
        for seed in (7, 8)
    ]
    answers = [
        served.client.completions.create(model="little", prompt=prompt, max_tokens=9, n=2, **SEEDED)  # type: ignore
        for prompt in prompts
    ]
    assert [choice.text for answer in answers for choice in answer.choices] == expected
    assert len(set(expected)) == 4
    together = served.client.completions.create(
        model="little", prompt=[PROMPT, "Once upon a time"], max_tokens=9, n=2, **SEEDED
    )  # type: ignore
    assert [choice.text for choice in together.choices] == expected
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]


def test_stop_strings_and_where_no_limit_is_given(served: Served) -> None:
    answer = served.client.completions.create(model="little", prompt=PROMPT, temperature=0, stop=["Paris"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" ", "stop")
    assert served.client.completions.create(model="little", prompt=PROMPT).usage.completion_tokens == 16  # type: ignore


def test_logprobs_and_alternatives(served: Served, alone: LLM) -> None:
    params = SamplingParams(max_tokens=5, logprobs=3)
    expected = alone.generate(PROMPT, params)[0]
    answer = served.client.completions.create(model="little", prompt=PROMPT, temperature=0, max_tokens=5, logprobs=3)
    told = answer.choices[0].logprobs
    assert told is not None
    assert "".join(told.tokens or ()) == expected.text
    assert told.token_logprobs == pytest.approx([each.logprob for each in expected.logprobs], abs=1e-3)
    assert [max(top, key=lambda text: top[text]) for top in told.top_logprobs or ()] == told.tokens, "greedy"
    assert all(len(top) == 3 for top in told.top_logprobs or ())
    chat = served.client.chat.completions.create(
        model="little", messages=MESSAGES, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert "".join(each.token for each in content) == chat.choices[0].message.content
    assert all(each.bytes == list(each.token.encode()) for each in content)
    assert all(each.top_logprobs[0].logprob == each.logprob <= 0 for each in content)
    assert all(len(each.top_logprobs) == 2 for each in content)


def test_bias_and_penalties_reach_the_sampler(served: Served, alone: LLM) -> None:
    (token,) = alone.request("b").tokens
    answer = served.client.completions.create(model="little", prompt="a", max_tokens=4, logit_bias={str(token): 100})
    assert answer.choices[0].text == "bbbb"
    plain = SamplingParams(max_tokens=48)
    penalised = SamplingParams(max_tokens=48, frequency_penalty=2.0, presence_penalty=1.0)
    expected = alone.generate("1 1 1 1 1 1", penalised)[0].text
    assert expected != alone.generate("1 1 1 1 1 1", plain)[0].text
    answer = served.client.completions.create(
        model="little", prompt="1 1 1 1 1 1", max_tokens=48, temperature=0, frequency_penalty=2.0, presence_penalty=1.0
    )
    assert answer.choices[0].text == expected


def test_answers_follow_a_json_schema(served: Served) -> None:
    schema = {"type": "object", "properties": {"capital": {"type": "string", "maxLength": 9}}, "required": ["capital"]}
    schema |= {"additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "capital", "schema": schema, "strict": True}}
    answer = served.client.chat.completions.create(
        model="little", messages=MESSAGES, max_tokens=60, seed=1, response_format=wanted
    )  # type: ignore[call-overload]
    assert json.loads(answer.choices[0].message.content).keys() == {"capital"}
    assert answer.choices[0].finish_reason == "stop"
    answer = served.client.chat.completions.create(
        model="little", messages=MESSAGES, max_tokens=30, seed=1, response_format={"type": "json_object"}
    )
    assert (answer.choices[0].message.content or "").startswith("{")


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_tools_are_called(served: Served) -> None:
    asked: dict[str, Any] = {"model": "little", "messages": MESSAGES, "tools": [WEATHER], "seed": 1, "max_tokens": 60}
    asked |= {"tool_choice": "required", "parallel_tool_calls": False}
    choice = served.client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")

    chunks = list(served.client.chat.completions.create(stream=True, **asked))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].function.name == "weather"
    assert "".join(each.function.arguments for each in deltas) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"

    told = [*MESSAGES, choice.message.model_dump(exclude_none=True)]
    told.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    answer = served.client.chat.completions.create(**asked | {"messages": told, "tool_choice": "none"})
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


def test_fields_that_change_nothing_are_taken(served: Served) -> None:
    asked: dict[str, Any] = {"model": "little", "temperature": 0, "max_tokens": 4}
    inert = {"user": "ann", "safety_identifier": "a", "prompt_cache_key": "b", "metadata": {"c": "d"}, "store": False}
    inert |= {"service_tier": "auto", "modalities": ["text"]}
    plain = served.client.chat.completions.create(messages=MESSAGES, **asked).choices[0].message
    assert served.client.chat.completions.create(messages=MESSAGES, **asked, **inert).choices[0].message == plain
    again = [*MESSAGES, plain.model_dump(), *MESSAGES]  # with a null for each field that it has not
    assert served.client.chat.completions.create(messages=again, **asked).choices[0].message.content


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        ({"model": "big"}, openai.NotFoundError, "no model 'big' here, but 'little'"),
        ({"extra_body": {"frob": 1}}, openai.BadRequestError, "frob"),
        ({"temperature": 3}, openai.BadRequestError, "temperature: .*less than or equal to 2"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens: .*greater than or equal to 1"),
        ({"max_tokens": "3"}, openai.BadRequestError, "max_tokens: .*integer"),
        ({"messages": []}, openai.BadRequestError, "messages: .*at least 1"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, openai.BadRequestError, r"messages\.0\.role"),
        ({"messages": [{"role": "user", "content": "Hi " * 9000}]}, openai.BadRequestError, "context takes 8192"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream=true"),
        ({"top_logprobs": 2}, openai.BadRequestError, "logprobs=true"),
        ({"logit_bias": {"999999": 1}}, openai.BadRequestError, "logit_bias has the token id 999999"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice is for tools"),
        ({"response_format": {"type": "xml"}}, openai.BadRequestError, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "frob"}},
                }
            },
            openai.BadRequestError,
            "the grammar cannot be followed: .*frob",
        ),
        ({"store": True}, openai.BadRequestError, "store"),
        ({"service_tier": "flex"}, openai.BadRequestError, "service_tier"),
        ({"n": 1000}, openai.BadRequestError, "n: .*less than or equal to 128"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_answered_is_refused_by_name(
    served: Served, asked: dict[str, object], kind: type[openai.APIStatusError], words: str
) -> None:
    with pytest.raises(kind) as refused:
        served.client.chat.completions.create(**({"model": "little", "messages": MESSAGES} | asked))  # type: ignore
    body = refused.value.body
    assert isinstance(body, dict)
    assert re.search(words, body["message"])
    assert body["type"] == "invalid_request_error"


def test_what_is_no_request_is_refused_in_the_same_shape(served: Served) -> None:
    for answer, status in (
        (httpx2.get(f"{served.url}/v1/nothing"), 404),
        (httpx2.get(f"{served.url}/v1/completions"), 405),
        (httpx2.post(f"{served.url}/v1/completions", content=b"{"), 400),
        (httpx2.post(f"{served.url}/v1/completions", json=[1]), 400),
        (httpx2.post(f"{served.url}/v1/completions", content=STRANGE), 400),
        (httpx2.post(f"{served.url}/v1/completions", json={"model": "little", "prompt": ["a"] * 300}), 400),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_models_and_health(served: Served) -> None:
    assert [each.id for each in served.client.models.list()] == ["little"]
    assert httpx2.get(f"{served.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize("victim", ["rank 0", pytest.param("a worker", marks=pytest.mark.slow)])
def test_a_stream_goes_on_when_one_dies(served: Served, alone: LLM, victim: str) -> None:
    expected = alone.generate(PROMPT, SamplingParams(max_tokens=80, **SEEDED, ignore_eos=True))[0]  # type: ignore
    asked = {"prompt": PROMPT, "max_tokens": 80, **SEEDED}
    came: list[str] = []

    def listen() -> None:
        for chunk in served.client.completions.create(model="little", stream=True, **asked):  # type: ignore
            came.append(chunk.choices[0].text)

    listener = threading.Thread(target=listen)
    listener.start()
    wait_until(lambda: len(came) >= 5, "no text came")
    dying = served.rank0() if victim == "rank 0" else served.workers()[0]
    dying.kill()
    dying.wait(10)
    before = len(came)
    listener.join(90)
    assert not listener.is_alive()
    assert len(came) > before, "it was struck in the middle"
    assert "".join(came) == expected.text
    wait_until(served.is_ready, "it does not come back")


def events(answer: httpx2.Response) -> Iterator[tuple[str, str]]:
    """The ids and texts of a stream of server-sent events."""
    last = ""
    for line in answer.iter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            last = value
        elif name == "data" and value != "[DONE]":
            yield last, json.loads(value)["choices"][0]["text"]


def test_a_stream_is_resumed_after_the_front_has_died(served: Served, alone: LLM) -> None:
    expected = alone.generate(PROMPT, SamplingParams(max_tokens=80, **SEEDED, ignore_eos=True))[0]  # type: ignore
    asked = {"model": "little", "prompt": PROMPT, "max_tokens": 80, "stream": True, **SEEDED}
    came: list[tuple[str, str]] = []
    begun: list[str] = []
    short = {"model": "little", "prompt": PROMPT, "max_tokens": 3}
    key = {"Idempotency-Key": "before"}
    before = httpx2.post(f"{served.url}/v1/completions", json=short, headers=key, timeout=60).json()
    rank0 = served.rank0()

    def listen() -> None:
        with httpx2.stream("POST", f"{served.url}/v1/completions", json=asked, timeout=60) as answer:
            begun.append(answer.headers["x-last-event-id"])
            for event in events(answer):
                came.append(event)
                if len(came) == 9:
                    served.process.kill()

    with pytest.raises(httpx2.TransportError):
        listen()
    served.process.wait(10)
    rank0.wait(30)
    came = came[:7]  # the last ones have not reached whoever asked
    served.start()
    headers = {"Last-Event-ID": came[-1][0]}
    with httpx2.stream("POST", f"{served.url}/v1/completions", json=asked, headers=headers, timeout=60) as answer:
        came += events(answer)
    assert "".join(text for _, text in came) == expected.text
    headers = {"Last-Event-ID": begun[0]}  # of a client that has heard nothing
    with httpx2.stream("POST", f"{served.url}/v1/completions", json=asked, headers=headers, timeout=60) as answer:
        assert "".join(text for _, text in events(answer)) == expected.text
    assert "going on with 1 request" in served.errors()
    again = httpx2.post(f"{served.url}/v1/completions", json=short, headers=key, timeout=60).json()
    assert again == before
    for last, status in (("cmpl-0:1", 404), (came[-1][0] + "0", 400), (came[-1][0] + "9" * 5000, 404), ("", 404)):
        headers = {"Last-Event-ID": last}
        assert httpx2.post(f"{served.url}/v1/completions", json=asked, headers=headers).status_code == status


def test_a_key_is_never_run_twice(served: Served) -> None:
    asked = {"model": "little", "prompt": PROMPT, "max_tokens": 12, "logit_bias": ENDLESS}  # the seed is drawn
    headers = {"Idempotency-Key": "one"}

    def ask(**changed: object) -> httpx2.Response:
        return httpx2.post(f"{served.url}/v1/completions", json=asked | changed, headers=headers, timeout=60)

    with pytest.raises(httpx2.ReadTimeout):  # goes away before there is an answer
        httpx2.post(f"{served.url}/v1/completions", json=asked, headers=headers, timeout=0.05)
    first, second = ask().json(), ask().json()
    assert first == second
    assert first["usage"]["completion_tokens"] == 12
    assert ask(max_tokens=13).status_code == 409
    headers["Idempotency-Key"] = "two"
    assert ask().json()["id"] != first["id"]


def test_what_a_client_leaves_is_given_up(served: Served) -> None:
    asked = {"model": "little", "prompt": PROMPT, "max_tokens": 4000, "stream": True, "logit_bias": ENDLESS}
    with httpx2.stream("POST", f"{served.url}/v1/completions", json=asked, timeout=60) as answer:
        came = events(answer)
        next(came)
        assert served.cluster()["unfinished"] == 1
        wait_until(lambda: served.cluster()["kv_blocks_used"] > 1, "it does not run")
    wait_until(lambda: served.cluster()["unfinished"] == 0, "it is wanted still", 5)
    wait_until(lambda: served.cluster()["kv_blocks_used"] == 0, "it goes on", 5)
