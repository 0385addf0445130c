"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType

from server.api.admit_request import Serving, accept, make_generation, make_record
from server.api.token_logprobs import TokenNames, chat_logprobs, prompt_logprobs
from server.errors import bad_request
from server.generation.choice import Delta
from server.generation.generation import Generation
from server.generation.prompts import PromptOptions, read_prompts
from server.generation.sampling_params import check_num_logprobs, make_params, read_bad_words
from server.generation.streaming import deliver, deliver_stream
from server.generation.usage import StreamUsage
from server.protocol.body import read_body
from server.protocol.chat_fields import (
    AssistantMessage,
    ChatBody,
    ChatMessage,
    Content,
    InstructionMessage,
    TokenizeBody,
)
from server.protocol.openapi import replies, request_body
from server.protocol.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatReply,
)
from server.telemetry.request_record import RequestRecord
from server.text.chat_renderer import ChatRenderer
from server.text.template_worker import Plain
from server.text.tokenizer import Tokenizer

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
        generation = await _prepare(body, serving, record)
        writer = ChatWriter(body, generation, serving)
        send = deliver_stream if body.stream else deliver
        return await send(request, generation, writer, headers=serving.headers)


async def _prepare(body: ChatBody, serving: Serving, record: RequestRecord) -> Generation:
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", param="top_logprobs")
    check_num_logprobs(body.top_logprobs, serving.state.config, param="top_logprobs")
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    options = PromptOptions(
        max_tokens=max_tokens,
        add_special_tokens=bool(body.add_special_tokens),  # the template has written them
        truncate_to=body.truncate_prompt_tokens,
        keeps_beginning=body.truncation_side == "right",
        param="messages",
        limit_param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
    )
    text = await render_messages(body, serving.tokenizer, serving.state.chat_renderer)
    (prompt,) = await read_prompts([text], options, tokenizer=serving.tokenizer, model=serving.model)
    params = make_params(
        body,
        serving.model,
        bad_words=await read_bad_words(body.bad_words or [], serving.tokenizer),
        max_tokens=max_tokens or serving.model.max_model_len - len(prompt.token_ids),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    return make_generation(serving, body, [prompt], params, id_prefix="chatcmpl", record=record)


async def render_messages(body: ChatBody | TokenizeBody, tokenizer: Tokenizer, renderer: ChatRenderer) -> str:
    """The prompt that the model's template makes of the body's messages. Raises ApiError 400."""
    continues = bool(body.continue_final_message)
    generates = body.add_generation_prompt is not False
    if continues and body.add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    try:
        return await tokenizer.render_chat(
            renderer,
            [_turn(message) for message in body.messages or ()],
            add_generation_prompt=generates and not continues,
            continue_final_message=continues,
            variables=_variables(body),
            tools=body.tools if isinstance(body, TokenizeBody) else None,
        )
    except ValueError as error:
        raise bad_request(str(error), param="messages") from error


def _variables(body: ChatBody | TokenizeBody) -> dict[str, Plain]:
    variables: dict[str, Plain] = {}
    for name, value in (body.chat_template_kwargs or {}).items():
        if isinstance(value, list | dict):
            message = f"chat_template_kwargs: {name[:100]!r} must be a plain value, not a list or an object"
            raise bad_request(message, param="chat_template_kwargs")
        variables[name] = value
    return variables


def _turn(message: ChatMessage) -> dict[str, str | None]:
    """A message as chat templates read it: only what was said is there."""
    turn: dict[str, str | None] = {"role": message.role, "content": _text(message.content)}
    if message.name is not None:
        turn["name"] = message.name
    if isinstance(message, AssistantMessage):
        if message.reasoning_content is not None:
            turn["reasoning_content"] = message.reasoning_content
    elif not isinstance(message, InstructionMessage) and message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _text(content: Content | None) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text for part in content or ())


class ChatWriter:
    """Formats the answers of one request as OpenAI's chat completions."""

    def __init__(self, body: ChatBody, generation: Generation, serving: Serving) -> None:
        self._body = body
        self._generation = generation
        self._names = TokenNames(serving.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        last = body.messages[-1]
        self._echo = _text(last.content) if body.echo and last.role == "assistant" else ""
        self._usage = StreamUsage(body.stream_options, generation)
        self._num_ended = 0

    def chunks(self, delta: Delta) -> Iterator[ChatChunk]:
        """The role comes first and alone, and so does the finish reason at the end."""
        if delta.is_first:
            yield self._opening(delta)
        self._usage.count(delta)
        text = self._echo + delta.text if delta.is_first else delta.text
        if text or (delta.token_ids and (self._body.logprobs or self._body.return_token_ids)):
            yield self._chunk([self._said(delta, text)])
        if delta.finish_reason is not None:
            yield self._closing(delta)

    def text_chunk(self, index: int, text: str) -> ChatChunk | None:
        if self._body.logprobs or self._body.return_token_ids or self._usage.is_continuous:
            return None
        return self._chunk([ChatChunkChoice(index=index, delta=ChatDelta(content=text))])

    def last_chunk(self) -> ChatChunk | None:
        usage = self._usage.of_end()
        if usage is None:
            return None
        chunk = self._chunk([])
        chunk.usage = usage
        return chunk

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
        assert delta.finish_reason is not None
        return ChatChoice(
            index=delta.index,
            message=ChatReply(content=self._echo + delta.text),
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._body.return_token_ids else UNSET,
        )

    def _opening(self, delta: Delta) -> ChatChunk:
        role = ChatDelta(role="assistant", content="")
        chunk = self._chunk([ChatChunkChoice(index=delta.index, delta=role, token_ids=self._no_ids)])
        if delta.index == 0:
            self._add_prompt(chunk, delta)
        return chunk

    def _closing(self, delta: Delta) -> ChatChunk:
        choice = ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=self._no_ids,
        )
        chunk = self._chunk([choice])
        self._num_ended += 1
        if self._body.timing and self._num_ended == len(self._generation.job.choices):
            chunk.timing = self._generation.timing()
        return chunk

    def _said(self, delta: Delta, text: str) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(content=text),
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
