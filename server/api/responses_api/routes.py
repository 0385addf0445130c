"""POST /v1/responses, and what can be done with a response afterwards."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter, Request, Response

from server.api.admit_request import accept, make_record
from server.api.chat import prepare_chat
from server.api.responses_api.conversation import Conversation, chat_json, check_honoured, items_json, read_items
from server.api.responses_api.fields import ResponsesBody
from server.api.responses_api.items import (
    Deletion,
    FunctionCallItem,
    ItemList,
    MessageItem,
    ReasoningItem,
    ResponseObject,
)
from server.api.responses_api.writer import ResponsesWriter
from server.api.token_logprobs import TokenNames
from server.errors import ApiError, bad_request
from server.generation.answer_store import AnswerStore, StoredAnswer
from server.generation.streaming import deliver, deliver_stream
from server.generation.wires import NAMED_EVENTS
from server.off_loop import off_loop
from server.protocol.body import ignored_fields, parse_body, read_body
from server.protocol.chat_fields import ChatBody
from server.protocol.openapi import replies, request_body
from server.state import ServerState

router = APIRouter()
MANY_ITEMS = 64  # reading more leaves the event loop for a thread


@router.post(
    "/v1/responses",
    response_model=None,
    responses=replies(ResponseObject, streams=True),
    openapi_extra=request_body(ResponsesBody),
)
async def create_response(request: Request) -> Response:
    """Answers the items of a conversation."""
    with make_record(request) as record:
        body = await read_body(request, ResponsesBody)
        check_honoured(body)
        state: ServerState = request.app.state.server
        before = _messages_before(body, state.answers, str(request.state.tenant))
        stores = body.store is not False and not state.answers.is_off
        conversation, chat = await _as_chat(body, before, state, stores=stores)
        ignored = [*conversation.ignored, *ignored_fields(body)]
        serving = accept(request, chat, arrived_at=record.started_at, ignored=ignored)
        generation = await prepare_chat(chat, serving, record, id_prefix="resp_")

        def keep(response: ResponseObject) -> None:
            if stores:
                messages = msgspec.json.encode([*before, *conversation.messages, _message_of(response)])
                answer = StoredAnswer(msgspec.json.encode(response), conversation.items, messages)
                state.answers.keep(serving.tenant, response.id, answer)

        names = TokenNames(serving.tokenizer, as_ids=False)
        writer = ResponsesWriter(body, generation, names, is_stored=stores, on_end=keep)
        if body.stream:
            return await deliver_stream(request, generation, writer, headers=serving.headers, wire=NAMED_EVENTS)
        return await deliver(request, generation, writer, headers=serving.headers)


async def _as_chat(
    body: ResponsesBody, before: Sequence[msgspec.Raw], state: ServerState, *, stores: bool
) -> tuple[Conversation, ChatBody]:
    def read() -> tuple[Conversation, bytes]:
        conversation = read_items(body.input)
        if stores:
            conversation.items = items_json(body.input)
        return conversation, chat_json(body, conversation, before=before)

    is_long = len(before) + len(body.input) > MANY_ITEMS and not isinstance(body.input, str)
    conversation, chat = await off_loop(read) if is_long else read()
    return conversation, await parse_body(chat, ChatBody, state.config.limits)


def _messages_before(body: ResponsesBody, answers: AnswerStore, tenant: str) -> list[msgspec.Raw]:
    previous = body.previous_response_id
    if previous is None:
        return []
    if answers.is_off:
        raise bad_request(
            "previous_response_id needs stored responses, and this server keeps none; send the whole conversation as "
            "input, or ask its operator for limits.max_stored_responses",
            param="previous_response_id",
        )
    stored = answers.find(tenant, previous)
    if stored is None:
        raise ApiError(
            404,
            f"there is no response {previous[:200]!r}: it was not stored, or made room for newer ones; send the whole "
            "conversation as input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return msgspec.json.decode(stored.messages, type=list[msgspec.Raw])


def _message_of(response: ResponseObject) -> dict[str, object]:
    """The answer as the chat's next turns have it."""
    message: dict[str, object] = {"role": "assistant", "content": None}
    texts, thoughts, calls = [], [], []
    for item in response.output:
        match item:
            case MessageItem(content=content):
                texts += [part.text for part in content]
            case ReasoningItem(content=content):
                thoughts += [part.text for part in content]
            case FunctionCallItem(call_id=call_id, name=name, arguments=arguments, status="completed"):
                calls.append(
                    {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments or "{}"}}
                )
    if texts or not calls:
        message["content"] = "".join(texts)
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


@router.get("/v1/responses/{response_id:path}/input_items", response_model=None, responses=replies(ItemList))
async def list_input_items(request: Request, response_id: str) -> Response:
    """What a stored response answers."""
    stored = _stored(request, response_id)
    return _json(msgspec.json.encode(ItemList(data=msgspec.json.decode(stored.inputs, type=list[msgspec.Raw]))))


@router.get("/v1/responses/{response_id:path}", response_model=None, responses=replies(ResponseObject))
async def get_response(request: Request, response_id: str) -> Response:
    """A stored response. Responses belong to the API key that they came with."""
    if request.query_params.get("stream") == "true":
        raise bad_request("a stored response is not streamed again; leave stream out", param="stream")
    return _json(_stored(request, response_id).answer)


@router.delete("/v1/responses/{response_id:path}", response_model=None, responses=replies(Deletion))
async def delete_response(request: Request, response_id: str) -> Response:
    state: ServerState = request.app.state.server
    if not state.answers.delete(str(request.state.tenant), response_id):
        raise _not_found(response_id)
    return _json(msgspec.json.encode(Deletion(id=response_id)))


@router.post("/v1/responses/{response_id:path}/cancel", response_model=None, responses=replies(ResponseObject))
async def cancel_response(request: Request, response_id: str) -> Response:
    """Ends a response that is being generated. Whoever waits for it gets an error."""
    state, tenant = request.app.state.server, str(request.state.tenant)
    if state.active_requests.abort(tenant, response_id):
        response = ResponseObject(
            id=response_id, created_at=int(time.time()), status="cancelled", model=state.model_names[0]
        )
        return _json(msgspec.json.encode(response))
    if state.answers.find(tenant, response_id) is not None:
        raise bad_request(f"response {response_id[:200]!r} has ended; there is nothing to cancel")
    raise _not_found(response_id)


def _stored(request: Request, response_id: str) -> StoredAnswer:
    state: ServerState = request.app.state.server
    stored = state.answers.find(str(request.state.tenant), response_id)
    if stored is None:
        raise _not_found(response_id)
    return stored


def _not_found(response_id: str) -> ApiError:
    return ApiError(
        404,
        f"there is no response {response_id[:200]!r}: it was not stored (limits.max_stored_responses), made room for "
        "newer ones, or came with another API key",
        code="response_not_found",
    )


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})
