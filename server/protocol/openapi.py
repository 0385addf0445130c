"""OpenAPI descriptions of routes that read and write their bodies without FastAPI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from pydantic import BaseModel

from server.protocol.responses import ErrorReply

Json = str | int | float | bool | None | Sequence["Json"] | Mapping[str, "Json"]
JsonObject = dict[str, Json]

ERRORS = {
    400: "the request is wrong; the message says how",
    401: "no valid API key",
    404: "no such model",
    408: "the deadline passed before the first token",
    409: "the request was aborted",
    413: "the body is too large",
    429: "the queue is full",
    500: "a bug",
    503: "starting, draining, or the engine is down",
    507: "the disk is full",
}


def request_body(body_type: type[BaseModel]) -> JsonObject:
    """The description of a request body, for FastAPI's `openapi_extra`."""
    schema = _inlined(body_type.model_json_schema(), {})
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def replies(reply_type: type[msgspec.Struct], *, streams: bool = False) -> dict[int | str, JsonObject]:
    """The descriptions of the answer, also as a stream of events, and of every error, for FastAPI's `responses`."""
    content: JsonObject = {"application/json": {"schema": _struct_schema(reply_type)}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    failures: dict[int | str, JsonObject] = {
        status: {"description": text, "content": {"application/json": {"schema": _struct_schema(ErrorReply)}}}
        for status, text in ERRORS.items()
    }
    return {200: {"description": "the answer", "content": content}, **failures}


def content(media_type: str) -> dict[int | str, JsonObject]:
    """The descriptions of an answer that is a file, and of every error."""
    failures = {status: reply for status, reply in replies(ErrorReply).items() if status != 200}
    schema: JsonObject = {"type": "string", "format": "binary"}
    return {200: {"description": "the file", "content": {media_type: {"schema": schema}}}, **failures}


def query(**schemas: JsonObject) -> JsonObject:
    """The description of a query's parameters, none of which is required, for FastAPI's `openapi_extra`."""
    parameters: list[Json] = [
        {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in schemas.items()
    ]
    return {"parameters": parameters}


def text() -> JsonObject:
    return {"type": "string"}


def whole(least: int, most: int) -> JsonObject:
    return {"type": "integer", "minimum": least, "maximum": most}


def one_of(*words: str) -> JsonObject:
    return {"type": "string", "enum": words}


def _struct_schema(struct: type[msgspec.Struct]) -> Json:
    (schema,), components = msgspec.json.schema_components([struct], ref_template="#/$defs/{name}")
    return _inlined(schema, components)


def _inlined(schema: Json, definitions: Mapping[str, Json], within: frozenset[str] = frozenset()) -> Json:
    """The schema with its references replaced by what they refer to, so that it can stand anywhere in a document.

    within: what it is a part of; what refers to itself is described once, and anything inside of that
    """
    if isinstance(schema, Mapping):
        own = schema.get("$defs")
        definitions = own if isinstance(own, Mapping) else definitions
        if isinstance(reference := schema.get("$ref"), str):
            name = reference.rpartition("/")[2]
            return {} if name in within else _inlined(definitions[name], definitions, within | {name})
        dropped = {"$defs", "discriminator"}  # a discriminator maps to references, and adds nothing to its oneOf
        return {key: _inlined(value, definitions, within) for key, value in schema.items() if key not in dropped}
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [_inlined(item, definitions, within) for item in schema]
    return schema
