"""POST /tokenize and /detokenize, also under /v1."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from server.api.admit_request import check_known, served_model
from server.api.chat_prompt import render_messages
from server.errors import bad_request
from server.generation.prompts import check_vocabulary
from server.json_encoding import encode_json
from server.off_loop import off_lock, off_loop
from server.parsing.callable_tools import check_tools
from server.parsing.conversation import tool_objects
from server.protocol.body import read_body
from server.protocol.chat_fields import TokenizeBody
from server.protocol.openapi import replies, request_body
from server.protocol.request_fields import DetokenizeBody
from server.protocol.responses import DetokenizeReply, TokenizeReply, TokenizerInfo
from server.state import ServerState
from server.text.tokenizer import LONG_TEXT

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
    given = [name for name in ("prompt", "content", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise bad_request("give the text as one of prompt, content and messages", param="prompt")
    model, tokenizer = served_model(state, body.model)
    text = body.prompt if body.prompt is not None else body.content
    if text is None:
        limits = state.config.limits
        check_tools(body.tools or [], max_tools=limits.max_tools, max_bytes=limits.max_tool_bytes)
        text = await render_messages(body, state, tokenizer, tools=tool_objects(body.tools))
    has_special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    num_bytes, most = len(text.encode(errors="replace")), state.config.limits.max_tokenize_bytes
    if num_bytes > most:
        raise bad_request(
            f"the text has {num_bytes} bytes, and /tokenize takes {most} (limits.max_tokenize_bytes); send it in parts",
            param=given[0],
        )

    def answer(token_ids: list[int]) -> Response:
        reply = TokenizeReply(len(token_ids), model.max_model_len, token_ids)
        if body.return_token_strs:
            reply.token_strs = [tokenizer.token_text(token_id) for token_id in token_ids]
        return _json(reply, headers)

    if len(text) < LONG_TEXT:
        return answer(tokenizer.encode(text, add_special_tokens=has_special))
    return await off_loop(answer, await off_lock(tokenizer.encode, text, add_special_tokens=has_special))


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
    check_vocabulary(body.tokens, model, param="tokens")
    skip = bool(body.skip_special_tokens)

    if len(body.tokens) < LONG_TEXT:
        text = tokenizer.decode(body.tokens, skip_special_tokens=skip)
        return _json(DetokenizeReply(text, text), headers)
    text = await off_lock(tokenizer.decode, body.tokens, skip_special_tokens=skip)
    return await off_loop(_json, DetokenizeReply(text, text), headers)


@router.get("/tokenizer_info", response_model=None, responses=replies(TokenizerInfo))
@router.get("/v1/tokenizer_info", include_in_schema=False, response_model=None)
async def tokenizer_info(request: Request) -> Response:
    """The tokenizer itself, with the chat template and the names of its special tokens."""
    state: ServerState = request.app.state.server
    model, _ = served_model(state, None)
    assets = model.tokenizer
    info = TokenizerInfo(
        model=state.model_names[0],
        vocab_size=model.vocab_size,
        model_max_length=model.max_model_len,
        add_bos_token=assets.add_bos_token,
        special_tokens=assets.special_tokens,
        eos_token_ids=model.eos_token_ids,
        chat_template=assets.chat_template,
        tokenizer_json=msgspec.Raw(assets.tokenizer_json.encode()),
    )
    return await off_loop(_json, info, {})


def _json(reply: msgspec.Struct, headers: dict[str, str]) -> Response:
    return Response(encode_json(reply), media_type="application/json", headers=headers)
