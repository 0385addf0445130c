"""GET /v1/models: what is served, and how long a request may be."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter, Request, Response

from server.errors import ApiError
from server.protocol.openapi import replies

if TYPE_CHECKING:
    from server.state import ServerState

router = APIRouter()


class ContextLengths(msgspec.Struct, frozen=True):
    """In tokens, prompt and output together."""

    trained: int | None  # what the model was trained for; None while it loads
    served: int | None  # the longest request that is taken
    max_request_now: int | None  # the longest that would run at once, without waiting for memory


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int  # seconds since 1970
    owned_by: str = "peregrine"
    root: str  # the name that the others are aliases of
    max_model_len: int | None  # vLLM's name for what context.served says
    context: ContextLengths


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]
    object: str = "list"


@router.get("/v1/models", response_model=None, responses=replies(ModelList))
async def list_models(request: Request) -> Response:
    """The names by which the model can be asked for."""
    state: ServerState = request.app.state.server
    return _json(ModelList([model_card(state, name) for name in state.model_names]))


@router.get("/v1/models/{model_id:path}", response_model=None, responses=replies(ModelCard))
async def get_model(request: Request, model_id: str) -> Response:
    """One of them."""
    state: ServerState = request.app.state.server
    model_id = model_id.rstrip("/")
    if model_id not in state.model_names:
        message = f"there is no model {model_id[:200]!r}; this server has {', '.join(state.model_names)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return _json(model_card(state, model_id))


def model_card(state: ServerState, name: str) -> ModelCard:
    model = state.engine.model
    context = ContextLengths(None, None, None)
    if model is not None:
        free = round(model.num_kv_tokens * (1.0 - state.metrics.steps.kv_usage))
        context = ContextLengths(model.trained_context, model.max_model_len, min(model.max_model_len, free))
    uptime = time.monotonic() - state.started_at
    return ModelCard(
        id=name,
        created=int(time.time() - uptime),
        root=state.model_names[0],
        max_model_len=context.served,
        context=context,
    )


def _json(reply: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(reply), media_type="application/json")
