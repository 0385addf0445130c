"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType

from server.api.admit_request import Reading, Serving, accept, make_generation, make_record
from server.api.chat_prompt import render_messages
from server.api.chat_tools import answer_shape, callable_tools, chat_grammar
from server.api.token_logprobs import TokenNames, chat_logprobs, prompt_logprobs
from server.errors import ApiError, bad_request
from server.generation.answer_reader import AnswerReader
from server.generation.choice import Delta
from server.generation.generation import Generation
from server.generation.prompts import PromptOptions, read_prompts
from server.generation.sampling_params import check_num_logprobs, make_params, read_bad_words
from server.generation.streaming import deliver, deliver_stream
from server.generation.usage import StreamUsage
from server.parsing.answer_parts import (
    AnswerCollector,
    AnswerDelta,
    ContentDelta,
    ParsedAnswer,
    ReasoningDelta,
    ToolArgumentsDelta,
    ToolCallBegin,
)
from server.parsing.conversation import text_of, tool_objects
from server.protocol.body import read_body
from server.protocol.chat_fields import ChatBody
from server.protocol.openapi import replies, request_body
from server.protocol.responses import (
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatReply,
    ErrorReply,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
    error_reply,
)
from server.telemetry.request_record import RequestRecord

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses=replies(ChatCompletion, streams=True),
    openapi_extra=request_body(ChatBody),
)
async def create_chat_completion(request: Request) -> Response:
    """Answers the last message of a conversation."""
    with make_record(request) as record:
        body = await read_body(request, ChatBody)
        serving = accept(request, body, arrived_at=record.started_at)
        generation = await prepare_chat(body, serving, record, id_prefix="chatcmpl-")
        writer = ChatWriter(body, generation, serving)
        send = deliver_stream if body.stream else deliver
        return await send(request, generation, writer, headers=serving.headers)


async def prepare_chat(
    body: ChatBody, serving: Serving, record: RequestRecord, *, id_prefix: str, caps_output: bool = False
) -> Generation:
    """The generation of an answer, also to what another API has made a chat of; its job's shape says how to read it.

    Raises ApiError. caps_output: a limit of tokens beyond what the context leaves is as many as that, not an error
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", param="top_logprobs")
    check_num_logprobs(body.top_logprobs, serving.state.config, param="top_logprobs")
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    options = PromptOptions(
        max_tokens=None if caps_output else max_tokens,
        add_special_tokens=bool(body.add_special_tokens),  # the template has written them
        truncate_to=body.truncate_prompt_tokens,
        keeps_beginning=body.truncation_side == "right",
        param="messages",
        limit_param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
    )
    tools = callable_tools(body, serving.state.config)
    described = tool_objects(body.tools) if tools is not None else []
    text = await render_messages(body, serving.state, serving.tokenizer, tools=described)
    (prompt,) = await read_prompts([text], options, tokenizer=serving.tokenizer, model=serving.model)
    room = serving.model.max_model_len - len(prompt.token_ids)
    shape = await answer_shape(body, serving, tools, prompt=text)
    params = make_params(
        body,
        serving.model,
        bad_words=await read_bad_words(body.bad_words or [], serving.tokenizer),
        max_tokens=min(max_tokens or room, room),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        grammar=await chat_grammar(body, serving, tools, shape),
    )
    reading = Reading(shape=shape)
    return make_generation(serving, body, [prompt], params, id_prefix=id_prefix, record=record, reading=reading)


class ChatWriter:
    """Formats the answers of one request as OpenAI's chat completions."""

    def __init__(self, body: ChatBody, generation: Generation, serving: Serving) -> None:
        self._body = body
        self._generation = generation
        self._names = TokenNames(serving.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        last = body.messages[-1]
        self._echo = text_of(last.content) if body.echo and last.role == "assistant" else ""
        self._shape = generation.job.shape
        self._tells_reasoning = body.include_reasoning is not False
        self._readers: dict[int, AnswerReader] = {}  # of the choices of a stream
        self._usage = StreamUsage(body.stream_options, generation)
        self._num_ended = 0

    def chunks(self, delta: Delta) -> Iterator[ChatChunk]:
        """The role comes first and alone, and so does the finish reason at the end. What else came has a chunk for each
        part; the first tells of the tokens."""
        if delta.is_first:
            yield self._opening(delta)
        self._usage.count(delta)
        reader = self._reader(delta.index)
        said = list(self._said(reader.read(delta)))
        if delta.is_first and self._echo:
            said.insert(0, ChatDelta(content=self._echo))
        if not said and delta.token_ids and (self._body.logprobs or self._body.return_token_ids):
            said.append(ChatDelta(content="") if self._shape.is_plain else ChatDelta())
        for number, words in enumerate(said):
            yield self._chunk([self._choice_chunk(delta, words, has_tokens=number == 0)])
        if delta.finish_reason is not None:
            yield self._closing(delta, reader)

    def text_chunk(self, index: int, text: str) -> ChatChunk | None:
        if self._body.logprobs or self._body.return_token_ids or self._usage.is_continuous or not self._shape.is_plain:
            return None
        return self._chunk([ChatChunkChoice(index=index, delta=ChatDelta(content=text))])

    def _reader(self, index: int) -> AnswerReader:
        """Of a choice of the stream."""
        if index not in self._readers:
            self._readers[index] = AnswerReader(self._shape, holds_calls=False)
        return self._readers[index]

    def _said(self, parts: Iterable[AnswerDelta]) -> Iterator[ChatDelta]:
        for part in parts:
            match part:
                case ContentDelta(text=text):
                    yield ChatDelta(content=text)
                case ReasoningDelta(text=text):
                    if self._tells_reasoning:
                        yield ChatDelta(reasoning_content=text, reasoning=text)
                case ToolCallBegin(index=index, call_id=call_id, name=name):
                    function = FunctionDelta(name=name, arguments="")
                    call = ToolCallDelta(index=index, id=call_id, type="function", function=function)
                    yield ChatDelta(tool_calls=[call])
                case ToolArgumentsDelta(index=index, text=text):
                    call = ToolCallDelta(index=index, function=FunctionDelta(arguments=text))
                    yield ChatDelta(tool_calls=[call])

    def last_chunk(self) -> ChatChunk | None:
        usage = self._usage.of_end()
        if usage is None:
            return None
        chunk = self._chunk([])
        chunk.usage = usage
        return chunk

    def failure(self, error: ApiError) -> Iterator[ErrorReply]:
        yield error_reply(error)

    def reply(self, choices: list[Delta]) -> ChatCompletion:
        job = self._generation.job
        completion = ChatCompletion(
            id=job.response_id,
            created=job.created,
            model=job.model,
            system_fingerprint=job.fingerprint,
            choices=[self._choice(delta) for delta in choices],
            usage=self._generation.usage(),
        )
        self._add_prompt(completion, choices[0])
        if self._body.timing:
            completion.timing = self._generation.timing()
        return completion

    def _choice(self, delta: Delta) -> ChatChoice:
        reader, collector = AnswerReader(self._shape, holds_calls=True), AnswerCollector()
        collector.add(reader.read(delta))
        finish_reason = reader.finish_reason(delta)
        assert finish_reason is not None
        return ChatChoice(
            index=delta.index,
            message=self._message(collector.collected()),
            logprobs=self._logprobs(delta),
            finish_reason=finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._body.return_token_ids else UNSET,
        )

    def _message(self, answer: ParsedAnswer) -> ChatReply:
        """Content is null where the answer is something else."""
        content = self._echo + answer.content
        message = ChatReply(content=content or (None if answer.tool_calls or answer.reasoning else ""))
        if answer.reasoning and self._tells_reasoning:
            message.reasoning_content = message.reasoning = answer.reasoning
        if answer.tool_calls:
            message.tool_calls = [
                ToolCall(id=call.call_id, function=CalledFunction(call.name, call.arguments))
                for call in answer.tool_calls
            ]
        return message

    def _opening(self, delta: Delta) -> ChatChunk:
        role = ChatDelta(role="assistant", content="")
        chunk = self._chunk([ChatChunkChoice(index=delta.index, delta=role, token_ids=self._no_ids)])
        if delta.index == 0:
            self._add_prompt(chunk, delta)
        return chunk

    def _closing(self, delta: Delta, reader: AnswerReader) -> ChatChunk:
        choice = ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(),
            finish_reason=reader.finish_reason(delta),
            stop_reason=delta.stop_reason,
            token_ids=self._no_ids,
        )
        chunk = self._chunk([choice])
        self._num_ended += 1
        if self._body.timing and self._num_ended == len(self._generation.job.choices):
            chunk.timing = self._generation.timing()
        return chunk

    def _choice_chunk(self, delta: Delta, words: ChatDelta, *, has_tokens: bool) -> ChatChunkChoice:
        if not has_tokens:
            return ChatChunkChoice(index=delta.index, delta=words, token_ids=self._no_ids)
        return ChatChunkChoice(
            index=delta.index,
            delta=words,
            logprobs=self._logprobs(delta),
            token_ids=delta.token_ids if self._body.return_token_ids else UNSET,
        )

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        job = self._generation.job
        return ChatChunk(
            id=job.response_id,
            created=job.created,
            model=job.model,
            system_fingerprint=job.fingerprint,
            choices=choices,
            usage=self._usage.of_chunk(),
            prompt_token_ids=None if self._body.return_token_ids else UNSET,
            prompt_logprobs=None if self._body.prompt_logprobs is not None else UNSET,
        )

    @property
    def _no_ids(self) -> UnsetType | None:
        """For a chunk without tokens."""
        return None if self._body.return_token_ids else UNSET

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(delta.logprobs, self._names, num_top=self._body.top_logprobs or 0)

    def _add_prompt(self, reply: ChatCompletion | ChatChunk, first: Delta) -> None:
        if self._body.return_token_ids:
            reply.prompt_token_ids = self._generation.job.choices[0].prompt.token_ids
        if self._body.prompt_logprobs is not None:
            num_top = self._body.prompt_logprobs
            reply.prompt_logprobs = prompt_logprobs(first.prompt_logprobs, self._names, num_top=num_top)
