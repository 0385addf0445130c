"""The bodies of POST /api/chat and /api/generate, and the lines of their answers."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Field, JsonValue

from server.protocol.request_fields import MAX_TOKEN_ID, Body, SamplingFields, StopString, Whole, at_most

MAX_MESSAGES = 2048
MAX_TOOLS = 1024


class Function(Body):
    name: str
    arguments: dict[str, JsonValue] | None = None


class Call(Body):
    function: Function
    id: str | None = None


class OllamaMessage(Body):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: Annotated[list[JsonValue], Field(max_length=0)] | None = Field(
        None, description="the model reads text only"
    )
    tool_calls: Annotated[list[Call], Field(max_length=256), at_most(256)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Options(SamplingFields):
    """Ollama's names of sampling fields, beside ours."""

    num_predict: Annotated[Whole, Field(ge=-2, le=MAX_TOKEN_ID)] | None = Field(None, description="below 0: any number")
    repeat_penalty: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True), at_most(16)] | None = None
    num_ctx: Whole | None = Field(None, description="has no effect: the context is the server's")


class OllamaBody(Body):
    """What both endpoints share. `keep_alive` has no effect: the model stays loaded."""

    model: str
    stream: bool | None = Field(None, description="default true")
    format: Literal["", "json"] | dict[str, JsonValue] | None = Field(None, description="json, or a JSON schema")
    options: Options | None = None
    think: bool | str | None = None
    keep_alive: JsonValue = None


class OllamaChatBody(OllamaBody):
    messages: Annotated[list[OllamaMessage], Field(max_length=MAX_MESSAGES, fail_fast=True), at_most(MAX_MESSAGES)] = (
        Field([], description="none: whether the model is loaded, without an answer")
    )
    tools: Annotated[list[dict[str, JsonValue]], Field(max_length=MAX_TOOLS), at_most(MAX_TOOLS)] | None = None


class OllamaGenerateBody(OllamaBody):
    prompt: str = Field("", description="empty, without a system: whether the model is loaded, without an answer")
    system: str | None = None
    suffix: Literal[""] | None = None
    images: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    raw: Literal[False] | None = Field(None, description="for prompts without a template there is /v1/completions")
    template: Literal[""] | None = None
    context: Annotated[list[JsonValue], Field(max_length=0)] | None = None


class SaidFunction(msgspec.Struct):
    name: str
    arguments: msgspec.Raw


class SaidCall(msgspec.Struct):
    id: str
    function: SaidFunction


class SaidMessage(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    thinking: str | UnsetType = UNSET
    tool_calls: list[SaidCall] | UnsetType = UNSET


class Line(msgspec.Struct, kw_only=True):
    """A piece of an answer, or with `done` its end. Durations in nanoseconds."""

    model: str
    created_at: str
    message: SaidMessage | UnsetType = UNSET  # of /api/chat
    response: str | UnsetType = UNSET  # of /api/generate
    thinking: str | UnsetType = UNSET  # of /api/generate
    done: bool = False
    done_reason: str | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET


class ErrorLine(msgspec.Struct):
    error: str


class Details(msgspec.Struct, kw_only=True):
    format: str = ""
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str = ""


class Tag(msgspec.Struct, kw_only=True):
    name: str
    model: str
    modified_at: str
    size: int = 0
    digest: str
    details: Details


class Tags(msgspec.Struct):
    models: list[Tag]


class OllamaVersion(msgspec.Struct):
    version: str
