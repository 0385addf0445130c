"""POST /api/chat and /api/generate, GET /api/tags, /api/version and /api/ps."""

from __future__ import annotations

import hashlib

import msgspec
from fastapi import APIRouter, Request, Response

from server.api.admit_request import accept, make_record
from server.api.chat import prepare_chat
from server.api.ollama_api.conversation import asks_nothing, chat_json
from server.api.ollama_api.fields import (
    Details,
    ErrorLine,
    Line,
    OllamaChatBody,
    OllamaGenerateBody,
    OllamaVersion,
    SaidMessage,
    Tag,
    Tags,
)
from server.api.ollama_api.writer import OllamaWriter, now
from server.generation.streaming import deliver, deliver_stream
from server.generation.wires import JsonLines
from server.off_loop import off_loop
from server.protocol.body import ignored_fields, parse_body, read_body
from server.protocol.chat_fields import ChatBody
from server.protocol.openapi import replies, request_body
from server.protocol.responses import ErrorReply
from server.state import ServerState
from server.telemetry.request_record import RequestRecord
from server.version import VERSION

router = APIRouter()
MANY_MESSAGES = 64  # reading more leaves the event loop for a thread
LINES = JsonLines()


@router.post("/api/chat", response_model=None, responses=replies(Line), openapi_extra=request_body(OllamaChatBody))
async def ollama_chat(request: Request) -> Response:
    """Answers the last message of a conversation, in lines of JSON unless `stream` is false."""
    with make_record(request) as record:
        return await _answer(request, await read_body(request, OllamaChatBody), record)


@router.post(
    "/api/generate", response_model=None, responses=replies(Line), openapi_extra=request_body(OllamaGenerateBody)
)
async def ollama_generate(request: Request) -> Response:
    """Answers a prompt, in lines of JSON unless `stream` is false."""
    with make_record(request) as record:
        return await _answer(request, await read_body(request, OllamaGenerateBody), record)


async def _answer(request: Request, body: OllamaChatBody | OllamaGenerateBody, record: RequestRecord) -> Response:
    state: ServerState = request.app.state.server
    if body.model not in state.model_names:  # Ollama's clients add a tag to a name that has none
        body = body.model_copy(update={"model": body.model.removesuffix(":latest")})
    is_chat = isinstance(body, OllamaChatBody)
    is_long = isinstance(body, OllamaChatBody) and len(body.messages) > MANY_MESSAGES
    data = await off_loop(chat_json, body) if is_long else chat_json(body)
    chat = await parse_body(data, ChatBody, state.config.limits)
    serving = accept(request, chat, arrived_at=record.started_at, ignored=ignored_fields(body))
    if asks_nothing(body):
        said = {"message": SaidMessage()} if is_chat else {"response": ""}
        line = Line(model=body.model, created_at=now(), done=True, done_reason="load", **said)
        return Response(msgspec.json.encode(line) + b"\n", media_type=LINES.media_type, headers=serving.headers)
    generation = await prepare_chat(chat, serving, record, id_prefix="ollama-", caps_output=True)
    writer = OllamaWriter(generation, is_chat=is_chat, streams=body.stream is not False)
    if body.stream is False:
        return await deliver(request, generation, writer, headers=serving.headers)
    return await deliver_stream(request, generation, writer, headers=serving.headers, wire=LINES)


@router.get("/api/tags", response_model=None, responses=replies(Tags))
@router.get("/api/ps", response_model=None, responses=replies(Tags))
async def list_tags(request: Request) -> Response:
    """The names by which the model can be asked for: the same where Ollama tells what is loaded."""
    state: ServerState = request.app.state.server
    return _json(Tags([_tag(state, name) for name in state.model_names]))


@router.get("/api/version", response_model=None, responses=replies(OllamaVersion))
async def ollama_version(request: Request) -> Response:
    return _json(OllamaVersion(VERSION))


def _tag(state: ServerState, name: str) -> Tag:
    model = state.engine.model
    family = model.architecture.removesuffix("ForCausalLM").lower() if model is not None else ""
    size = f"{model.num_parameters / 1e6:.1f}M" if model is not None else ""
    return Tag(
        name=name,
        model=name,
        modified_at=now(),
        digest=hashlib.sha256(f"{name} {model.fingerprint if model is not None else ''}".encode()).hexdigest(),
        details=Details(family=family, families=[family], parameter_size=size),
    )


def word_error(status: int, error: ErrorReply, request_id: str) -> ErrorLine:
    """An error in Ollama's words."""
    return ErrorLine(error.error.message)


def _json(reply: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(reply), media_type="application/json")
