"""DELETE /v1/requests/{id}: ends a request that is queued or running."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from server.errors import ApiError
from server.protocol.openapi import replies
from server.state import ServerState

router = APIRouter()


class Deletion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "request"
    deleted: bool = True


@router.delete("/v1/requests/{request_id:path}", response_model=None, responses=replies(Deletion))
async def abort_request(request: Request, request_id: str) -> Response:
    """Aborts by the id of the answer or by the caller's X-Request-Id. Whoever waits for it gets an error.

    A request belongs to the API key that it came with: to other keys it does not exist.
    """
    state: ServerState = request.app.state.server
    if not state.active_requests.abort(str(request.state.tenant), request_id):
        raise ApiError(404, f"no request {request_id[:200]!r} is queued or running", code="request_not_found")
    return Response(msgspec.json.encode(Deletion(id=request_id)), media_type="application/json")
