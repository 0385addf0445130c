"""What is generated, as the blocks of a message and as the events of its stream.

The grammar of a stream: `message_start`, then blocks one after the other, each from `content_block_start` to
`content_block_stop`, then `message_delta` and `message_stop`; or at any time `error`, and nothing after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from io import StringIO

import msgspec

from server.api.messages_api.blocks import (
    NO_INPUT,
    BlockDelta,
    BlockStart,
    BlockStop,
    ContentBlock,
    ErrorEvent,
    InputDelta,
    Message,
    MessageDelta,
    MessageStart,
    MessageStop,
    MessageUsage,
    SignatureDelta,
    Stop,
    StopReason,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
    Typed,
    word_error,
)
from server.errors import ApiError
from server.generation.answer_reader import AnswerReader
from server.generation.choice import Delta
from server.generation.generation import Generation
from server.parsing.answer_parts import (
    AnswerDelta,
    ContentDelta,
    ReasoningDelta,
    ToolArgumentsDelta,
    ToolCallBegin,
    ToolCallEnd,
)
from server.protocol.responses import error_reply


class BlockBuilder:
    """Makes blocks of the parts of an answer, and tells each step in events. At most one block is open at a time."""

    def __init__(self) -> None:
        self.blocks: list[ContentBlock] = []
        self._open: ContentBlock | None = None
        self._text = StringIO()

    def add(self, part: AnswerDelta) -> Iterator[Typed]:
        if isinstance(part, ToolCallBegin):
            yield from self.begin(ToolUseBlock(id=part.call_id, name=part.name))
        elif isinstance(part, ToolCallEnd):
            yield from self.close()
        elif isinstance(part, ContentDelta):
            if not isinstance(self._open, TextBlock):
                yield from self.begin(TextBlock())
            yield self._told(part.text, TextDelta(text=part.text))
        elif isinstance(part, ReasoningDelta):
            if not isinstance(self._open, ThinkingBlock):
                yield from self.begin(ThinkingBlock())
            yield self._told(part.text, ThinkingDelta(thinking=part.text))
        elif isinstance(part, ToolArgumentsDelta) and isinstance(self._open, ToolUseBlock):
            yield self._told(part.text, InputDelta(partial_json=part.text))

    def begin(self, block: ContentBlock) -> Iterator[Typed]:
        """Opens a block, and closes the one before it."""
        yield from self.close()
        self._open = block
        self.blocks.append(block)
        yield BlockStart(index=len(self.blocks) - 1, content_block=msgspec.structs.replace(block))

    def close(self) -> Iterator[Typed]:
        """Ends the block that is open, if one is."""
        block, index, text = self._open, len(self.blocks) - 1, self._text.getvalue()
        if block is None:
            return
        if isinstance(block, TextBlock):
            block.text = text
        elif isinstance(block, ThinkingBlock):
            block.thinking, block.signature = text, _signature(text)
            yield BlockDelta(index=index, delta=SignatureDelta(signature=block.signature))
        else:
            block.input = _whole_object(text)
        yield BlockStop(index=index)
        self._open, self._text = None, StringIO()

    def _told(self, text: str, delta: TextDelta | ThinkingDelta | InputDelta) -> BlockDelta:
        self._text.write(text)
        return BlockDelta(index=len(self.blocks) - 1, delta=delta)


def _signature(text: str) -> str:
    """What clients want to see before they send a thought back. Nobody checks it."""
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()


def _whole_object(text: str) -> msgspec.Raw:
    """The arguments of a call; nothing of those that were cut off."""
    try:
        value = msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        return NO_INPUT
    return msgspec.Raw(msgspec.json.encode(value)) if isinstance(value, dict) else NO_INPUT


class MessageWriter:
    """Formats one generation as a message."""

    def __init__(self, generation: Generation, *, streams: bool) -> None:
        self._generation = generation
        self._builder = BlockBuilder()
        self._reader = AnswerReader(generation.job.shape, holds_calls=not streams)
        self._has_begun = False

    def chunks(self, delta: Delta) -> Iterator[Typed]:
        if not self._has_begun:
            self._has_begun = True
            yield MessageStart(message=self._message(num_output_tokens=0))
        yield from self._parts(delta)
        if delta.finish_reason is not None:
            yield MessageDelta(delta=self._stop(delta), usage=self._usage())
            yield MessageStop()

    def text_chunk(self, index: int, text: str) -> None:
        """Blocks are numbered, so no event is known before it comes."""

    def last_chunk(self) -> None:
        """The stop says all."""

    def failure(self, error: ApiError) -> Iterator[ErrorEvent]:
        yield word_error(error.status, error_reply(error), self._generation.job.request_id)

    def reply(self, choices: list[Delta]) -> Message:
        for _ in self._parts(choices[0]):
            pass  # the blocks are made with the events
        message, stop = self._message(), self._stop(choices[0])
        message.content = self._builder.blocks
        message.stop_reason, message.stop_sequence = stop.stop_reason, stop.stop_sequence
        return message

    def _parts(self, delta: Delta) -> Iterator[Typed]:
        for part in self._reader.read(delta):
            yield from self._builder.add(part)
        if delta.finish_reason is not None:
            if not self._builder.blocks:  # clients read the first one
                yield from self._builder.begin(TextBlock())
            yield from self._builder.close()

    def _stop(self, last: Delta) -> Stop:
        reason: StopReason = "end_turn"
        if last.finish_reason == "length":
            reason = "max_tokens"
        elif self._reader.num_calls:
            reason = "tool_use"
        elif isinstance(last.stop_reason, str):
            reason = "stop_sequence"
        is_told = reason == "stop_sequence" and isinstance(last.stop_reason, str)
        return Stop(reason, str(last.stop_reason) if is_told else None)

    def _message(self, *, num_output_tokens: int | None = None) -> Message:
        job = self._generation.job
        return Message(id=job.response_id, model=job.model, usage=self._usage(num_output_tokens=num_output_tokens))

    def _usage(self, *, num_output_tokens: int | None = None) -> MessageUsage:
        counts = self._generation.counts()
        return MessageUsage(
            input_tokens=counts.num_prompt_tokens - counts.num_cached_tokens,
            cache_read_input_tokens=counts.num_cached_tokens,
            output_tokens=counts.num_output_tokens if num_output_tokens is None else num_output_tokens,
        )
