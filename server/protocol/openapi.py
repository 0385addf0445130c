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


def _struct_schema(struct: type[msgspec.Struct]) -> Json:
    (schema,), components = msgspec.json.schema_components([struct], ref_template="#/$defs/{name}")
    return _inlined(schema, components)


def _inlined(schema: Json, definitions: Mapping[str, Json]) -> Json:
    """The schema with its references replaced by what they refer to, so that it can stand anywhere in a document."""
    if isinstance(schema, Mapping):
        own = schema.get("$defs")
        definitions = own if isinstance(own, Mapping) else definitions
        if isinstance(reference := schema.get("$ref"), str):
            return _inlined(definitions[reference.rpartition("/")[2]], definitions)
        dropped = {"$defs", "discriminator"}  # a discriminator maps to references, and adds nothing to its oneOf
        return {key: _inlined(value, definitions) for key, value in schema.items() if key not in dropped}
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [_inlined(item, definitions) for item in schema]
    return schema
