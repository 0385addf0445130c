"""HTTP errors: the table of statuses, and the body and headers that every error has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

ErrorBody = dict[str, dict[str, str | None]]


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """The defaults of a status code, where the raiser does not say otherwise."""

    type: str
    code: str | None
    is_retry_safe: bool  # nothing was generated, and the next attempt may fare better
    message: str


INVALID_REQUEST = "invalid_request_error"
ERRORS = {
    400: ErrorKind(INVALID_REQUEST, None, False, "the request is not valid"),
    401: ErrorKind("authentication_error", "invalid_api_key", False, "a valid API key is needed"),
    403: ErrorKind("permission_error", "forbidden", False, "this is not allowed"),
    404: ErrorKind(INVALID_REQUEST, "not_found", False, "there is no such route"),
    405: ErrorKind(INVALID_REQUEST, "method_not_allowed", False, "the route does not take this method"),
    408: ErrorKind("timeout_error", "deadline_exceeded", True, "the deadline passed before the request could start"),
    409: ErrorKind(INVALID_REQUEST, "conflict", False, "the request conflicts with one that runs"),
    413: ErrorKind(INVALID_REQUEST, "request_too_large", False, "the request body is too large"),
    415: ErrorKind(INVALID_REQUEST, "unsupported_media_type", False, "the body must be application/json"),
    429: ErrorKind("rate_limit_error", "queue_full", True, "the queue is full"),
    431: ErrorKind(INVALID_REQUEST, "headers_too_large", False, "the request's headers are too large"),
    500: ErrorKind("server_error", "internal_error", False, "the server made a mistake"),
    501: ErrorKind(INVALID_REQUEST, "not_supported", False, "this is not supported"),
    503: ErrorKind("service_unavailable", "unavailable", True, "the server cannot take requests now"),
    507: ErrorKind("server_error", "disk_full", False, "the server has no room on its disk"),
}
DEFAULT_RETRY_AFTER = 1.0  # seconds, where the raiser of a 429 or 503 has no estimate


class ApiError(Exception):
    """An error that a client sees. `type` and `code` come from the table unless given."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        kind = ERRORS[status]
        self.status = status
        self.message = message or kind.message
        self.type = type or kind.type
        self.param = param
        self.code = code or kind.code
        needs_retry_after = status in (429, 503)
        self.retry_after = retry_after if retry_after is not None or not needs_retry_after else DEFAULT_RETRY_AFTER


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def error_body(error: ApiError) -> ErrorBody:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_headers(error: ApiError) -> dict[str, str]:
    """What the SDKs obey: whether to try again, and when. Retry-After has whole seconds, at least one."""
    headers = {"x-should-retry": "true" if ERRORS[error.status].is_retry_safe else "false"}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after * 1000)))
    return headers


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error_body(error), status_code=error.status, headers=error_headers(error))


def internal_error(request_id: str) -> ApiError:
    return ApiError(500, f"the server made a mistake with request {request_id}; its log says more")


def install_error_handlers(app: FastAPI) -> None:
    """Every error that a route or the router raises gets our body; validation errors become 400."""

    async def on_api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        response = error_response(_from_http_error(error, method=request.method, path=request.scope["path"]))
        response.headers.update(error.headers or {})  # Allow, of a 405
        return response

    async def on_validation_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(_from_validation_error(error))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)


def _from_http_error(error: HTTPException, *, method: str, path: str) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, f"there is no {path}; GET /openapi.json lists the routes")
    if error.status_code == 405:
        return ApiError(405, f"{path} does not take {method}")
    status = error.status_code if error.status_code in ERRORS else 400 if error.status_code < 500 else 500
    detail = str(error.detail)
    is_generic = detail == HTTPStatus(error.status_code).phrase
    return ApiError(status, ERRORS[status].message if is_generic else detail)


def _from_validation_error(error: RequestValidationError) -> ApiError:
    """The first failure, as a field path and a sentence; the number of further ones."""
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be parsed")
        return bad_request(f"the body is not valid JSON: {reason} at character {first['loc'][-1]}", code="invalid_json")
    place, *path = first["loc"]
    param = field_path(path) or None
    if param is None and place == "body":
        return bad_request("the body must be a JSON object, sent with Content-Type: application/json")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return bad_request(f"{param or place}: {first['msg']}{more}", param=param)


def field_path(path: list[str | int]) -> str:
    """("messages", 0, "content") -> "messages[0].content"."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
