"""Requests by id: DELETE /v1/requests/{id} ends one, GET /v1/requests/{id}/explain says what took its time."""

from __future__ import annotations

import time

import msgspec
from fastapi import APIRouter, Request, Response

from server.errors import ApiError
from server.protocol.openapi import replies
from server.state import ServerState
from server.telemetry.explanation import Circumstances, Explanation, explain

router = APIRouter()


class Deletion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "request"
    deleted: bool = True


@router.get("/v1/requests/{request_id:path}/explain", response_model=None, responses=replies(Explanation))
async def explain_request(request: Request, request_id: str) -> Response:
    """Why a request was slow, by the id of its answer or the caller's X-Request-Id: the latest 1,000 are remembered.

    A key sees the requests that came with it, an operator's key all.
    """
    state: ServerState = request.app.state.server
    tenant = None if request.state.is_operator else str(request.state.tenant)
    timeline = state.history.find(request_id, tenant=tenant)
    if timeline is None:
        raise ApiError(404, f"no request {request_id[:200]!r} is remembered", code="request_not_found")
    explained = explain(timeline, state.history, state.recorder, circumstances(state), time.monotonic())
    headers = {"Cache-Control": "no-store"}
    return Response(msgspec.json.encode(explained), media_type="application/json", headers=headers)


def circumstances(state: ServerState) -> Circumstances:
    model, kv_cache = state.engine.model, state.config.kv_cache
    seats = model.settings.get("scheduler.max_num_seqs") if model is not None else None
    return Circumstances(
        max_num_seqs=int(seats.value) if seats is not None and isinstance(seats.value, int) else None,
        block_size=kv_cache.block_size,
        prefix_caching=kv_cache.prefix_caching,
    )


@router.delete("/v1/requests/{request_id:path}", response_model=None, responses=replies(Deletion))
async def abort_request(request: Request, request_id: str) -> Response:
    """Aborts by the id of the answer or by the caller's X-Request-Id. Whoever waits for it gets an error.

    A request belongs to the API key that it came with: to other keys it does not exist.
    """
    state: ServerState = request.app.state.server
    if not state.active_requests.abort(str(request.state.tenant), request_id):
        raise ApiError(404, f"no request {request_id[:200]!r} is queued or running", code="request_not_found")
    return Response(msgspec.json.encode(Deletion(id=request_id)), media_type="application/json")
