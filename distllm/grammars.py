"""Writes the grammars that answers can be made to follow, in the form of llguidance. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from llguidance import LLMatcher

# As json.dumps writes it. Where any white space may stand, small models write nothing else.
WHITE_SPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
SPACED = {"x-guidance": WHITE_SPACE}


def json_grammar(schema: Mapping[str, object] | None = None) -> str:
    """The grammar of JSON that follows a schema; of any object without one.

    For `SamplingParams.grammar`. What of JSON Schema is understood is llguidance's affair; what is not is refused when
    the request is made.
    """
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema or {"type": "object"}), WHITE_SPACE))


def tagged_grammar(
    trigger: str, tags: Sequence[tuple[str, Mapping[str, object], str]], *, must: bool, several: bool
) -> str:
    """The grammar of text with JSON between tags in it.

    Args:
        trigger: what the beginnings of all tags begin with; where it is written, a tag follows.
        tags: of each the beginning, the schema of the JSON, and the end.
        must: there is a tag, and nothing else.
        several: there may be more than one.
    """
    rest = [
        f"{json.dumps(begin.removeprefix(trigger))} %json {json.dumps({**schema, **SPACED})} {json.dumps(end)}"
        for begin, schema, end in tags
    ]
    any_rest = " | ".join(f"rest_{place}" for place in range(len(tags)))
    rules = [f"rest: {any_rest}", *(f"rest_{place}: {each}" for place, each in enumerate(rest))]
    if must:
        start = 'start: tag ("\\n" tag)*' if several else "start: tag"
        rules += [start, f"tag: {json.dumps(trigger)} rest"]
    else:
        start = "start: (lead rest)* TEXT" if several else "start: TEXT | lead rest"
        rules += [start, f"lead[lazy]: /(.|\\n)*/ {json.dumps(trigger)}", "TEXT: /(.|\\n)*/"]
    return "\n".join(["%llguidance {}", *rules])
