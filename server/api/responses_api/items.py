"""The objects of the Responses API as msgspec structs: items, the response, and the events of a stream."""

from __future__ import annotations

from typing import Literal

import msgspec

from server.protocol.responses import ChatTokenLogprob

Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


class Typed(msgspec.Struct, kw_only=True, tag_field="type"):
    """What says its type."""


class OutputText(Typed, tag="output_text", kw_only=True):
    text: str = ""
    annotations: list[str] = []
    logprobs: list[ChatTokenLogprob] = []


class ReasoningText(Typed, tag="reasoning_text", kw_only=True):
    text: str = ""


class MessageItem(Typed, tag="message", kw_only=True):
    id: str
    status: Status = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []


class ReasoningItem(Typed, tag="reasoning", kw_only=True):
    id: str
    status: Status = "in_progress"
    summary: list[str] = []
    content: list[ReasoningText] = []


class FunctionCallItem(Typed, tag="function_call", kw_only=True):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Status = "in_progress"


OutputItem = MessageItem | ReasoningItem | FunctionCallItem


class InputDetails(msgspec.Struct):
    cached_tokens: int


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseError(msgspec.Struct):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    reason: str


class ReasoningOptions(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None


class ResponseObject(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    completed_at: int | None = None
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    reasoning: ReasoningOptions = msgspec.field(default_factory=lambda: ReasoningOptions())
    store: bool = False
    temperature: float | None = None
    text: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b'{"format":{"type":"text"}}'))
    tool_choice: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b'"auto"'))
    tools: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"[]"))
    top_logprobs: int = 0
    top_p: float | None = None
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class Event(Typed, kw_only=True):
    sequence_number: int


class Created(Event, tag="response.created", kw_only=True):
    response: ResponseObject


class InProgress(Event, tag="response.in_progress", kw_only=True):
    response: ResponseObject


class Completed(Event, tag="response.completed", kw_only=True):
    response: ResponseObject


class Incomplete(Event, tag="response.incomplete", kw_only=True):
    response: ResponseObject


class Failed(Event, tag="response.failed", kw_only=True):
    response: ResponseObject


class ItemAdded(Event, tag="response.output_item.added", kw_only=True):
    output_index: int
    item: OutputItem


class ItemDone(Event, tag="response.output_item.done", kw_only=True):
    output_index: int
    item: OutputItem


class OfItem(Event, kw_only=True):
    item_id: str
    output_index: int


class OfPart(OfItem, kw_only=True):
    content_index: int = 0


class PartAdded(OfPart, tag="response.content_part.added", kw_only=True):
    part: OutputText | ReasoningText


class PartDone(OfPart, tag="response.content_part.done", kw_only=True):
    part: OutputText | ReasoningText


class TextDelta(OfPart, tag="response.output_text.delta", kw_only=True):
    delta: str
    logprobs: list[ChatTokenLogprob] = []


class TextDone(OfPart, tag="response.output_text.done", kw_only=True):
    text: str
    logprobs: list[ChatTokenLogprob] = []


class ReasoningDelta(OfPart, tag="response.reasoning_text.delta", kw_only=True):
    delta: str


class ReasoningDone(OfPart, tag="response.reasoning_text.done", kw_only=True):
    text: str


class ArgumentsDelta(OfItem, tag="response.function_call_arguments.delta", kw_only=True):
    delta: str


class ArgumentsDone(OfItem, tag="response.function_call_arguments.done", kw_only=True):
    name: str
    arguments: str


class Deletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class ItemList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[msgspec.Raw]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False
