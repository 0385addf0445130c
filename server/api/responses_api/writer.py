"""What is generated, as the items of a response and as the events of its stream.

The grammar of a stream: `created`, `in_progress`, then items one after the other, each from `output_item.added` to
`output_item.done`, and at the end one of `completed`, `incomplete` and `failed`. Numbers follow each other from 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from io import StringIO

import msgspec

from server.api.responses_api.fields import ResponsesBody
from server.api.responses_api.items import (
    ArgumentsDelta,
    ArgumentsDone,
    Completed,
    Created,
    Event,
    Failed,
    FunctionCallItem,
    Incomplete,
    IncompleteDetails,
    InProgress,
    InputDetails,
    ItemAdded,
    ItemDone,
    MessageItem,
    OutputDetails,
    OutputItem,
    OutputText,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    ReasoningItem,
    ReasoningOptions,
    ReasoningText,
    ResponseError,
    ResponseObject,
    ResponseUsage,
    Status,
    TextDelta,
    TextDone,
)
from server.api.token_logprobs import TokenNames, chat_logprobs
from server.errors import ApiError
from server.generation.answer_reader import AnswerReader
from server.generation.choice import Delta
from server.generation.generation import Generation
from server.parsing.answer_parts import (
    AnswerDelta,
    ContentDelta,
    ToolArgumentsDelta,
    ToolCallBegin,
    ToolCallEnd,
)
from server.parsing.answer_parts import ReasoningDelta as Thought
from server.protocol.responses import ChatTokenLogprob
from server.text.tokenizer import LONG_TEXT

OnEnd = Callable[[ResponseObject], None]


class ItemBuilder:
    """Makes items of the parts of an answer, and tells each step in events. At most one item is open at a time."""

    def __init__(self, suffix: str) -> None:
        """suffix: of the ids of items"""
        self.items: list[OutputItem] = []
        self.sequence_number = 0
        self._suffix = suffix
        self._open: OutputItem | None = None
        self._text = StringIO()
        self._logprobs: list[ChatTokenLogprob] = []

    def number(self) -> int:
        """The number of the next event."""
        self.sequence_number += 1
        return self.sequence_number - 1

    def add(self, part: AnswerDelta, logprobs: list[ChatTokenLogprob]) -> Iterator[Event]:
        """logprobs: of the tokens of a text, where they are asked for"""
        if isinstance(part, ToolCallBegin):
            yield from self.close("completed")
            call = FunctionCallItem(id=self._id("fc"), call_id=part.call_id, name=part.name)
            yield from self._begin(call)
        elif isinstance(part, ToolCallEnd):
            yield from self.close("completed")
        elif isinstance(part, ContentDelta | Thought):
            kind, prefix = (MessageItem, "msg") if isinstance(part, ContentDelta) else (ReasoningItem, "rs")
            if not isinstance(self._open, kind):
                yield from self.close("completed")
                yield from self._begin(kind(id=self._id(prefix)))
            yield self._told(part.text, logprobs)
        elif isinstance(part, ToolArgumentsDelta) and isinstance(self._open, FunctionCallItem):
            yield self._told(part.text, [])

    def add_logprobs(self, logprobs: list[ChatTokenLogprob]) -> Iterator[Event]:
        """Of tokens without a text, such as the one that ends it."""
        if logprobs and isinstance(self._open, MessageItem):
            yield self._told("", logprobs)

    def close(self, status: Status) -> Iterator[Event]:
        """Ends the item that is open, if one is."""
        item, index, text = self._open, len(self.items) - 1, self._text.getvalue()
        if item is None:
            return
        item.status = status
        if isinstance(item, FunctionCallItem):
            item.arguments = text
            yield ArgumentsDone(
                item_id=item.id, output_index=index, name=item.name, arguments=text, sequence_number=self.number()
            )
        elif isinstance(item, MessageItem):
            part = OutputText(text=text, logprobs=self._logprobs)
            item.content = [part]
            yield TextDone(
                item_id=item.id, output_index=index, text=text, logprobs=self._logprobs, sequence_number=self.number()
            )
            yield PartDone(item_id=item.id, output_index=index, part=part, sequence_number=self.number())
        else:
            thought = ReasoningText(text=text)
            item.content = [thought]
            yield ReasoningDone(item_id=item.id, output_index=index, text=text, sequence_number=self.number())
            yield PartDone(item_id=item.id, output_index=index, part=thought, sequence_number=self.number())
        yield ItemDone(output_index=index, item=item, sequence_number=self.number())
        self._open, self._text, self._logprobs = None, StringIO(), []

    def add_empty_message(self) -> Iterator[Event]:
        """For an answer that says nothing: clients read its first item."""
        yield from self._begin(MessageItem(id=self._id("msg")))

    def _begin(self, item: OutputItem) -> Iterator[Event]:
        self._open = item
        self.items.append(item)
        index = len(self.items) - 1
        yield ItemAdded(output_index=index, item=msgspec.structs.replace(item), sequence_number=self.number())
        if not isinstance(item, FunctionCallItem):
            part = OutputText() if isinstance(item, MessageItem) else ReasoningText()
            yield PartAdded(item_id=item.id, output_index=index, part=part, sequence_number=self.number())

    def _told(self, text: str, logprobs: list[ChatTokenLogprob]) -> Event:
        item, index = self._open, len(self.items) - 1
        assert item is not None
        self._text.write(text)
        if isinstance(item, FunctionCallItem):
            return ArgumentsDelta(item_id=item.id, output_index=index, delta=text, sequence_number=self.number())
        if isinstance(item, ReasoningItem):
            return ReasoningDelta(item_id=item.id, output_index=index, delta=text, sequence_number=self.number())
        self._logprobs += logprobs
        return TextDelta(
            item_id=item.id, output_index=index, delta=text, logprobs=logprobs, sequence_number=self.number()
        )

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{self._suffix}_{len(self.items)}"


class ResponsesWriter:
    """Formats one generation as a response. on_end: told the response when it has ended without an error"""

    def __init__(
        self, body: ResponsesBody, generation: Generation, names: TokenNames, *, is_stored: bool, on_end: OnEnd
    ) -> None:
        self._body, self._generation, self._names = body, generation, names
        self._on_end, self._is_stored = on_end, is_stored
        self._builder = ItemBuilder(generation.job.request_id)
        self._reader = AnswerReader(generation.job.shape, holds_calls=not body.stream)
        self._has_begun = False

    def chunks(self, delta: Delta) -> list[Event]:
        """All at once: encoding a large event may use up the items that later ones are made of."""
        return list(self._events(delta))

    def _events(self, delta: Delta) -> Iterator[Event]:
        yield from self._opening()
        yield from self._parts(delta)
        if delta.finish_reason is not None:
            response = self._response(delta)
            self._on_end(response)
            event = Completed if response.status == "completed" else Incomplete
            yield event(response=response, sequence_number=self._builder.number())

    def text_chunk(self, index: int, text: str) -> None:
        """Every event has a number, so none is known before it comes."""

    def last_chunk(self) -> None:
        """The response says all."""

    def failure(self, error: ApiError) -> Iterator[Event]:
        yield from self._opening()
        yield from self._builder.close("incomplete")
        response = self._skeleton("failed")
        response.output = self._builder.items
        response.error = ResponseError(error.code or error.type, error.message)
        yield Failed(response=response, sequence_number=self._builder.number())

    def reply(self, choices: list[Delta]) -> ResponseObject:
        for _ in self._parts(choices[0]):
            pass  # the items are made with the events
        response = self._response(choices[0])
        self._on_end(response)
        return response

    def _opening(self) -> Iterator[Event]:
        if not self._has_begun:
            self._has_begun = True
            yield Created(response=self._skeleton("in_progress"), sequence_number=self._builder.number())
            yield InProgress(response=self._skeleton("in_progress"), sequence_number=self._builder.number())

    def _parts(self, delta: Delta) -> Iterator[Event]:
        logprobs = self._logprobs(delta)
        for part in self._reader.read(delta):
            yield from self._builder.add(part, logprobs)
            if isinstance(part, ContentDelta):
                logprobs = []
        yield from self._builder.add_logprobs(logprobs)
        if delta.finish_reason is not None:
            if not self._builder.items:
                yield from self._builder.add_empty_message()
            yield from self._builder.close("incomplete" if delta.finish_reason == "length" else "completed")

    def _logprobs(self, delta: Delta) -> list[ChatTokenLogprob]:
        if not delta.logprobs:
            return []
        return chat_logprobs(delta.logprobs, self._names, num_top=self._body.top_logprobs or 0).content

    def _response(self, last: Delta) -> ResponseObject:
        is_cut = last.finish_reason == "length"
        response = self._skeleton("incomplete" if is_cut else "completed")
        response.output = self._builder.items
        response.usage = self._usage()
        response.completed_at = int(time.time())
        if is_cut:
            reason = "timeout" if last.stop_reason == "timeout" else "max_output_tokens"
            response.incomplete_details = IncompleteDetails(reason)
        return response

    def _usage(self) -> ResponseUsage:
        counts = self._generation.counts()
        num_thought = self._num_reasoning_tokens(counts.num_output_tokens)
        return ResponseUsage(
            input_tokens=counts.num_prompt_tokens,
            input_tokens_details=InputDetails(counts.num_cached_tokens),
            output_tokens=counts.num_output_tokens,
            output_tokens_details=OutputDetails(num_thought),
            total_tokens=counts.num_prompt_tokens + counts.num_output_tokens,
        )

    def _num_reasoning_tokens(self, num_output_tokens: int) -> int:
        """Tokens of the thoughts alone: counted, or where there are very many their share of all characters."""
        thoughts = [
            part.text for item in self._builder.items if isinstance(item, ReasoningItem) for part in item.content
        ]
        num_characters = sum(map(len, thoughts))
        if num_characters >= LONG_TEXT:
            num_others = sum(map(_num_characters, self._builder.items))
            return round(num_output_tokens * num_characters / max(num_characters + num_others, 1))
        encode = self._names.tokenizer.encode
        return min(sum(len(encode(text, add_special_tokens=False)) for text in thoughts), num_output_tokens)

    def _skeleton(self, status: Status) -> ResponseObject:
        """All that is known before anything is generated."""
        body, job = self._body, self._generation.job
        params = job.choices[0].request.params
        response = ResponseObject(
            id=job.response_id,
            created_at=job.created,
            status=status,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            model=job.model,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            store=self._is_stored,
            temperature=params.temperature,
            top_p=params.top_p,
            top_logprobs=body.top_logprobs or 0,
            truncation=body.truncation or "disabled",
            user=body.user,
        )
        if body.reasoning is not None:
            summary = body.reasoning.summary or body.reasoning.generate_summary
            response.reasoning = ReasoningOptions(body.reasoning.effort, summary)
        if body.text is not None and body.text.format is not None:
            response.text = _raw(body.text.model_dump(by_alias=True, exclude_none=True))
        if body.tools:
            response.tools = _raw(body.tools)
        if body.tool_choice is not None:
            response.tool_choice = _raw(body.tool_choice)
        return response


def _num_characters(item: OutputItem) -> int:
    """Of what is no thought."""
    if isinstance(item, FunctionCallItem):
        return len(item.name) + len(item.arguments)
    return sum(len(part.text) for part in item.content) if isinstance(item, MessageItem) else 0


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
