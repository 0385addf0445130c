"""The bodies of POST /v1/messages and of its count_tokens. Blocks and tools of kinds that are not known are kept, to be
named as ignored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from server.protocol.request_fields import (
    MAX_TOKEN_ID,
    Body,
    RequestIdText,
    SamplingFields,
    StopString,
    Whole,
    at_most,
)

MAX_TURNS = 4096
MAX_BLOCKS = 1024  # of one turn
MAX_TOOLS = 1024


class Source(Body):
    type: str | None = None
    media_type: str | None = None
    data: str | None = None


class Block(Body):
    """A block of content. Which fields it needs depends on its type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, JsonValue] | None = None
    tool_use_id: str | None = None
    content: str | Blocks | list[JsonValue] | dict[str, JsonValue] | None = None
    source: Source | None = None
    is_error: bool | None = None

    # Nothing depends on these.
    cache_control: dict[str, JsonValue] | None = None
    citations: JsonValue = None
    signature: str | None = None
    data: str | None = None
    title: str | None = None
    context: str | None = None
    caller: JsonValue = None


Blocks = Annotated[list[Block], Field(max_length=MAX_BLOCKS, fail_fast=True), at_most(MAX_BLOCKS)]


Block.model_rebuild()  # a block may hold blocks


class Turn(Body):
    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[Whole, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    display: str | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, JsonValue] = Field(alias="schema")


class OutputConfig(Body):
    effort: str | None = None
    format: OutputFormat | None = None


class CountBody(SamplingFields):
    """The body of POST /v1/messages/count_tokens: what of a message's body becomes its prompt."""

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_TURNS, fail_fast=True), at_most(MAX_TURNS)]
    system: str | Blocks | None = None
    tools: Annotated[list[dict[str, JsonValue]], Field(max_length=MAX_TOOLS), at_most(MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(None, description="the older name of output_config.format")
    chat_template_kwargs: dict[str, JsonValue] | None = None
    strict: bool | None = Field(None, description="refuse fields that the server does not know")

    # Accepted, because they do not change the text.
    max_tokens: Annotated[Whole, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    cache_control: dict[str, JsonValue] | None = None
    metadata: dict[str, JsonValue] | None = None
    service_tier: str | None = None
    context_management: dict[str, JsonValue] | None = None
    container: JsonValue = None
    inference_geo: str | None = None
    mcp_servers: Annotated[list[JsonValue], Field(max_length=0)] | None = None


class MessagesBody(CountBody):
    """The body of POST /v1/messages."""

    max_tokens: Annotated[Whole, Field(ge=1, le=MAX_TOKEN_ID)]
    stop_sequences: Annotated[list[StopString], Field(max_length=16, fail_fast=True), at_most(16)] | None = None
    stream: bool | None = None
    priority: Annotated[Whole, Field(ge=-(2**31), le=2**31 - 1)] | None = Field(None, description="lower runs first")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    request_id: RequestIdText | None = None
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = Field(None, description="seconds")
