"""Parsing and validation of request bodies; every error is a 400 that says what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar
from urllib.parse import quote

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.config import LimitsConfig
from server.errors import ApiError, bad_request, field_path
from server.off_loop import off_loop
from server.protocol.json_size import JsonSize, bound_json, measure_json
from server.protocol.request_fields import Body

BodyT = TypeVar("BodyT", bound=Body)

JSON_TYPE = re.compile(r"application/(.+\+)?json")
UNION_TAG = re.compile(
    r"function-\w+\[.*\]|constrained-\w+|(list|dict|literal)\[.*\]|str|bool|int|float|none"
    r"|TextPart|NamedTool|AllowedToolChoice|Document"
)
KINDS_OF_MESSAGE = frozenset({"instruction", "assistant", "tool"})
NOT_YET = frozenset(
    {
        "use_beam_search", "functions", "function_call", "modalities", "audio", "web_search_options", "suffix",
    }
)  # fmt: skip
INLINE_BYTES = 1 << 18  # of a body that is parsed in the event loop, not in a thread,
INLINE_VALUES = 1 << 13  # and its values: small enough for a hundred bodies in one iteration of the loop
MAX_SHOWN = 200  # characters of a message that came from the request
MAX_IGNORED_SHOWN = 20


async def read_body(request: Request, body_type: type[BodyT]) -> BodyT:
    """Reads and validates the body. Raises ApiError 400."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if not JSON_TYPE.fullmatch(media_type):
        raise bad_request(f"the body must be JSON; send Content-Type: application/json, not {_shown(media_type)!r}")
    data = b"".join([part async for part in request.stream()])  # unlike body(), this leaves no copy in the request
    limits: LimitsConfig = request.app.state.server.config.limits
    return await parse_body(data, body_type, limits)


async def parse_body(data: bytes, body_type: type[BodyT], limits: LimitsConfig) -> BodyT:
    """Validates a body that has been read. Raises ApiError 400."""
    if len(data) <= INLINE_BYTES:
        bound = bound_json(data)
        if bound.num_fields + bound.num_values <= INLINE_VALUES:
            return _parse(data, body_type)
    return await off_loop(_parse_large, data, body_type, limits)


def _parse(data: bytes, body_type: type[BodyT]) -> BodyT:
    try:
        return body_type.model_validate_json(data)
    except ValidationError as error:
        raise _explain(error) from None


def _parse_large(data: bytes, body_type: type[BodyT], limits: LimitsConfig) -> BodyT:
    """Counts the values before parsing: text of any length is fast, but many values would block the whole server."""
    if _is_within(bound_json(data), limits) or _is_within(size := measure_json(data), limits):
        return _parse(data, body_type)
    raise bad_request(
        f"the body has {size.num_values} JSON values and {size.num_fields} fields, lists and objects; it may have "
        f"{limits.max_body_values} and {limits.max_body_fields} (limits.max_body_values, limits.max_body_fields): "
        "send prompts as text, or in several requests"
    )


def _is_within(size: JsonSize, limits: LimitsConfig) -> bool:
    return size.num_fields <= limits.max_body_fields and size.num_values <= limits.max_body_values


def ignored_fields(body: Body) -> list[str]:
    """Names of the fields that the server does not know, in dotted notation, each once."""
    return list(dict.fromkeys(_unknown(body, "")))


def ignored_header(names: list[str]) -> str:
    """The names as a header value: other characters than letters, digits and a few marks are percent-encoded."""
    shown = [quote(name[:MAX_SHOWN], safe="._-[]") for name in names[:MAX_IGNORED_SHOWN]]
    if len(names) > MAX_IGNORED_SHOWN:
        shown.append(f"... {len(names) - MAX_IGNORED_SHOWN} more")
    return ", ".join(shown)


def refuse_ignored(names: list[str]) -> None:
    """In strict mode a field that would be ignored is an error."""
    if names:
        message = f"unknown fields: {ignored_header(names)}; leave them out, or do without strict mode"
        raise bad_request(message, param=_shown(names[0]), code="unknown_field")


def _unknown(body: BaseModel, prefix: str) -> Iterator[str]:
    for name in body.model_extra or {}:
        yield prefix + name
    for name in type(body).model_fields:
        value = getattr(body, name)
        parts = value if isinstance(value, list) else [value]
        if not parts or not isinstance(parts[0], BaseModel):
            continue  # the items of a list are of one kind, and there may be hundreds of thousands of numbers
        for part in parts:
            if isinstance(part, BaseModel):
                yield from _unknown(part, f"{prefix}{name}.")


def _explain(error: ValidationError) -> ApiError:
    problems = error.errors(include_url=False, include_context=True, include_input=True)
    problem = max(problems, key=_relevance)
    param = _path(problem["loc"])
    if problem["type"] == "json_invalid":
        return bad_request(f"the body is not valid JSON: {_shown(problem['msg'].removeprefix('Invalid JSON: '))}")
    return bad_request(_shown(_message(problem, problems, param)), param=_shown(param) or None)


def _relevance(problem: ErrorDetails) -> tuple[bool, int]:
    """Of the reports about a value that matches none of several types, the one that came furthest is the useful one."""
    return not problem["type"].endswith("_type"), len(problem["loc"])


def _message(problem: ErrorDetails, problems: list[ErrorDetails], param: str) -> str:
    kind, name = problem["type"], param.rpartition(".")[2]
    if not param:
        return f"the body must be a JSON object: {problem['msg']}"
    if kind == "missing":
        return f"{param} is required"
    if problem["loc"][0] == "messages" and name == "type" and kind == "literal_error":
        kind_of_part = _shown(str(problem["input"]))
        return f"{param}: {kind_of_part!r} parts are not supported, the model reads text only; send text parts"
    if problem["loc"][0] in NOT_YET or name in NOT_YET:
        return f"{param} is not supported yet; leave it out"
    if kind.endswith("_type"):
        wanted = dict.fromkeys(_wanted(other) for other in problems if other["loc"][0] == problem["loc"][0])
        return f"{param} should be {' or '.join(wanted)}"
    return f"{param}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def _wanted(problem: ErrorDetails) -> str:
    return problem["msg"].removeprefix("Input should be ")


def _path(loc: tuple[int | str, ...]) -> str:
    """The place in the body, without the names of the alternatives that pydantic tried."""
    path: list[str | int] = []
    for i, item in enumerate(loc):
        is_kind = i > 1 and loc[0] == "messages" and isinstance(loc[i - 1], int) and item in KINDS_OF_MESSAGE
        is_kind = is_kind or (i == 1 and loc[0] == "response_format")  # its type
        if i > 0 and (is_kind or (isinstance(item, str) and UNION_TAG.fullmatch(item))):
            continue
        path.append(item)
    return field_path(path)


def _shown(text: str) -> str:
    """Text from a request, short enough for a message."""
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
