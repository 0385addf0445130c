"""The body of POST /v1/responses. Items and tools of kinds that are not known are kept, to be named as ignored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from server.protocol.request_fields import MAX_TOKEN_ID, Body, RequestIdText, SamplingFields, Whole, at_most

MAX_ITEMS = 4096
MAX_PARTS = 1024  # of one item
MAX_TOOLS = 1024
MAX_METADATA = 16
ResponseId = Annotated[str, Field(min_length=1, max_length=256)]


class Part(Body):
    """A part of an item's content: input_text, output_text, refusal, reasoning_text or summary_text."""

    type: str
    text: str | None = None
    refusal: str | None = None


Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True), at_most(MAX_PARTS)]


class Item(Body):
    """One item of the input. Which fields it needs depends on its type; without one it is a message."""

    type: str | None = None
    role: str | None = None
    content: str | Parts | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Parts | None = None
    summary: Parts | None = None
    id: str | None = None
    status: str | None = None
    encrypted_content: str | None = None
    phase: str | None = None


class Format(Body):
    """How the text must look."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, JsonValue] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    format: Format | None = None
    verbosity: str | None = None


class Reasoning(Body):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesBody(SamplingFields):
    model: str
    input: str | Annotated[list[Item], Field(max_length=MAX_ITEMS, fail_fast=True), at_most(MAX_ITEMS)] = Field(
        description="a text of the user, or the items of a conversation"
    )
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: Annotated[Whole, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=1000)] | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[dict[str, JsonValue]], Field(max_length=MAX_TOOLS), at_most(MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, JsonValue] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, JsonValue] | None = None
    include: Annotated[list[str], Field(max_length=64), at_most(64)] | None = None
    store: bool | None = Field(None, description="keep the answer, where the server keeps any")
    previous_response_id: ResponseId | None = Field(None, description="a stored answer that this input follows")
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            at_most(MAX_METADATA),
        ]
        | None
    ) = None
    chat_template_kwargs: dict[str, JsonValue] | None = None

    priority: Annotated[Whole, Field(ge=-(2**31), le=2**31 - 1)] | None = Field(None, description="lower runs first")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    request_id: RequestIdText | None = None
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = Field(None, description="seconds")
    strict: bool | None = Field(None, description="refuse fields that the server does not know")

    # Accepted, because they do not change the text.
    truncation: Literal["auto", "disabled"] | None = Field(None, description="an input that is too long is a 400")
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    client_metadata: dict[str, JsonValue] | None = None
    max_tool_calls: Whole | None = None

    # Refused, because they would.
    background: bool | None = Field(None, description="only false")
    conversation: None = None
    prompt: None = None
