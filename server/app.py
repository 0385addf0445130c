"""The composition root of the server: makes the HTTP application of its parts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from pydantic import JsonValue
from starlette.routing import Route
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from engine.client.client import EngineClient, EngineObserver
from engine.config import EngineConfig
from engine.ipc.messages import Failed
from server.api import chat, completions, health, models, pages, requests, status, tokenize, trace
from server.config import Config
from server.errors import install_error_handlers
from server.generation.admission import Admission, DrainRate
from server.http.auth import ApiKeys, Authentication
from server.http.body_reader import BodyBudget, BodyReader
from server.http.cors import CrossOrigin
from server.http.key_file import KeyFile
from server.http.middleware import RequestContext
from server.http.paths import RootPath, TidyPath
from server.state import ServerState
from server.state_watch import StateWatch
from server.telemetry.metrics import EngineCollector, Metrics
from server.telemetry.observers import Observers
from server.telemetry.tracing import Collector, PassOn, Tracing
from server.text.chat_renderer import ChatRenderer, TemplateLimits
from server.version import VERSION

ROUTERS = tuple(
    module.router for module in (completions, chat, tokenize, requests, models, status, trace, health, pages)
)
MakeEngine = Callable[[EngineConfig, EngineObserver], EngineClient]


class Application(FastAPI):
    """FastAPI, whose OpenAPI document says 400, not 422, for invalid fields."""

    def openapi(self) -> dict[str, JsonValue]:
        document = super().openapi()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return document


def create_app(
    config: Config,
    *,
    sources: Mapping[str, str] | None = None,
    observers: Sequence[EngineObserver] = (),
    make_engine: MakeEngine = EngineClient,
) -> FastAPI:
    """The application, whose ServerState is at `app.state.server`. Its lifespan is the engine's.

    sources: where each setting came from, to be shown. observers: who else hears of the engine.
    Raises KeyFileError and TracingError.
    """
    tracing = _make_tracing(config)
    state = _make_state(config, sources=sources or {}, observers=observers, make_engine=make_engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        state.chat_renderer.start()
        await state.engine.start()
        watching = [asyncio.create_task(_watch_for_failure(state))]
        if state.key_file is not None:
            watching.append(asyncio.create_task(state.key_file.watch()))
        try:
            yield
        finally:
            for task in watching:
                task.cancel()
            await state.engine.stop()
            state.chat_renderer.close()
            await asyncio.to_thread(tracing.close)

    app = Application(
        title="Peregrine",
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,  # `pages` has one that needs no internet
        redoc_url=None,
        redirect_slashes=False,  # a redirect would be built from a Host header that anybody may write
        responses={401: {"description": "no valid API key"}},
    )
    app.state.server = state
    for router in ROUTERS:
        app.include_router(router)
    install_error_handlers(app)
    app.add_middleware(BodyReader, config=config, budget=state.body_budget)  # the last one added is the outermost
    app.add_middleware(Authentication, config=config, keys=state.keys)
    routes = [route.path for owner in (app, *ROUTERS) for route in owner.routes if isinstance(route, Route)]
    app.add_middleware(TidyPath, routes=routes)
    if config.server.cors_origins:  # before the key: browsers send none with a preflight
        app.add_middleware(CrossOrigin, origins=config.server.cors_origins)
    app.add_middleware(RequestContext, is_ending=lambda: state.draining, tracing=tracing)
    if config.access.root_path:
        app.add_middleware(RootPath, root_path=config.access.root_path)
    if config.access.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=config.access.trusted_proxies)
    return app


def _make_state(
    config: Config, *, sources: Mapping[str, str], observers: Sequence[EngineObserver], make_engine: MakeEngine
) -> ServerState:
    names = config.model_names()
    keys = ApiKeys(config.server.api_keys, config.server.operator_keys, has_file=config.access.key_file is not None)
    metrics = Metrics(
        names[0],
        proposer=config.speculation.method,
        kv_cache=config.kv_cache,
        vllm_names=config.metrics.vllm_names,
    )
    all_observers = Observers(metrics)
    engine = make_engine(config.engine_config(), all_observers)
    state = ServerState(
        config=config,
        engine=engine,
        admission=Admission(
            engine, config.limits, DrainRate(), is_shared=lambda: keys.num_tenants > 1, terms_of=keys.terms_of
        ),
        metrics=metrics,
        tokenizer=None,
        model_names=names,
        started_at=time.monotonic(),
        body_budget=BodyBudget(config.operation.max_total_body_bytes),
        chat_renderer=ChatRenderer(_template_limits(config)),
        keys=keys,
        key_file=KeyFile(Path(config.access.key_file), keys) if config.access.key_file is not None else None,
        setting_sources=dict(sources),
    )
    metrics.registry.register(EngineCollector(engine, names[0], is_ready=lambda: state.is_ready))
    for observer in (state.recorder, StateWatch(state), *observers):
        all_observers.add(observer)
    return state


def _make_tracing(config: Config) -> Tracing:
    settings = config.tracing
    if settings.endpoint is None:
        return PassOn()
    return Collector(settings.endpoint, service=config.model_names()[0], ratio=settings.ratio)


def _template_limits(config: Config) -> TemplateLimits:
    return TemplateLimits(
        max_seconds=config.limits.max_template_seconds,
        max_characters=config.limits.max_template_characters,
        max_bytes=config.operation.template_memory_bytes,
    )


async def _watch_for_failure(state: ServerState) -> None:
    await state.engine.failed.wait()
    state.fail(state.engine.failure or Failed("internal", "the engine is gone"))
