"""The lines of a batch's input: requests in OpenAI's format, read one by one from files of any length.

https://platform.openai.com/docs/guides/batch: each line is {"custom_id", "method": "POST", "url", "body"}.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from server.offline.line_keys import digest_of, id_key, number_key

MAX_CUSTOM_ID = 512  # characters
MAX_SHOWN = 100  # characters of a line that a message repeats
PIECE = 1 << 16  # bytes that are read at once of a line that is too long
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NOT_UTF8 = "it is not UTF-8 text"


@dataclass(frozen=True, slots=True)
class RequestLine:
    """A line that asks for something. number: of the line in its file, from 1. body: JSON."""

    number: int
    custom_id: str
    url: str
    body: bytes

    @property
    def key(self) -> bytes:
        return id_key(self.custom_id)


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that cannot be sent. custom_id: None where it has none that could be read; digest: of what is in it"""

    number: int
    custom_id: str | None
    code: str
    message: str
    param: str | None = None
    digest: str = ""

    @property
    def key(self) -> bytes:
        return number_key(self.number, self.digest)


Line = RequestLine | BadLine


class _Fields(msgspec.Struct):
    custom_id: msgspec.Raw = msgspec.Raw()
    method: msgspec.Raw = msgspec.Raw()
    url: msgspec.Raw = msgspec.Raw()
    body: msgspec.Raw = msgspec.Raw()


class _Stream(msgspec.Struct):
    stream: msgspec.Raw = msgspec.Raw()


_fields, _stream = msgspec.json.Decoder(_Fields).decode, msgspec.json.Decoder(_Stream).decode
_text = msgspec.json.Decoder(str).decode


class LineProblemError(ValueError):
    """What is wrong with a line. param: the field that it is about."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_line") -> None:
        super().__init__(message)
        self.param, self.code = param, code


def read_lines(path: Path, *, max_line_bytes: int, urls: Collection[str]) -> Iterator[Line]:
    """The lines of a file, in order; empty ones are passed over. Holds one line, of `max_line_bytes` at most.

    urls: those that lines may name. Raises OSError.
    """
    with path.open("rb", buffering=1 << 18) as file:
        for number, data in _raw_lines(file, max_line_bytes):
            if data is None:
                message = f"line {number}: it has more than {max_line_bytes} bytes (limits.max_body_bytes); send less"
                yield BadLine(number, None, "line_too_long", message)
            elif not data.isspace():
                yield parse_line(data, number, urls=urls)


def _raw_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """(number, line); None for one that is too long, which is skipped without being held."""
    number = 0
    while data := file.readline(max_bytes + 2):
        number += 1
        if number == 1:
            data = data.removeprefix(BYTE_ORDER_MARK)
            if not data:
                return
        if len(data.rstrip(b"\r\n")) <= max_bytes:
            yield number, data
            continue
        while data and not data.endswith(b"\n"):
            data = file.readline(PIECE)
        yield number, None


def parse_line(data: bytes, number: int, *, urls: Collection[str]) -> Line:
    """Reads one line. What is wrong with it is part of the result."""
    custom_id: str | None = None
    try:
        fields = _decoded(data)
        custom_id = _custom_id(fields)
        _check_method(fields)
        url = _url(fields, urls)
        body = bytes(fields.body)
        _check_body(body)
    except LineProblemError as problem:
        message = f"line {number}: {problem}"
        return BadLine(number, custom_id, problem.code, message, problem.param, digest_of(data))
    return RequestLine(number, custom_id, url, body)


def _decoded(data: bytes) -> _Fields:
    try:
        return _fields(data)
    except msgspec.ValidationError:
        raise LineProblemError('it must be a JSON object with "custom_id", "method", "url" and "body"') from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = NOT_UTF8 if isinstance(error, UnicodeDecodeError) else str(error)
        raise LineProblemError(f"it is not valid JSON: {_shown(reason)}", code="invalid_json") from None
    except RecursionError:
        raise LineProblemError("its JSON is nested too deeply", code="invalid_json") from None


def _custom_id(fields: _Fields) -> str:
    custom_id = _text_of(fields.custom_id, "custom_id")
    if not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        message = f"custom_id has {len(custom_id)} characters; it must have 1 to {MAX_CUSTOM_ID}"
        raise LineProblemError(message, param="custom_id")
    return custom_id


def _check_method(fields: _Fields) -> None:
    method = _text_of(fields.method, "method")
    if method != "POST":
        raise LineProblemError(f'method must be "POST", not "{_shown(method)}"', param="method")


def _url(fields: _Fields, urls: Collection[str]) -> str:
    url = _text_of(fields.url, "url")
    if url not in urls:
        known = ", ".join(sorted(urls))
        raise LineProblemError(
            f'url "{_shown(url)}" cannot be asked here, but {known}', param="url", code="invalid_url"
        )
    return url


def _check_body(body: bytes) -> None:
    if not body:
        raise LineProblemError("body is missing", param="body", code="missing_field")
    if not body.startswith(b"{"):
        raise LineProblemError("body must be a JSON object", param="body")
    try:
        stream = _stream(body).stream
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return  # the route says what is wrong with it
    if bytes(stream) == b"true":
        raise LineProblemError("body.stream is true, but answers are files; leave it out", param="body.stream")


def _text_of(raw: msgspec.Raw, name: str) -> str:
    if not raw:
        raise LineProblemError(f"{name} is missing", param=name, code="missing_field")
    try:
        return _text(raw)
    except msgspec.ValidationError:
        raise LineProblemError(f"{name} must be a text", param=name) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise LineProblemError(f"{name}: {NOT_UTF8}", param=name, code="invalid_json") from None


def _shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
