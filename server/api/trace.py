"""GET /v1/server/trace: the engine's last steps and the latest requests, as a file for a trace viewer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from server.errors import ApiError
from server.state import ServerState
from server.telemetry.chrome_trace import trace_chunks
from server.telemetry.flight_recorder import NUM_STEPS

router = APIRouter()


@router.get(
    "/v1/server/trace",
    response_model=None,
    responses={
        200: {"content": {"application/json": {}}, "description": "Chrome's trace event format"},
        400: {"description": "steps is not a number from 1 to 10,000"},
        403: {"description": "not an operator's key"},
    },
)
async def trace(request: Request, steps: Annotated[int, Query(ge=1, le=NUM_STEPS)] = NUM_STEPS) -> Response:
    """The last steps, at most so many, with their phases, and the requests of that time. For ui.perfetto.dev.

    It shows the requests of all clients (ids, lengths and times; no text), so with keys it takes an operator's.
    """
    check_operator(request)
    state: ServerState = request.app.state.server
    recorder = state.recorder
    chunks = trace_chunks(recorder.steps[-steps:], recorder.events, list(state.history))

    async def send() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk
            await asyncio.sleep(0)

    headers = {"Content-Disposition": 'attachment; filename="peregrine-trace.json"', "Cache-Control": "no-store"}
    return StreamingResponse(send(), media_type="application/json", headers=headers)


def check_operator(request: Request) -> None:
    """Raises ApiError 403 for a key that is not an operator's."""
    if not request.state.is_operator:
        raise ApiError(403, "this shows what belongs to all clients, so it needs one of server.operator_keys")
