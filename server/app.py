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
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from engine.client.client import EngineClient, EngineObserver
from engine.config import EngineConfig
from engine.ipc.messages import Failed
from server.api import (
    batches,
    chat,
    completions,
    embeddings,
    files,
    health,
    models,
    pages,
    requests,
    status,
    tokenize,
    trace,
)
from server.api.chat_prompt import template_traits
from server.api.messages_api import routes as messages
from server.api.messages_api.blocks import word_error
from server.api.ollama_api import routes as ollama
from server.api.responses_api import routes as responses
from server.config import Config
from server.errors import install_error_handlers
from server.generation.admission import Admission, DrainRate
from server.generation.answer_store import AnswerStore
from server.http.auth import ApiKeys, Authentication
from server.http.body_reader import BodyBudget, BodyReader
from server.http.cors import CrossOrigin
from server.http.envelopes import Envelopes, WordError
from server.http.key_file import KeyFile
from server.http.middleware import RequestContext
from server.http.paths import RootPath, TidyPath
from server.http.refusals import CountRefusals
from server.offline.batch_folder import BatchFolder
from server.offline.batch_metrics import BatchCollector
from server.offline.batch_service import BatchService, Host
from server.state import ServerState
from server.state_watch import StateWatch
from server.structured.grammar_checker import GrammarChecker, GrammarLimits
from server.telemetry.metrics import EngineCollector, Metrics, max_num_seqs
from server.telemetry.observers import Observers
from server.telemetry.tracing import Collector, PassOn, Tracing
from server.text.chat_renderer import ChatRenderer, TemplateLimits
from server.version import VERSION

ROUTERS = tuple(
    module.router
    for module in (
        completions, chat, responses, messages, embeddings, ollama, files, batches, tokenize, requests, models, status,
        trace, health, pages,
    )
)  # fmt: skip
ENVELOPES: dict[str, WordError] = {"/v1/messages": word_error, "/api": ollama.word_error}
"""Of paths whose API has another form of errors than OpenAI's."""
ANSWERING = (completions.router, chat.router, responses.router, embeddings.router)
"""What lines of batches may ask: every POST with one path."""
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
    Raises KeyFileError, BatchFolderError and TracingError.
    """
    tracing = _make_tracing(config)
    state = _make_state(config, sources=sources or {}, observers=observers, make_engine=make_engine)
    state.batches = _make_batches(state, tracing)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        state.chat_renderer.start()
        await state.engine.start()
        watching = _begin_watching(state)
        if state.batches is not None:
            state.batches.start()
        try:
            yield
        finally:
            for task in watching:
                task.cancel()
            if state.batches is not None:
                await state.batches.stop()
            await state.engine.stop()
            state.chat_renderer.close()
            state.grammar_checker.close()
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
    _add_guards(app, state, tracing)
    return app


def _add_guards(app: FastAPI, state: ServerState, tracing: Tracing) -> None:
    """The middleware, from the innermost: each one added is around those before."""
    config = state.config
    app.add_middleware(BodyReader, config=config, budget=state.body_budget)
    app.add_middleware(Authentication, config=config, keys=state.keys)
    app.add_middleware(CountRefusals, metrics=state.metrics)
    routes = [route.path for owner in (app, *ROUTERS) for route in owner.routes if isinstance(route, Route)]
    app.add_middleware(TidyPath, routes=routes)
    if config.server.cors_origins:  # before the key: browsers send none with a preflight
        app.add_middleware(CrossOrigin, origins=config.server.cors_origins)
    app.add_middleware(RequestContext, is_ending=lambda: state.draining, tracing=tracing)
    app.add_middleware(Envelopes, by_prefix=ENVELOPES)  # around what answers for bugs, too
    if config.access.root_path:
        app.add_middleware(RootPath, root_path=config.access.root_path)
    if config.access.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=config.access.trusted_proxies)


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
            engine,
            config.limits,
            DrainRate(),
            is_shared=lambda: keys.num_tenants > 1,
            terms_of=keys.terms_of,
            num_seats=lambda: int(max_num_seqs(engine.model)),
        ),
        metrics=metrics,
        tokenizer=None,
        model_names=names,
        started_at=time.monotonic(),
        body_budget=BodyBudget(config.operation.max_total_body_bytes),
        chat_renderer=ChatRenderer(_template_limits(config)),
        grammar_checker=GrammarChecker(_grammar_limits(config), metrics.grammar_checked),
        keys=keys,
        key_file=KeyFile(Path(config.access.key_file), keys) if config.access.key_file is not None else None,
        setting_sources=dict(sources),
        answers=AnswerStore(max_answers=config.limits.max_stored_responses, max_bytes=config.limits.max_stored_bytes),
    )
    metrics.registry.register(EngineCollector(engine, names[0], is_ready=lambda: state.is_ready))
    for observer in (state.recorder, StateWatch(state), *observers):
        all_observers.add(observer)
    return state


def make_offline_app(state: ServerState, tracing: Tracing | None = None) -> ASGIApp:
    """The routes that answer lines of batches, for callers in this process: without what guards them from others."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.server = state
    for router in ANSWERING:
        app.include_router(router)
    install_error_handlers(app)
    app.add_middleware(RequestContext, is_ending=lambda: False, tracing=tracing or PassOn())
    return app


def offline_urls() -> frozenset[str]:
    """What lines of batches may name."""
    routes = (route for router in ANSWERING for route in router.routes if isinstance(route, Route))
    return frozenset(route.path for route in routes if "POST" in (route.methods or ()) and "{" not in route.path)


def _make_batches(state: ServerState, tracing: Tracing) -> BatchService | None:
    """None without a folder. Its metrics are there in any case. Raises BatchFolderError."""
    config, service = state.config, None
    if config.batches.folder is not None:
        folder = BatchFolder(Path(config.batches.folder))
        service = BatchService(folder, config.batches, _batch_host(state, tracing))
    state.metrics.registry.register(BatchCollector(service, state.model_names[0]))
    return service


def _batch_host(state: ServerState, tracing: Tracing) -> Host:
    return Host(
        app=make_offline_app(state, tracing),
        urls=offline_urls(),
        keys=state.keys,
        model_name=state.model_names[0],
        max_line_bytes=state.config.limits.max_body_bytes,
        is_ending=lambda: state.is_ending,
        num_seats=lambda: state.num_seats,
        until_ready=lambda: asyncio.ensure_future(state.first_ready.wait()),
    )


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


def _grammar_limits(config: Config) -> GrammarLimits:
    return GrammarLimits(
        max_text_bytes=config.limits.max_grammar_bytes,
        max_seconds=config.limits.max_grammar_seconds,
        max_memory_bytes=config.operation.grammar_memory_bytes,
    )


async def _probe_template(state: ServerState) -> None:
    """Finds out what the chat template does with tools and reasoning, so that the first chat need not wait for it."""
    await state.first_ready.wait()
    if state.tokenizer is not None:
        await template_traits(state, state.tokenizer)


def _begin_watching(state: ServerState) -> list[asyncio.Task[None]]:
    """The tasks that watch while the server runs; to be cancelled."""
    watching = [asyncio.create_task(_watch_for_failure(state)), asyncio.create_task(_probe_template(state))]
    if state.key_file is not None:
        watching.append(asyncio.create_task(state.key_file.watch()))
    return watching


async def _watch_for_failure(state: ServerState) -> None:
    await state.engine.failed.wait()
    state.fail(state.engine.failure or Failed("internal", "the engine is gone"))
