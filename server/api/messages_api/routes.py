"""POST /v1/messages, and the number of tokens of one that is not sent."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from server.api.admit_request import accept, check_known, make_record, served_model
from server.api.chat import prepare_chat
from server.api.chat_prompt import render_messages, template_traits
from server.api.chat_tools import callable_tools
from server.api.messages_api.blocks import Message, TokenCount
from server.api.messages_api.conversation import chat_json
from server.api.messages_api.fields import CountBody, MessagesBody
from server.api.messages_api.writer import MessageWriter
from server.errors import bad_request
from server.generation.streaming import deliver, deliver_stream
from server.generation.wires import ServerSentEvents
from server.off_loop import off_lock, off_loop
from server.parsing.conversation import tool_objects
from server.protocol.body import ignored_fields, parse_body, read_body
from server.protocol.chat_fields import ChatBody
from server.protocol.openapi import replies, request_body
from server.state import ServerState
from server.text.tokenizer import LONG_TEXT

router = APIRouter()
MANY_TURNS = 64  # reading more leaves the event loop for a thread
EVENTS = ServerSentEvents(is_named=True, keep_alive=b'event: ping\ndata: {"type":"ping"}\n\n')


@router.post(
    "/v1/messages",
    response_model=None,
    responses=replies(Message, streams=True),
    openapi_extra=request_body(MessagesBody),
)
async def create_message(request: Request) -> Response:
    """Answers the last turn of a conversation."""
    with make_record(request) as record:
        body = await read_body(request, MessagesBody)
        chat, ignored = await _as_chat(body, request)
        chat = await _with_budget(body, chat, request.app.state.server)
        serving = accept(request, chat, arrived_at=record.started_at, ignored=ignored)
        generation = await prepare_chat(chat, serving, record, id_prefix="msg_", caps_output=True)
        writer = MessageWriter(generation, streams=bool(body.stream))
        if body.stream:
            return await deliver_stream(request, generation, writer, headers=serving.headers, wire=EVENTS)
        return await deliver(request, generation, writer, headers=serving.headers)


@router.post(
    "/v1/messages/count_tokens",
    response_model=None,
    responses=replies(TokenCount),
    openapi_extra=request_body(CountBody),
)
async def count_tokens(request: Request) -> Response:
    """How many tokens the prompt of a message has."""
    body = await read_body(request, CountBody)
    chat, ignored = await _as_chat(body, request)
    state: ServerState = request.app.state.server
    headers = check_known(chat, strict=state.config.server.strict or bool(body.strict), others=ignored)
    _, tokenizer = served_model(state, body.model)
    tools = callable_tools(chat, state.config)
    described = tool_objects(chat.tools) if tools is not None else []
    text = await render_messages(chat, state, tokenizer, tools=described)
    num_bytes, most = len(text.encode(errors="replace")), state.config.limits.max_tokenize_bytes
    if num_bytes > most:
        raise bad_request(
            f"the prompt has {num_bytes} bytes, and {most} are counted (limits.max_tokenize_bytes); send less",
            param="messages",
        )
    if len(text) < LONG_TEXT:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        token_ids = await off_lock(tokenizer.encode, text, add_special_tokens=False)
    reply = msgspec.json.encode(TokenCount(len(token_ids)))
    return Response(reply, media_type="application/json", headers=headers)


async def _with_budget(body: MessagesBody, chat: ChatBody, state: ServerState) -> ChatBody:
    """The chat with a bound on its thoughts, where the model's format lets them be ended."""
    tokenizer = state.tokenizer
    budget = body.thinking.budget_tokens if body.thinking is not None else None
    if budget is None or budget >= body.max_tokens or tokenizer is None:
        return chat
    reasoning = (await template_traits(state, tokenizer)).answer_format.reasoning
    if reasoning is None or reasoning.close.strip() not in tokenizer.added_tokens:
        return chat
    return chat.model_copy(update={"reasoning_max_tokens": budget})


async def _as_chat(body: CountBody, request: Request) -> tuple[ChatBody, list[str]]:
    is_long = len(body.messages) > MANY_TURNS
    chat, ignored = await off_loop(chat_json, body) if is_long else chat_json(body)
    limits = request.app.state.server.config.limits
    return await parse_body(chat, ChatBody, limits), [*ignored, *ignored_fields(body)]
