"""The lines of a batch's output: answers and errors in OpenAI's format, written once and read again to go on."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import msgspec

from server.offline.line_keys import id_key, number_key
from server.offline.request_lines import BadLine, RequestLine


class AnswerResponse(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class AnswerError(msgspec.Struct):
    """line, digest: of a line that cannot be sent, by which it is known when the file is read again."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None
    digest: str | None = None


class Answer(msgspec.Struct, kw_only=True):
    id: str
    custom_id: str | None
    response: AnswerResponse | None = None
    error: AnswerError | None = None


class _CachedTokens(msgspec.Struct):
    cached_tokens: int = 0


class _SeenUsage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _CachedTokens | None = None


class _SeenBody(msgspec.Struct):
    usage: msgspec.Raw = msgspec.Raw()


class _SeenResponse(msgspec.Struct):
    status_code: int
    body: msgspec.Raw = msgspec.Raw()


class _SeenError(msgspec.Struct):
    code: str = ""
    line: int | None = None
    digest: str | None = None


class _Seen(msgspec.Struct):
    id: str
    custom_id: str | None
    response: _SeenResponse | None
    error: _SeenError | None


_encode = msgspec.json.Encoder().encode
_seen = msgspec.json.Decoder(_Seen).decode
_body = msgspec.json.Decoder(_SeenBody).decode
_usage = msgspec.json.Decoder(_SeenUsage).decode


@dataclass(slots=True)
class TokenUsage:
    """Tokens of answers together."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def add(self, other: TokenUsage) -> None:
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens


@dataclass(frozen=True, slots=True)
class AnswerLine:
    """One line of an output, and what is counted of it. key: of the line of the input that it belongs to."""

    key: bytes
    data: bytes
    is_ok: bool
    usage: TokenUsage


def answer_of(line: RequestLine, *, status: int, request_id: str, body: bytes) -> AnswerLine:
    """The answer of a route. What is no JSON becomes an error that says so."""
    try:
        packed = msgspec.json.format(body, indent=-1)  # on one line; checks all but the texts
        packed.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        shown = body[:200].decode(errors="replace")
        message = f"the answer with status {status} is not JSON: {shown}"
        return error_of(line, code="invalid_answer", message=message)
    is_ok = 200 <= status < 300
    response = AnswerResponse(status, request_id, msgspec.Raw(packed))
    answer = Answer(id=_new_id(), custom_id=line.custom_id, response=response)
    return AnswerLine(line.key, _encode(answer) + b"\n", is_ok, _usage_of(packed) if is_ok else TokenUsage())


def error_of(line: RequestLine | BadLine, *, code: str, message: str) -> AnswerLine:
    """An error in the place of an answer."""
    error = AnswerError(code, message)
    if isinstance(line, BadLine):
        error = AnswerError(code, message, line.param, line.number, line.digest)
    answer = Answer(id=_new_id(), custom_id=line.custom_id, error=error)
    return AnswerLine(line.key, _encode(answer) + b"\n", False, TokenUsage())


def read_answer(data: bytes) -> AnswerLine:
    """Reads a line that was written before. Raises ValueError for any other."""
    try:
        seen = _seen(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"is no answer of a batch: {error}") from None
    if seen.error is not None and seen.error.line is not None:
        key = number_key(seen.error.line, seen.error.digest or "")
    elif seen.custom_id is not None:
        key = id_key(seen.custom_id)
    else:
        raise ValueError("is no answer of a batch: it has neither a custom_id nor a line")
    is_ok = seen.error is None and seen.response is not None and 200 <= seen.response.status_code < 300
    usage = _usage_of(seen.response.body) if is_ok and seen.response is not None else TokenUsage()
    return AnswerLine(key, data, is_ok, usage)


def _usage_of(body: bytes | msgspec.Raw) -> TokenUsage:
    """Of an answer that tells it, as all do that say text."""
    try:
        raw = _body(body).usage
        usage = _usage(raw) if raw else _SeenUsage()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return TokenUsage()
    details = usage.prompt_tokens_details
    return TokenUsage(usage.prompt_tokens, details.cached_tokens if details else 0, usage.completion_tokens)


def _new_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"
