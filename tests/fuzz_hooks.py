"""What schemathesis is told of the server: answers are to be short; the rest is its affair."""

from __future__ import annotations

from typing import Any

import schemathesis

MOST_TOKENS = 4
MODEL = "little"


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:  # noqa: ARG001
    """What it has made, with short answers, and in three of four cases of the model that is served."""
    if not isinstance(body, dict):
        return body
    for key in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(key), int) and body[key] > MOST_TOKENS:
            body[key] = MOST_TOKENS
    if not {"max_tokens", "max_completion_tokens"} & set(body):
        body["max_tokens"] = MOST_TOKENS
    if isinstance(body.get("model"), str) and len(str(body)) % 4:
        body["model"] = MODEL
    return body
