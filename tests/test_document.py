"""The OpenAPI document says what is true: errors in OpenAI's shape, and none that never come."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from distllm.serve.app import Server, make_app

ERROR = {"$ref": "#/components/schemas/ErrorAnswer"}


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(make_app(Server(None, model="m")))  # type: ignore[arg-type]


def test_every_error_has_openais_shape(client: TestClient) -> None:
    document: dict[str, Any] = client.get("/openapi.json").json()
    ids = []
    for path, operations in document["paths"].items():
        for operation in operations.values():
            ids.append(operation["operationId"])
            for status, answer in operation["responses"].items():
                schema = answer["content"].get("application/json", {}).get("schema")
                assert (schema == ERROR) == (int(status) >= 400 and (path, status) != ("/ready", "503")), path
            assert "422" not in operation["responses"], "what cannot be read is a 400"
    assert len(set(ids)) == len(ids)
    assert not [name for name in document["components"]["schemas"] if "Validation" in name]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_answers_come_whole_or_as_a_stream_under_keys_if_there_are_some(client: TestClient, path: str) -> None:
    operation = client.get("/openapi.json").json()["paths"][path]["post"]
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert operation["security"] == [{}, {"key": []}]
    assert {each["name"] for each in operation["parameters"]} == {"Idempotency-Key", "Last-Event-ID"}


def test_who_asks_by_another_method_is_told_which_will_do(client: TestClient) -> None:
    answer = client.get("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["type"] == "invalid_request_error"
