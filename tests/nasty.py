"""Requests as nobody in their right mind sends them: bodies, headers and JSON schemas, as strategies."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass, field
from typing import Any

from fuzz_hooks import MODEL, MOST_TOKENS
from hypothesis import strategies as st

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": MOST_TOKENS}
TEXT = {"model": MODEL, "prompt": "Hi", "max_tokens": MOST_TOKENS}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}
FIELDS = [
    *("model", "messages", "prompt", "temperature", "top_p", "n", "stop", "seed", "logit_bias", "logprobs", "tools"),
    *("response_format", "tool_choice", "stream", "stream_options", "presence_penalty", "user", "nothing", ""),
]
# Written as they are: Python's json reads some that are no JSON, and some that it cannot hold.
NUMBERS = ["1e999", "-1e999", "NaN", "Infinity", "-0", "1" * 5000, "0.1e-400", "1e5", "9223372036854775808", "00", "1."]
CONTENT_TYPES = [
    *("application/json", "application/json; charset=utf-16", "text/plain", "application/x-www-form-urlencoded"),
    *("multipart/form-data", "multipart/form-data; boundary=x", "application/octet-stream", "", ";", "a/b/c", "ü"),
]


@dataclass(frozen=True)
class Raw:
    """A request down to its bytes."""

    method: str
    path: str
    body: bytes
    headers: dict[str, bytes] = field(default_factory=dict)


texts = st.text(st.characters(codec=None), max_size=20)  # with lone surrogates
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), texts, st.sampled_from([2**63, -(2**70), 10**400])
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))


@st.composite
def changed(draw: st.DrawFn) -> Raw:
    """A good request with some fields that are not."""
    path = draw(st.sampled_from(sorted(PATHS)))
    body = PATHS[path] | draw(st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3))
    return Raw("POST", path, json.dumps(body).encode(), JSON)


@st.composite
def broken(draw: st.DrawFn) -> Raw:
    """A good request with some bytes in place of others."""
    path = draw(st.sampled_from(sorted(PATHS)))
    body = json.dumps(PATHS[path]).encode()
    start = draw(st.integers(0, len(body)))
    stop = draw(st.integers(start, min(len(body), start + 20)))
    junk = draw(
        st.binary(max_size=8) | st.sampled_from([b"\\ud800", b"\\u0000", b"\xff", b"{" * 500, b"\n\n", b"\r\n"])
    )
    return Raw("POST", path, body[:start] + junk + body[stop:], JSON)


@st.composite
def large(draw: st.DrawFn) -> Raw:
    """A good request with a field that is large, deep or no number that can be held."""
    path = draw(st.sampled_from(sorted(PATHS)))
    size = draw(st.sampled_from([100, 1000, 100_000]))
    value = draw(
        st.sampled_from([*NUMBERS, "[" * size, "[" * size + "]" * size, '{"a":' * size + "1" + "}" * size])
        | st.sampled_from([json.dumps(each) for each in ([1] * size, ["a"] * size, "a" * size, [[1]] * size)])
        | st.just(json.dumps({str(number): 1 for number in range(size)}))
    )
    name = draw(st.sampled_from(FIELDS))
    rest = json.dumps({key: each for key, each in PATHS[path].items() if key != name})
    return Raw("POST", path, f'{rest[:-1]}, "{name}": {value}}}'.encode(), JSON)


@st.composite
def strange(draw: st.DrawFn) -> Raw:
    """A good body or none, with another method, path or headers."""
    path = draw(
        st.sampled_from([*PATHS, "/v1/models", "/health", "/ready", "/v1/cluster", "/", "//", "/v1/%00", "/v1/ü"])
    )
    method = draw(st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW"]))
    plain = st.text(string.ascii_letters + string.digits + " :,;-/üÿ", max_size=40).map(
        lambda text: text.strip().encode("latin-1")
    )
    headers = draw(
        st.dictionaries(st.sampled_from(["Idempotency-Key", "Last-Event-ID", "Authorization", "Accept"]), plain)
    )
    kind = draw(st.sampled_from(CONTENT_TYPES)).encode("latin-1")
    body = draw(
        st.sampled_from([b"", *(json.dumps(each).encode() for each in PATHS.values())]) | st.binary(max_size=40)
    )
    return Raw(method, path, body, headers | {"Content-Type": kind})


names = st.sampled_from(["a", "b", "c", "", "ü", "\ud800"])
sizes = st.sampled_from([0, 1, 2, 1000, 10**6, 2**31, 2**64, -1, 0.5])
patterns = st.sampled_from(
    [
        *("^(a+)+$", "(a|b)*a(a|b){20}", ".*a.{200}", "(a{1000}){1000}", "((a{1000}){1000}){1000}", "(?=a)b", "\\1"),
        *("^(\\p{L}|\\p{N}){1,500}$", "[", "(" * 300, "a*" * 5000, "^$", "\\ud800", "[^\\x00-\\uffff]", "(?i)ß"),
    ]
)
simple = st.one_of(
    st.sampled_from(
        [True, False, {}, {"$ref": "#"}, {"$ref": "#/$defs/a"}, {"$ref": "http://there/x"}, {"$ref": "#/a/b"}]
    ),
    st.builds(
        lambda kind: {"type": kind}, st.sampled_from(["string", "integer", "null", "frob", 3, ["string", "null"]])
    ),
    st.builds(lambda pattern: {"type": "string", "pattern": pattern}, patterns),
    st.builds(lambda low, high: {"type": "string", "minLength": low, "maxLength": high}, sizes, sizes),
    st.builds(lambda low, high: {"type": "integer", "minimum": low, "exclusiveMaximum": high}, sizes, sizes),
    st.builds(lambda step: {"type": "number", "multipleOf": step}, st.sampled_from([0, 1e-9, 982_451_653, 7, -1])),
    st.builds(lambda kind: {"type": "string", "format": kind}, st.sampled_from(["uri", "email", "date-time", "frob"])),
    st.builds(lambda value: {"const": value}, values),
    st.builds(lambda count: {"enum": [f"value {number}" for number in range(count)]}, st.sampled_from([0, 1, 5000])),
)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, max_size=4)
    mapped = st.dictionaries(names, inner, max_size=4)
    return st.one_of(
        st.builds(lambda inner, low: {"type": "array", "items": inner, "minItems": low}, inner, sizes),
        st.builds(lambda inner, low: {"prefixItems": inner, "maxItems": low}, several, sizes),
        st.builds(
            lambda inner, needed: {"type": "object", "properties": inner, "required": needed}, mapped, st.lists(names)
        ),
        st.builds(lambda inner, low: {"additionalProperties": inner, "minProperties": low}, inner, sizes),
        st.builds(lambda pattern, inner: {"patternProperties": {pattern: inner}}, patterns, inner),
        st.builds(lambda word, inner: {word: inner}, st.sampled_from(["anyOf", "allOf", "oneOf"]), several),
        st.builds(lambda inner: {"not": inner}, inner),
        st.builds(lambda inner, outer: {"$defs": {"a": inner}, **outer}, inner, mapped),
        st.builds(lambda inner: {"x-guidance": {"whitespace_pattern": "(a{99}){99}"}, "allOf": inner}, several),
    )


schemas = st.recursive(simple, _nested, max_leaves=8)


@st.composite
def constrained(draw: st.DrawFn) -> Raw:
    """A request whose answer is to follow a schema, or that has tools with one."""
    schema = draw(schemas)
    if draw(st.booleans()):
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body: dict[str, Any] = CHAT | {"response_format": wanted}
    else:
        body = CHAT | {"tools": [{"type": "function", "function": {"name": "x", "parameters": schema}}]}
        body["tool_choice"] = draw(st.sampled_from(["auto", "required"]))
    return Raw("POST", "/v1/chat/completions", json.dumps(body).encode(), JSON)


JSON = {"Content-Type": b"application/json"}
requests = st.one_of(changed(), broken(), large(), strange(), constrained(), constrained())
