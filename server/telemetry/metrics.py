"""The metrics of a server, and the events that change them. All of it runs in the event loop, in microseconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from engine.config import KVCacheConfig
from engine.ipc.messages import ModelInfo
from engine.types import RequestTiming, StepStats
from server.telemetry import metric_families as families
from server.telemetry.metric_families import Family
from server.telemetry.step_metrics import StepMetrics
from server.telemetry.token_metrics import TokenMetrics
from server.telemetry.vllm_metrics import VllmCollector
from server.version import VERSION

if TYPE_CHECKING:
    from engine.client.client import EngineClient
    from server.telemetry.token_counts import TokenCounts

ENDS = (
    ("stop", 200), ("length", 200), ("timeout", 200), ("timeout", 408), ("abort", 409), ("abort", 499), ("error", 500),
    ("error", 503), ("rejected", 429), ("rejected", 503), ("invalid", 400), ("invalid", 401), ("invalid", 404),
    ("invalid", 413), ("invalid", 415),
)  # fmt: skip
"""Outcomes and statuses that have a series before they occur: a rate begins at the second sample."""
GRAMMAR_OUTCOMES = ("compiled", "cached", "refused")
REFUSED = {408: "timeout", 429: "rejected", 500: "error", 503: "rejected"}  # other client errors are "invalid"
OUTCOMES = tuple(dict.fromkeys(outcome for outcome, _ in ENDS))
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
OPENMETRICS = "application/openmetrics-text"
OPENMETRICS_CONTENT_TYPE = openmetrics.CONTENT_TYPE_LATEST

disable_created_metrics()  # type: ignore[no-untyped-call]  # else each counter is two series, one of which nobody reads


class Metrics:
    """The instruments of one server, in a registry of its own. It is an EngineObserver."""

    def __init__(
        self,
        model_name: str,
        *,
        proposer: str = "none",
        kv_cache: KVCacheConfig | None = None,
        vllm_names: bool = False,
    ) -> None:
        """kv_cache: as configured, the defaults if left out; what was made of it is known when the engine is ready"""
        self._kv_cache = kv_cache or KVCacheConfig()
        self.registry = CollectorRegistry()
        self.model_name = model_name
        self.steps = StepMetrics(model_name, proposer)
        self.registry.register(self.steps)
        self._tokens = TokenMetrics(model_name)
        self.registry.register(self._tokens)
        self._make_request_instruments()
        self._deaths = families.ENGINE_DEATHS.counter(self.registry).labels(model_name)
        self._replayed = families.REPLAYED_REQUESTS.counter(self.registry).labels(model_name)
        self._startup_seconds = families.STARTUP_SECONDS.gauge(self.registry)
        self._build_info = families.BUILD_INFO.gauge(self.registry)
        self._kv_config = families.KV_CONFIG.gauge(self.registry)
        ProcessCollector(registry=self.registry)
        if vllm_names:
            self.registry.register(VllmCollector(self.registry))

    def _make_request_instruments(self) -> None:
        name, registry = self.model_name, self.registry
        self._received = families.REQUESTS_RECEIVED.counter(registry).labels(name)
        self._ends = families.REQUESTS.counter(registry)
        for outcome, status in ENDS:
            self._ends.labels(name, outcome, status)
        self._time_to_first_token = families.TIME_TO_FIRST_TOKEN.histogram(registry).labels(name)
        self._duration = families.REQUEST_DURATION.histogram(registry).labels(name)
        self._queue_time = families.QUEUE_TIME.histogram(registry).labels(name)
        self._prefill_time = families.PREFILL_TIME.histogram(registry).labels(name)
        self._decode_time = families.DECODE_TIME.histogram(registry).labels(name)
        self._inference_time = families.INFERENCE_TIME.histogram(registry).labels(name)
        self._time_per_output_token = families.TIME_PER_OUTPUT_TOKEN.histogram(registry).labels(name)
        self._request_prompt_tokens = families.REQUEST_PROMPT_TOKENS.histogram(registry).labels(name)
        self._request_generation_tokens = families.REQUEST_GENERATION_TOKENS.histogram(registry).labels(name)
        self._request_choices = families.REQUEST_CHOICES.histogram(registry).labels(name)
        self._request_max_tokens = families.REQUEST_MAX_TOKENS.histogram(registry).labels(name)
        self._grammars = families.GRAMMARS.counter(registry)
        for outcome in GRAMMAR_OUTCOMES:
            self._grammars.labels(name, outcome)
        self._grammar_seconds = families.GRAMMAR_SECONDS.histogram(registry).labels(name)
        self._prompt_tokens = families.PROMPT_TOKENS.counter(registry).labels(name)
        self._cached_prompt_tokens = families.CACHED_PROMPT_TOKENS.counter(registry).labels(name)

    # One HTTP request for text is one request: it arrives once, and is either finished or rejected, once.

    def request_arrived(self) -> None:
        self._received.inc()

    def request_rejected(self, outcome: str, status: int) -> None:
        """Counts a request that ended before anything of it ran."""
        self._ends.labels(self.model_name, outcome, status).inc()

    def request_refused(self, status: int) -> None:
        """Counts a request that was refused with this status, by the outcome that goes with it."""
        self.request_rejected(REFUSED.get(status, "invalid"), status)

    def request_started(self, num_choices: int, max_tokens: int) -> None:
        """Observes an admitted request: its choices per prompt, and the most output tokens of each."""
        self._request_choices.observe(num_choices)
        self._request_max_tokens.observe(max_tokens)

    def request_finished(
        self, outcome: str, status: int, counts: TokenCounts, seconds: float, timing: RequestTiming | None
    ) -> None:
        """Counts a request that ran and ended. `timing`: of the choice that ended last, if the engine reported one."""
        self.background_finished(outcome, status, counts)
        self._duration.observe(seconds)
        if timing is None:
            return
        self._queue_time.observe(timing.queued)
        self._prefill_time.observe(timing.prefill)
        self._decode_time.observe(timing.decode)
        self._inference_time.observe(timing.prefill + timing.decode)
        if counts.num_output_tokens > 1:
            self._time_per_output_token.observe(timing.decode / (counts.num_output_tokens - 1))

    def background_finished(self, outcome: str, status: int, counts: TokenCounts) -> None:
        """Counts a request that nobody waited for. How long it took says nothing of the others."""
        self._ends.labels(self.model_name, outcome, status).inc()
        self._request_prompt_tokens.observe(counts.num_prompt_tokens)
        self._request_generation_tokens.observe(counts.num_output_tokens)
        self._prompt_tokens.inc(counts.num_prompt_tokens)
        self._cached_prompt_tokens.inc(counts.num_cached_tokens)

    def first_token(self, seconds: float) -> None:
        """Observes the seconds from a request's arrival to its first token."""
        self._time_to_first_token.observe(seconds)

    def tokens_delivered(self, num_tokens: int, seconds_since_last: float | None) -> None:
        """Counts the tokens of one output. `seconds_since_last`: since the choice's last tokens; None for its first."""
        self._tokens.count(num_tokens, seconds_since_last)

    # EngineObserver

    def grammar_checked(self, outcome: str, seconds: float | None) -> None:
        """seconds: that compiling took, if it was compiled for this request"""
        self._grammars.labels(self.model_name, outcome).inc()
        if seconds is not None:
            self._grammar_seconds.observe(seconds)

    def on_phase(self, name: str, detail: str) -> None:
        """Phases are counted when they are over: `on_ready` has their times."""

    def on_ready(self, model: ModelInfo) -> None:
        self.steps.roofline.raise_ceilings(model.bytes_per_second, model.flops_per_second)
        self.steps.begin(model.num_kv_blocks, model.num_drafts)
        self._startup_seconds.clear()
        for phase, seconds in model.phase_seconds.items():
            self._startup_seconds.labels(self.model_name, phase).set(seconds)
        self._build_info.clear()
        self._build_info.labels(self.model_name, VERSION, model.fingerprint).set(1)
        self._kv_config.clear()
        self._kv_config.labels(self.model_name, *self._kv_labels(model)).set(1)

    def _kv_labels(self, model: ModelInfo) -> tuple[str, ...]:
        block_size, dtype = self._kv_cache.block_size, model.settings.get("kv_cache.dtype")
        return (
            str(block_size),
            str(model.num_kv_blocks),
            str(self._kv_cache.dtype if dtype is None else dtype.value),
            str(self._kv_cache.prefix_caching),
            str(model.num_kv_tokens),
        )

    def on_step(self, stats: StepStats) -> None:
        self.steps.count(stats)

    def on_started(self, request_id: str, waited_seconds: float) -> None:
        """Queue times are counted per request, when it ends."""

    def on_death(self, reason: str) -> None:
        self._deaths.inc()
        self.steps.forget_blocks()

    def on_replay(self, num_requests: int) -> None:
        self._replayed.inc(num_requests)

    def render(self) -> bytes:
        """All families in Prometheus's text format."""
        return generate_latest(self.registry)

    def render_openmetrics(self) -> bytes:
        """The same in OpenMetrics' text format, version 1.0.0."""
        page: bytes = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call]
        return page


class EngineCollector(Collector):
    """What the engine's client knows at the moment of a scrape."""

    def __init__(self, engine: EngineClient, model_name: str, *, is_ready: Callable[[], bool]) -> None:
        """is_ready: whether the server takes requests, which takes more than an engine"""
        self._engine = engine
        self._model_name = model_name
        self._is_ready = is_ready

    def describe(self) -> Iterator[Metric]:
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        yield self._gauge(families.REQUESTS_RUNNING, engine.num_running)
        yield self._gauge(families.MAX_REQUESTS_RUNNING, max_num_seqs(engine.model))
        yield self._gauge(families.REQUESTS_WAITING, engine.num_waiting)
        by_reason = families.WAITING_BY_REASON
        waiting = GaugeMetricFamily(by_reason.full_name, by_reason.help, labels=["model_name", *by_reason.labels])
        waiting.add_metric([self._model_name, "capacity"], engine.num_waiting)
        waiting.add_metric([self._model_name, "deferred"], 0)
        yield waiting
        yield self._gauge(families.WAITING_TOKENS, engine.num_waiting_tokens)
        yield self._gauge(families.READY, int(self._is_ready()))
        yield self._gauge(families.ENGINE_READY, int(engine.state == "ready"))
        yield self._gauge(families.SERVER_TASKS, _num_tasks())
        restarts = families.ENGINE_RESTARTS
        counter = CounterMetricFamily(restarts.full_name, restarts.help, labels=["model_name"])
        counter.add_metric([self._model_name], engine.num_restarts)
        yield counter

    def _gauge(self, family: Family, value: float) -> Metric:
        gauge = GaugeMetricFamily(family.full_name, family.help, labels=["model_name"])
        gauge.add_metric([self._model_name], value)
        return gauge


def _num_tasks() -> int:
    """Of the running event loop; 0 where none runs, before the server has begun."""
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0


def max_num_seqs(model: ModelInfo | None) -> float:
    """How many requests may run at once; 0 until that is known."""
    setting = model.settings.get("scheduler.max_num_seqs") if model is not None else None
    return setting.value if setting is not None and isinstance(setting.value, int | float) else 0.0
