"""GET /v1/server/status: what is served, and how it goes right now; the page at / draws it."""

from __future__ import annotations

import statistics
import time

import msgspec
from fastapi import APIRouter, Request, Response

from engine.ipc.messages import ModelInfo
from server.protocol.openapi import replies
from server.state import ServerState
from server.version import VERSION

router = APIRouter()
WINDOW = 5.0  # seconds that rates are of
LATENCY_WINDOW = 600.0  # seconds
SHOWN_SETTINGS = ("device.name", "device.kernels", "model.dtype", "scheduler.max_num_seqs", "kv_cache.dtype")


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    names: list[str]  # the first is the one that answers carry
    architecture: str | None = None  # this and what follows: null while it loads
    parameters: int | None = None
    max_model_len: int | None = None  # tokens
    kv_cache_tokens: int | None = None
    has_chat_template: bool | None = None
    fingerprint: str | None = None
    settings: dict[str, str | int | float | bool | None] = {}


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Now; rates per second over the last 5 s."""

    requests_running: int
    requests_waiting: int
    prompt_tokens_waiting: int
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    steps_per_second: float
    kv_cache_usage: float  # 0 to 1


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Of the requests that ended in the last 10 minutes, as far as they are remembered; seconds."""

    requests: int
    time_to_first_token_median: float | None
    seconds_per_token_median: float | None


class Speculation(msgspec.Struct, frozen=True, kw_only=True):
    method: str
    acceptance: float | None  # accepted share of the drafts of the last 5 s; null where there were none


class Status(msgspec.Struct, frozen=True, kw_only=True):
    state: str
    detail: str  # of a start: its phase
    version: str
    uptime_seconds: float
    num_restarts: int  # of the engine
    model: ServedModel
    load: Load
    latency: Latency
    speculation: Speculation


@router.get("/v1/server/status", response_model=None, responses=replies(Status))
async def status(request: Request) -> Response:
    """The model, the load and the speed of this server, for people and scripts; Prometheus reads /metrics."""
    told = server_status(request.app.state.server, time.monotonic())
    return Response(msgspec.json.encode(told), media_type="application/json", headers={"Cache-Control": "no-store"})


def server_status(state: ServerState, now: float) -> Status:
    engine, pace = state.engine, state.recorder.pace(WINDOW, now)
    drafts = pace.num_draft_tokens
    return Status(
        state=state.status,
        detail=f"{engine.phase} {engine.phase_detail}".strip(),
        version=VERSION,
        uptime_seconds=now - state.started_at,
        num_restarts=engine.num_restarts,
        model=_model(state, engine.model),
        load=Load(
            requests_running=engine.num_running,
            requests_waiting=engine.num_waiting,
            prompt_tokens_waiting=engine.num_waiting_tokens,
            output_tokens_per_second=pace.output_tokens,
            prompt_tokens_per_second=pace.prompt_tokens,
            steps_per_second=pace.steps,
            kv_cache_usage=state.metrics.steps.kv_usage,
        ),
        latency=_latency(state, now),
        speculation=Speculation(
            method=state.config.speculation.method,
            acceptance=pace.num_accepted_drafts / drafts if drafts else None,
        ),
    )


def _model(state: ServerState, model: ModelInfo | None) -> ServedModel:
    if model is None:
        return ServedModel(names=state.model_names)
    known = {name: model.settings.get(name) for name in SHOWN_SETTINGS}
    return ServedModel(
        names=state.model_names,
        architecture=model.architecture,
        parameters=model.num_parameters,
        max_model_len=model.max_model_len,
        kv_cache_tokens=model.num_kv_tokens,
        has_chat_template=model.tokenizer.chat_template is not None,
        fingerprint=model.fingerprint,
        settings={name: setting.value for name, setting in known.items() if setting is not None},
    )


def _latency(state: ServerState, now: float) -> Latency:
    to_first, per_token = [], []
    for timeline in state.history:
        if timeline.ended_at is None or timeline.ended_at < now - LATENCY_WINDOW or timeline.first_token_at is None:
            continue
        to_first.append(timeline.first_token_at - timeline.arrived_at)
        num_more = timeline.counts.num_output_tokens - timeline.num_choices
        if num_more > 0:
            decode = timeline.ended_at - timeline.first_token_at
            per_token.append(decode * timeline.num_choices / num_more)
    return Latency(
        requests=len(to_first),
        time_to_first_token_median=statistics.median(to_first) if to_first else None,
        seconds_per_token_median=statistics.median(per_token) if per_token else None,
    )
