"""The requests of OpenAI's API that are understood, field by field; any other field is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from distllm.core import MOST_BIASES, MOST_LOGPROBS, SamplingParams
from distllm.grammars import json_grammar
from distllm.serve import tools

COMPLETION_TOKENS = 16  # OpenAI's, where a request does not say
NO_LIMIT = 2**31 - 1  # the model's context is one

Text = Annotated[str, StringConstraints(min_length=1)]
Stop = Text | Annotated[list[Text], Field(max_length=16)]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Strict(BaseModel):
    """A model that refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    name: Name
    arguments: str


class CalledTool(Strict):
    """A call that the model has made before."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are the assistant's")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id is for the role tool, which needs it")
        return self

    def plain(self) -> dict[str, Any]:
        """Its role, its text, and the calls in it."""
        parts = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        calls = [{"name": each.function.name, "arguments": each.function.arguments} for each in self.tool_calls or ()]
        return {"role": "system" if self.role == "developer" else self.role, "content": parts, "tool_calls": calls}


class Function(Strict):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    name: Name
    description: str | None = None
    definition: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]

    def grammar(self) -> str:
        return ""


class ObjectFormat(Strict):
    type: Literal["json_object"]

    def grammar(self) -> str:
        return json_grammar()


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema

    def grammar(self) -> str:
        return json_grammar(self.json_schema.definition)


class StreamOptions(Strict):
    include_usage: bool = False


class Generation(Strict):
    """What both kinds of requests have."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MOST_BIASES)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stop | None = None
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    def params(self) -> SamplingParams:
        """As the engine takes them; where OpenAI's API has a default, it is that."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=self.most_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            logprobs=self.alternatives,
            seed=self.seed,
            stop=tuple(stop),
            grammar=self.grammar(),
        )

    def grammar(self) -> str:
        """What the answer must follow; nothing if it may be anything."""
        return "" if self.response_format is None else self.response_format.grammar()

    @property
    def usable_tools(self) -> list[dict[str, Any]]:
        """Those that the model may call."""
        return []

    @property
    def most_tokens(self) -> int:
        """Of the answer."""
        raise NotImplementedError

    @property
    def alternatives(self) -> int | None:
        """Likeliest tokens to tell besides each token and how likely it was; None if not even that is wanted."""
        raise NotImplementedError


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs=true")
        if self.tools is None and self.tool_choice not in (None, "none"):
            raise ValueError("tool_choice is for tools")
        if isinstance(self.tool_choice, NamedTool) and not self.usable_tools:
            raise ValueError(f"tool_choice: there is no tool {self.tool_choice.function.name}")
        if self.usable_tools and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("response_format cannot be followed where tools may be called: give tool_choice=none")
        return self

    @property
    def usable_tools(self) -> list[dict[str, Any]]:
        choice = self.tool_choice
        only = choice.function.name if isinstance(choice, NamedTool) else None
        return [
            each.function.model_dump(exclude_none=True, exclude={"strict"})
            for each in self.tools or ()
            if choice != "none" and only in (None, each.function.name)
        ]

    def grammar(self) -> str:
        if not (usable := self.usable_tools):
            return super().grammar()
        must = self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)
        return tools.grammar(usable, must=must, several=self.parallel_tool_calls is not False)

    @property
    def most_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or NO_LIMIT

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def most_tokens(self) -> int:
        return self.max_tokens or COMPLETION_TOKENS

    @property
    def alternatives(self) -> int | None:
        return self.logprobs
