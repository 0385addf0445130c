"""The probes (liveness, readiness, startup), the version, the metrics and the effective config."""

from __future__ import annotations

import gzip
import time
from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import gzip_accepted
from pydantic import JsonValue

from server.errors import ApiError, error_body, error_headers
from server.settings import all_settings, value_of
from server.telemetry.metrics import CONTENT_TYPE, OPENMETRICS, OPENMETRICS_CONTENT_TYPE
from server.version import VERSION

if TYPE_CHECKING:
    from server.state import ServerState

router = APIRouter()
HIDDEN = frozenset({"server.api_keys", "server.operator_keys"})
GZIP_LEVEL = 3  # the event loop waits for it
RETRY_AFTER = 2.0  # seconds: how often it makes sense to ask


@router.get("/livez", responses={503: {"description": "the process should be replaced"}})
@router.head("/livez", include_in_schema=False)
async def livez(request: Request) -> Response:
    """Whether the process is worth keeping. It is, while the engine starts or restarts."""
    state: ServerState = request.app.state.server
    return _report(state, is_good=state.status not in ("failed", "stopped"))


@router.get("/readyz", responses={503: {"description": "starting, restarting, draining or failed"}})
@router.head("/readyz", include_in_schema=False)
async def readyz(request: Request) -> Response:
    """Whether requests should be sent here: they are taken and run, and the server is not about to end."""
    state: ServerState = request.app.state.server
    return _report(state, is_good=state.is_ready)


@router.get("/startupz", responses={503: {"description": "the model has not been loaded yet"}})
@router.head("/startupz", include_in_schema=False)
async def startupz(request: Request) -> Response:
    """Whether the start is over. Stays so through restarts of the engine."""
    state: ServerState = request.app.state.server
    return _report(state, is_good=state.first_ready.is_set())


@router.get("/health", responses={503: {"description": "the engine is not ready"}})
@router.head("/health", include_in_schema=False)
async def health(request: Request) -> Response:
    """Live and ready: for those who ask only one question."""
    state: ServerState = request.app.state.server
    return _report(state, is_good=state.is_ready)


@router.get("/ping", responses={503: {"description": "the engine is not ready"}})
@router.head("/ping", include_in_schema=False)
@router.post("/ping", include_in_schema=False)
async def ping(request: Request) -> Response:
    """As /health, by the name under which hosting services ask."""
    return await health(request)


@router.get("/version")
async def version(request: Request) -> Response:
    state: ServerState = request.app.state.server
    model = state.engine.model
    return _json({"version": VERSION, "system_fingerprint": model.fingerprint if model else None})


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}, "description": "Prometheus's text format"}})
async def metrics(request: Request) -> Response:
    """All metrics of the server and the engine: in OpenMetrics' format, and compressed, for those who accept that."""
    instruments = request.app.state.server.metrics
    accepted = {part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")}
    if OPENMETRICS in accepted:
        page, content_type = instruments.render_openmetrics(), OPENMETRICS_CONTENT_TYPE
    else:
        page, content_type = instruments.render(), CONTENT_TYPE
    headers = {"Vary": "Accept, Accept-Encoding"}
    if gzip_accepted(request.headers.get("accept-encoding", "")):
        page, headers["Content-Encoding"] = gzip.compress(page, GZIP_LEVEL), "gzip"
    return Response(page, media_type=content_type, headers=headers)


@router.get("/v1/server/effective-config")
async def effective_config(request: Request) -> Response:
    """Every setting as it is in force: its value, where that came from, and why; and how answers are taken apart."""
    state: ServerState = request.app.state.server
    shown = effective_settings(state)
    template = state.tokenizer.chat_template if state.tokenizer is not None else None
    traits = state.template_traits.get(template or "")  # found out soon after the model is there
    for name, value, reason in traits.describe() if traits is not None else ():
        shown[f"chat.{name}"] = {"value": value, "source": "model", "reason": reason}
    return _json(shown)


def effective_settings(state: ServerState) -> dict[str, JsonValue]:
    """By setting: {value, source, reason}. Keys of the API are counted, not shown."""
    model = state.engine.model
    shown: dict[str, JsonValue] = {}
    for name, setting in all_settings().items():
        source, value = state.setting_sources.get(name, "default"), value_of(state.config, name)
        reason = setting.description
        if name in HIDDEN:
            value, reason = f"{len(value) if isinstance(value, list) else 0} (hidden)", "never shown"
        if model is not None and (resolved := model.settings.get(name)) is not None:
            value, source, reason = resolved.value, resolved.source, resolved.reason or reason
            source = state.setting_sources.get(name, source) if resolved.source == "config" else source
        shown[name] = {"value": value, "source": source, "reason": reason}
    for name, default in (model.generation_defaults if model is not None else {}).items():
        reason = "what requests get that do not name it"
        shown[f"sampling.{name}"] = {"value": default, "source": "model", "reason": reason}
    for name, formats in (model.weights if model is not None else {}).items():
        kept_as = ", ".join(formats) if len(formats) == 1 else ", ".join(f"{k} ({n})" for k, n in formats.items())
        shown[f"weights.{name}"] = {"value": kept_as, "source": "measured", "reason": _in_layers(formats)}
    return shown


def _in_layers(formats: dict[str, int]) -> str:
    count = sum(formats.values())
    return "how it is kept in memory" if count == 1 else f"how it is kept in memory, in {count} layers"


def _report(state: ServerState, *, is_good: bool) -> Response:
    """What the state is, with an error beside it where the answer is no."""
    now = time.monotonic()
    engine = state.engine
    body: dict[str, JsonValue] = {
        "status": "ok" if is_good else "unavailable",
        "state": state.status,
        "phase": engine.phase,
        "phase_detail": engine.phase_detail,
        "seconds": round(now - state.state_since, 3),
        "uptime_seconds": round(now - state.started_at, 3),
        "num_restarts": engine.num_restarts,
    }
    if is_good:
        return _json(body)
    error = ApiError(503, f"the server is {state.status}: {_why(state)}", code=state.status, retry_after=RETRY_AFTER)
    for key, value in error_body(error).items():
        body[key] = dict(value)
    return _json(body, status=503, headers=error_headers(error))


def _why(state: ServerState) -> str:
    if state.failure is not None:
        return f"it cannot go on ({state.failure.kind})"
    if state.draining:
        return "it ends; send new requests to another one"
    engine = state.engine
    return f"{engine.phase} {engine.phase_detail}".strip()


def _json(body: dict[str, JsonValue], *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    headers = {"Cache-Control": "no-store", **(headers or {})}
    return Response(msgspec.json.encode(body), status_code=status, headers=headers, media_type="application/json")
