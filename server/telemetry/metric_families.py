"""The one registry of metric families: instruments, the docs table and dashboards are made from it.

Conventions are Prometheus's: base units (seconds, bytes), `_total` for counters, everything labelled `model_name`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.complain import print_all

PREFIX = "peregrine_"

COARSE = (1, 1.5, 2, 3, 5, 7)  # bounds in a decade: a median is off by a third at most
FINE = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # by a sixth at most


def _decades(first: float, last: float, bounds: tuple[float, ...]) -> tuple[float, ...]:
    """Bounds of buckets from first to last, both powers of ten, with these in each decade."""
    exponents = range(round(math.log10(first)), round(math.log10(last)))
    return (*(float(f"{bound}e{exponent}") for exponent in exponents for bound in bounds), last)


def _octaves(last: int, per_octave: int) -> tuple[float, ...]:
    """Whole bounds of buckets from 1 to last, a power of two: so many between a number and its double, or all."""
    bounds: list[float] = []
    octave = 1
    while octave < last:
        step = max(octave // per_octave, 1)
        bounds += range(octave, 2 * octave, step)
        octave *= 2
    return (*bounds, last)


SECONDS = _decades(0.001, 1000, COARSE)
FINE_SECONDS = _decades(0.001, 1000, FINE)
SHORT_SECONDS = _decades(0.0001, 10, COARSE)
FINE_SHORT_SECONDS = _decades(0.0001, 10, FINE)
TOKENS = _octaves(262_144, 4)
STEP_TOKENS = _octaves(16_384, 2)
RATIOS = (0.25, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 2.8, 4.0)
CHOICES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
SEQUENCES = _octaves(1024, 2)


@dataclass(frozen=True, slots=True)
class VllmName:
    """A family under the name that vLLM gives it.

    labels: our label to vLLM's; those not named are summed away. only: the values of the first label that count.
    """

    name: str
    labels: tuple[tuple[str, str], ...] = ()
    only: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. `name` is without the prefix; `labels` are those beside `model_name`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    vllm: tuple[VllmName, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    def counter(self, registry: CollectorRegistry) -> Counter:
        assert self.kind == "counter"
        return Counter(self.full_name, self.help, ("model_name", *self.labels), registry=registry)

    def gauge(self, registry: CollectorRegistry) -> Gauge:
        assert self.kind == "gauge"
        return Gauge(self.full_name, self.help, ("model_name", *self.labels), registry=registry)

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        assert self.kind == "histogram"
        return Histogram(
            self.full_name, self.help, ("model_name", *self.labels), buckets=self.buckets, registry=registry
        )


REQUESTS_RECEIVED = Family("requests_received_total", "counter", "HTTP requests for text that arrived.")
REQUESTS = Family(
    "requests_total",
    "counter",
    "HTTP requests for text that ended, by outcome: stop, length, timeout, abort, error, rejected (no room: 429; "
    "starting, draining or down: 503), invalid. All together, and the requests still open, are the arrivals. The "
    "status is the answer's, or that of the error which ended a stream; 499: the client left.",
    ("outcome", "status"),
    vllm=(VllmName("request_success_total", (("outcome", "finished_reason"),), ("stop", "length", "abort")),),
)
TIME_TO_FIRST_TOKEN = Family(
    "time_to_first_token_seconds",
    "histogram",
    "From the arrival of a request to its first token.",
    buckets=FINE_SECONDS,
    vllm=(VllmName("time_to_first_token_seconds"),),
)
INTER_TOKEN_LATENCY = Family(
    "inter_token_latency_seconds",
    "histogram",
    "Between tokens of one choice; k tokens that come together count as k, each with 1/k of the time.",
    buckets=FINE_SHORT_SECONDS,
    vllm=(VllmName("inter_token_latency_seconds"),),
)
REQUEST_DURATION = Family(
    "request_duration_seconds",
    "histogram",
    "From the arrival of a request that ran to its end.",
    buckets=SECONDS,
    vllm=(VllmName("e2e_request_latency_seconds"),),
)
QUEUE_TIME = Family(
    "request_queue_seconds",
    "histogram",
    "Time of a request in the engine's queue, after preemptions too.",
    buckets=SECONDS,
    vllm=(VllmName("request_queue_time_seconds"),),
)
PREFILL_TIME = Family(
    "request_prefill_seconds",
    "histogram",
    "From a request's first step to its first token.",
    buckets=SECONDS,
    vllm=(VllmName("request_prefill_time_seconds"),),
)
DECODE_TIME = Family(
    "request_decode_seconds",
    "histogram",
    "From a request's first token to its last.",
    buckets=SECONDS,
    vllm=(VllmName("request_decode_time_seconds"),),
)
INFERENCE_TIME = Family(
    "request_inference_seconds",
    "histogram",
    "From a request's first step to its last token.",
    buckets=SECONDS,
    vllm=(VllmName("request_inference_time_seconds"),),
)
TIME_PER_OUTPUT_TOKEN = Family(
    "request_time_per_output_token_seconds",
    "histogram",
    "Decode time of a request by its tokens after the first.",
    buckets=FINE_SHORT_SECONDS,
    vllm=(VllmName("request_time_per_output_token_seconds"),),
)
REQUEST_PROMPT_TOKENS = Family(
    "request_prompt_tokens",
    "histogram",
    "Prompt tokens of a request.",
    buckets=TOKENS,
    vllm=(VllmName("request_prompt_tokens"),),
)
REQUEST_GENERATION_TOKENS = Family(
    "request_generation_tokens",
    "histogram",
    "Output tokens of a request.",
    buckets=TOKENS,
    vllm=(VllmName("request_generation_tokens"),),
)
REQUEST_CHOICES = Family(
    "request_choices",
    "histogram",
    "Choices per prompt that a request asked for (n).",
    buckets=CHOICES,
    vllm=(VllmName("request_params_n"),),
)
REQUEST_MAX_TOKENS = Family(
    "request_max_tokens",
    "histogram",
    "Output tokens per choice that a request allowed (max_tokens).",
    buckets=TOKENS,
    vllm=(VllmName("request_params_max_tokens"),),
)
PROMPT_TOKENS = Family(
    "prompt_tokens_total",
    "counter",
    "Prompt tokens of requests that ran; counted when they end.",
    vllm=(VllmName("prompt_tokens_total"),),
)
CACHED_PROMPT_TOKENS = Family(
    "cached_prompt_tokens_total", "counter", "Prompt tokens of requests that ran which the prefix cache held."
)
GENERATION_TOKENS = Family(
    "generation_tokens_total",
    "counter",
    "Output tokens handed to requests, as they come.",
    vllm=(VllmName("generation_tokens_total"),),
)
REQUESTS_RUNNING = Family(
    "requests_running",
    "gauge",
    "Sequences that the engine has started and not finished.",
    vllm=(VllmName("num_requests_running"),),
)
MAX_REQUESTS_RUNNING = Family(
    "max_requests_running", "gauge", "Sequences that may run at once (scheduler.max_num_seqs); 0 until that is known."
)
REQUESTS_WAITING = Family(
    "requests_waiting",
    "gauge",
    "Sequences that wait for the engine to start them.",
    vllm=(VllmName("num_requests_waiting"),),
)
WAITING_BY_REASON = Family(
    "requests_waiting_by_reason",
    "gauge",
    "The same by reason: capacity (for a place in the batch or in memory), deferred (for anything else: none do).",
    ("reason",),
    vllm=(VllmName("num_requests_waiting_by_reason", (("reason", "reason"),)),),
)
WAITING_TOKENS = Family("waiting_prompt_tokens", "gauge", "Prompt tokens of the sequences that wait.")
STEP_SECONDS = Family(
    "step_seconds",
    "histogram",
    "Time of a step by phase: schedule, forward, sample, update, propose.",
    ("phase",),
    buckets=SHORT_SECONDS,
)
STEP_SIZE = Family(
    "step_tokens",
    "histogram",
    "Tokens computed in a step.",
    buckets=STEP_TOKENS,
)
STEP_PROGRESS = Family(
    "step_progress_tokens",
    "histogram",
    "Tokens of a step that gave requests any: those, and the computed prompt tokens of requests whose first it gave.",
    buckets=STEP_TOKENS,
    vllm=(VllmName("iteration_tokens_total"),),
)
PACED_PROMPT_TOKENS = Family(
    "paced_prompt_tokens",
    "histogram",
    "Prompt tokens of a step beside streams, with scheduler.target_itl_ms: the chunks that it has chosen.",
    buckets=STEP_TOKENS,
)
PACED_STEPS = Family(
    "paced_steps_total",
    "counter",
    "Steps with prompts beside streams, with scheduler.target_itl_ms, by what ended the prompts' part: none (all that "
    "there was, or the token budget); target; least (the streams alone take as long as the target: it is not met).",
    ("limit",),
)
STEP_TIME_RATIO = Family(
    "step_time_ratio",
    "histogram",
    "Time of a step over what was predicted for it, with scheduler.target_itl_ms.",
    buckets=RATIOS,
)
STEP_SEQUENCES = Family("step_sequences", "histogram", "Sequences in a step (the batch size).", buckets=SEQUENCES)
PREEMPTIONS = Family(
    "preemptions_total",
    "counter",
    "Sequences that lost their KV cache to others and were recomputed.",
    vllm=(VllmName("num_preemptions_total"),),
)
PREFIX_QUERIES = Family(
    "prefix_cache_queries_total",
    "counter",
    "Prompt tokens looked up in the prefix cache.",
    vllm=(VllmName("prefix_cache_queries_total"),),
)
PREFIX_HITS = Family(
    "prefix_cache_hits_total",
    "counter",
    "Prompt tokens found in the prefix cache.",
    vllm=(VllmName("prefix_cache_hits_total"),),
)
KV_BLOCKS = Family(
    "kv_blocks", "gauge", "KV blocks by state: owned by sequences, cached (free, with a prefix), free.", ("state",)
)
ENGINE_DEGRADED = Family(
    "engine_degraded",
    "gauge",
    "1 while steps do without something that has failed, until it is tried again: the whole token budget, steps "
    "launched ahead, new CUDA graphs.",
    ("mode",),
)
KV_USAGE = Family(
    "kv_cache_usage_ratio", "gauge", "Owned share of the KV blocks.", vllm=(VllmName("kv_cache_usage_perc"),)
)
KV_CONFIG = Family(
    "kv_cache_config_info",
    "gauge",
    "Always 1; how the KV cache was made.",
    ("block_size", "num_blocks", "dtype", "prefix_caching", "num_tokens"),
    vllm=(
        VllmName(
            "cache_config_info",
            (
                ("block_size", "block_size"),
                ("num_blocks", "num_gpu_blocks"),
                ("dtype", "cache_dtype"),
                ("prefix_caching", "enable_prefix_caching"),
                ("num_tokens", "kv_cache_size_tokens"),
            ),
        ),
    ),
)
DRAFTS = Family(
    "drafts_total",
    "counter",
    "Times that a sequence carried drafts into a step.",
    ("proposer",),
    vllm=(VllmName("spec_decode_num_drafts_total"),),
)
DRAFT_TOKENS = Family(
    "draft_tokens_total",
    "counter",
    "Draft tokens verified.",
    ("proposer",),
    vllm=(VllmName("spec_decode_num_draft_tokens_total"),),
)
ACCEPTED_DRAFT_TOKENS = Family(
    "accepted_draft_tokens_total",
    "counter",
    "Draft tokens accepted, by their depth in the draft (0 is the first).",
    ("proposer", "position"),
    vllm=(
        VllmName("spec_decode_num_accepted_tokens_total"),
        VllmName("spec_decode_num_accepted_tokens_per_pos_total", (("position", "position"),)),
    ),
)
DRAFTED_STEPS = Family(
    "drafted_steps_total",
    "counter",
    "Steps by what came of drafting for the next one: drafted; no_guess; unlikely (no draft was worth its row); "
    "too_slow (drafting costs more than it gains); failed (the proposer is left out for a while).",
    ("proposer", "outcome"),
)
GRAMMARS = Family(
    "grammars_total",
    "counter",
    "Grammars that requests asked their answers to follow, by what came of them: compiled, cached (known from another "
    "request), refused (400: too large, not supported, took too long).",
    ("outcome",),
)
GRAMMAR_SECONDS = Family(
    "grammar_compile_seconds",
    "histogram",
    "Time to compile a grammar that was not known, and was not refused for its size.",
    buckets=SHORT_SECONDS,
)
READY = Family("ready", "gauge", "1 while GET /readyz says that requests are taken; not while the server drains.")
ENGINE_READY = Family("engine_ready", "gauge", "1 while the engine has a model and can run requests.")
SERVER_TASKS = Family(
    "server_tasks", "gauge", "Tasks of the server's event loop: one for each request that is answered, and a few more."
)
ENGINE_DEATHS = Family("engine_deaths_total", "counter", "Times that the engine process ended without being asked to.")
ENGINE_RESTARTS = Family("engine_restarts_total", "counter", "Times that the engine process was started again.")
REPLAYED_REQUESTS = Family(
    "replayed_requests_total", "counter", "Sequences that a restarted engine went on with, where the last one died."
)
STARTUP_SECONDS = Family("startup_seconds", "gauge", "Time of each phase of the engine's latest start.", ("phase",))
MODEL_BYTES = Family("model_bytes_total", "counter", "Bytes of weights and KV cache that the steps had to read.")
MODEL_FLOPS = Family("model_flops_total", "counter", "Floating-point operations that the steps had to do.")
ACHIEVED_BYTES = Family("achieved_bytes_per_second", "gauge", "Reads in the forward pass, over its last seconds.")
ACHIEVED_FLOPS = Family("achieved_flops_per_second", "gauge", "Arithmetic in the forward pass, over its last seconds.")
CEILING_BYTES = Family("ceiling_bytes_per_second", "gauge", "Fastest reads seen on this machine.")
CEILING_FLOPS = Family("ceiling_flops_per_second", "gauge", "Fastest arithmetic seen on this machine.")
ROOFLINE = Family(
    "roofline_ratio", "gauge", "Least time that the ceilings allow for the forward pass, by the time that it took."
)
BATCHES = Family("batches", "gauge", "Batches that are kept, by status.", ("status",))
BATCH_LINES = Family(
    "batch_lines_total",
    "counter",
    "Requests of batches that were written to a file of answers, by outcome: completed, failed, expired, cancelled.",
    ("outcome",),
)
BATCH_LINES_IN_WORK = Family("batch_lines_in_work", "gauge", "Requests of batches that the server answers now.")
BATCH_FILE_BYTES = Family("batch_file_bytes", "gauge", "Bytes of the files that are kept for batches.")
BUILD_INFO = Family("build_info", "gauge", "Always 1; what runs.", ("version", "fingerprint"))

FAMILIES = tuple(value for value in list(globals().values()) if isinstance(value, Family))


def docs_table() -> str:
    """The registry as a Markdown table."""
    rows = ["| family | type | labels | meaning | with `metrics.vllm_names` |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        labels = ", ".join(f"`{label}`" for label in ("model_name", *family.labels))
        aliases = ", ".join(f"`vllm:{alias.name}`" for alias in family.vllm)
        rows.append(f"| `{family.full_name}` | {family.kind} | {labels} | {family.help} | {aliases} |")
    return "\n".join(rows) + "\n"


def docs_page() -> str:
    """The file docs/metrics.md, which a test compares with this."""
    return (
        "# Metrics\n\n"
        "What `GET /metrics` serves, in Prometheus's text format. With `metrics.vllm_names: true` the names of the\n"
        "last column are there too, for dashboards that read those. All of it is kept in the server process, so a\n"
        "restart of the engine resets no counter.\n\n"
        "Made by: `python -m server.telemetry.metric_families > docs/metrics.md`\n\n"
    ) + docs_table()


if __name__ == "__main__":
    sys.exit(print_all(docs_page()))
