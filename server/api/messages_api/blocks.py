"""The objects of the Messages API as msgspec structs: blocks, the message, the events of a stream, and errors."""

from __future__ import annotations

from typing import Literal

import msgspec

from server.protocol.responses import ErrorReply

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
NO_INPUT = msgspec.Raw(b"{}")


class Typed(msgspec.Struct, kw_only=True, tag_field="type"):
    """What says its type."""


class TextBlock(Typed, tag="text", kw_only=True):
    text: str = ""


class ThinkingBlock(Typed, tag="thinking", kw_only=True):
    thinking: str = ""
    signature: str = ""


class ToolUseBlock(Typed, tag="tool_use", kw_only=True):
    id: str
    name: str
    input: msgspec.Raw = msgspec.field(default_factory=lambda: NO_INPUT)


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessageUsage(msgspec.Struct, kw_only=True):
    """input_tokens: those that were computed, beside those of the cache."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class Message(Typed, tag="message", kw_only=True):
    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ContentBlock] = []
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(msgspec.Struct):
    input_tokens: int


class MessageStart(Typed, tag="message_start", kw_only=True):
    message: Message


class BlockStart(Typed, tag="content_block_start", kw_only=True):
    index: int
    content_block: ContentBlock


class TextDelta(Typed, tag="text_delta", kw_only=True):
    text: str


class ThinkingDelta(Typed, tag="thinking_delta", kw_only=True):
    thinking: str


class SignatureDelta(Typed, tag="signature_delta", kw_only=True):
    signature: str


class InputDelta(Typed, tag="input_json_delta", kw_only=True):
    partial_json: str


class BlockDelta(Typed, tag="content_block_delta", kw_only=True):
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockStop(Typed, tag="content_block_stop", kw_only=True):
    index: int


class Stop(msgspec.Struct):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Typed, tag="message_delta", kw_only=True):
    delta: Stop
    usage: MessageUsage


class MessageStop(Typed, tag="message_stop", kw_only=True):
    pass


class ErrorDetail(msgspec.Struct):
    type: str
    message: str


class ErrorEvent(Typed, tag="error", kw_only=True):
    error: ErrorDetail
    request_id: str | None = None


ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    501: "api_error",
    503: "overloaded_error",
}


def word_error(status: int, error: ErrorReply, request_id: str) -> ErrorEvent:
    """An error in Anthropic's words. All other statuses are what the client can mend."""
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    return ErrorEvent(error=ErrorDetail(kind, error.error.message), request_id=request_id or None)
