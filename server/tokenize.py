"""POST /tokenize and /detokenize, also under /v1."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter, Request, Response

from server.body import read_body
from server.errors import bad_request
from server.openapi import replies, request_body
from server.protocol import DetokenizeBody, TokenizeBody
from server.responses import DetokenizeReply, TokenizeReply
from server.serving import check_known, served_model
from server.state import ServerState

router = APIRouter()


@router.post(
    "/tokenize", response_model=None, responses=replies(TokenizeReply), openapi_extra=request_body(TokenizeBody)
)
@router.post("/v1/tokenize", include_in_schema=False, response_model=None)
async def tokenize(request: Request) -> Response:
    """The token ids of a text, as a completion's prompt would have them."""
    body = await read_body(request, TokenizeBody)
    state: ServerState = request.app.state.server
    headers = check_known(body, strict=state.config.server.strict)
    text = body.prompt if body.prompt is not None else body.content
    if text is None or (body.prompt is not None and body.content is not None):
        raise bad_request("give the text as one of prompt and content", param="prompt")
    model, tokenizer = served_model(state, body.model)
    token_ids = await tokenizer.encode_async(text, add_special_tokens=body.add_special_tokens is not False)
    reply = TokenizeReply(len(token_ids), model.max_model_len, token_ids)
    return _json(reply, headers)


@router.post(
    "/detokenize", response_model=None, responses=replies(DetokenizeReply), openapi_extra=request_body(DetokenizeBody)
)
@router.post("/v1/detokenize", include_in_schema=False, response_model=None)
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included unless the body says otherwise."""
    body = await read_body(request, DetokenizeBody)
    state: ServerState = request.app.state.server
    headers = check_known(body, strict=state.config.server.strict)
    model, tokenizer = served_model(state, body.model)
    if body.tokens and max(body.tokens) >= model.vocab_size:
        raise bad_request(
            f"token id {max(body.tokens)} is outside the vocabulary of {model.vocab_size} tokens", param="tokens"
        )
    skip = bool(body.skip_special_tokens)
    text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=skip)
    return _json(DetokenizeReply(text, text), headers)


def _json(reply: msgspec.Struct, headers: dict[str, str]) -> Response:
    return Response(msgspec.json.encode(reply), media_type="application/json", headers=headers)
