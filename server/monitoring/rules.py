"""Prometheus's rules: what is worth recording, by model over all replicas, and what somebody should be woken for.

Made by: python -m server.monitoring.rules > configs/monitoring/rules.yml
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import yaml

from server.complain import print_all
from server.monitoring.promql import Scope, ratio
from server.telemetry import metric_families as families

MODEL = ("model_name",)
JOB = 'job="peregrine"'  # as configs/monitoring/prometheus.yml names it
FIVE_MINUTES = Scope("", "5m")
REQUESTS = FIVE_MINUTES.rate(families.REQUESTS, by=MODEL)


@dataclass(frozen=True, slots=True)
class Recording:
    """A series that is computed as others come in. `level:metric:operations`, as Prometheus's documents name them."""

    name: str
    expression: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """Fires while `expression` `condition` (such as "> 0.05"; empty: the expression has its own) for so long."""

    name: str
    expression: str
    condition: str = ""
    lasts: str
    severity: str
    summary: str
    description: str

    @property
    def whole(self) -> str:
        return f"{self.expression} {self.condition}".strip()


RECORDINGS = (
    Recording("model:peregrine_requests:rate5m", REQUESTS),
    Recording(
        "model:peregrine_error_ratio:rate5m",
        ratio(FIVE_MINUTES.rate(families.REQUESTS, by=MODEL, status="5.."), REQUESTS),
    ),
    Recording(
        "model:peregrine_rejected_ratio:rate5m",
        ratio(FIVE_MINUTES.rate(families.REQUESTS, by=MODEL, status="429"), REQUESTS),
    ),
    Recording("model:peregrine_generation_tokens:rate5m", FIVE_MINUTES.rate(families.GENERATION_TOKENS, by=MODEL)),
    *(
        Recording(f"model:peregrine_{family.name}:p{100 * level:g}_5m", FIVE_MINUTES.quantile(level, family, by=MODEL))
        for family in (families.TIME_TO_FIRST_TOKEN, families.INTER_TOKEN_LATENCY, families.QUEUE_TIME)
        for level in (0.5, 0.99)
    ),
    Recording(
        "model:peregrine_prefix_hit_ratio:rate5m",
        ratio(FIVE_MINUTES.rate(families.PREFIX_HITS, by=MODEL), FIVE_MINUTES.rate(families.PREFIX_QUERIES, by=MODEL)),
    ),
    Recording(
        "model:peregrine_draft_acceptance_ratio:rate5m",
        ratio(
            FIVE_MINUTES.rate(families.ACCEPTED_DRAFT_TOKENS, by=MODEL),
            FIVE_MINUTES.rate(families.DRAFT_TOKENS, by=MODEL),
        ),
    ),
    Recording("model:peregrine_ready:sum", FIVE_MINUTES.gauge(families.READY, by=MODEL)),
)

ALERTS = (
    Alert(
        name="PeregrineNothingReady",
        expression=f"absent({families.READY.full_name} == 1)",
        lasts="2m",
        severity="critical",
        summary="No replica takes requests",
        description="No replica says that it is ready, or none can be scraped. GET /readyz of each says why.",
    ),
    Alert(
        name="PeregrineReplicaDown",
        expression=f"up{{{JOB}}}",
        condition="== 0",
        lasts="2m",
        severity="warning",
        summary="{{ $labels.instance }} cannot be scraped",
        description="The process is gone, the address is wrong, or /metrics wants a key (metrics.public).",
    ),
    Alert(
        name="PeregrineReplicaNotReady",
        expression=families.READY.full_name,
        condition="== 0",
        lasts="15m",
        severity="warning",
        summary="{{ $labels.instance }} runs and takes no requests",
        description="It starts, restarts or drains for longer than either should take. GET /readyz has the phase.",
    ),
    Alert(
        name="PeregrineErrors",
        expression="model:peregrine_error_ratio:rate5m",
        condition="> 0.05",
        lasts="5m",
        severity="critical",
        summary="{{ $value | humanizePercentage }} of the requests for {{ $labels.model_name }} fail",
        description="Their status is 500 or above. The dashboard's errors by status tell mistakes (500) from servers "
        "that are not there (503).",
    ),
    Alert(
        name="PeregrineTurnsAway",
        expression="model:peregrine_rejected_ratio:rate5m",
        condition="> 0.05",
        lasts="10m",
        severity="warning",
        summary="{{ $value | humanizePercentage }} of the requests for {{ $labels.model_name }} find the queue full",
        description="They get a 429. More replicas are needed, or a longer queue (limits.max_queued_requests).",
    ),
    Alert(
        name="PeregrineSlowFirstToken",
        expression="model:peregrine_time_to_first_token_seconds:p99_5m",
        condition="> 10",
        lasts="10m",
        severity="warning",
        summary="{{ $labels.model_name }}: p99 of the time to first token is {{ $value | humanizeDuration }}",
        description="The dashboard's row on latency tells the queue from the prefill.",
    ),
    Alert(
        name="PeregrineSlowTokens",
        expression="model:peregrine_inter_token_latency_seconds:p99_5m",
        condition="> 0.5",
        lasts="10m",
        severity="warning",
        summary="{{ $labels.model_name }}: p99 of the time between tokens is {{ $value | humanizeDuration }}",
        description="Steps are too large for the machine (scheduler.max_num_batched_tokens), or something else uses "
        "it.",
    ),
    Alert(
        name="PeregrineLongQueue",
        expression="model:peregrine_request_queue_seconds:p50_5m",
        condition="> 5",
        lasts="10m",
        severity="warning",
        summary="{{ $labels.model_name }}: half of the requests wait longer than {{ $value | humanizeDuration }}",
        description="More replicas are needed, or fewer requests.",
    ),
    Alert(
        name="PeregrineStalled",
        expression=f"min_over_time({families.REQUESTS_RUNNING.full_name}[3m]) > 0 unless on (instance, model_name) "
        f"(rate({families.STEP_SIZE.full_name}_count[3m]) > 0)",
        lasts="2m",
        severity="critical",
        summary="{{ $labels.instance }} has requests and takes no steps",
        description="The engine hangs, and was not replaced. Its log and GET /v1/server/trace have its last steps.",
    ),
    Alert(
        name="PeregrineEngineDied",
        expression=f"increase({families.ENGINE_DEATHS.full_name}[15m])",
        condition="> 0",
        lasts="0m",
        severity="warning",
        summary="The engine of {{ $labels.instance }} died and was started again",
        description="Its requests went on. The log names the signal or the error; a crash report lies beside it.",
    ),
    Alert(
        name="PeregrineDegraded",
        expression=families.ENGINE_DEGRADED.full_name,
        condition="== 1",
        lasts="30m",
        severity="warning",
        summary="{{ $labels.instance }} does without {{ $labels.mode }}",
        description="Something failed and is tried again now and then, without success. The log says what.",
    ),
    Alert(
        name="PeregrineThrashing",
        expression=f"rate({families.PREEMPTIONS.full_name}[10m])",
        condition="> 0.1",
        lasts="10m",
        severity="warning",
        summary="{{ $labels.instance }} recomputes sequences that lost their KV cache",
        description="The KV cache is too small for the contexts that run at once: raise kv_cache.memory, lower "
        "scheduler.max_num_seqs, or add replicas.",
    ),
    Alert(
        name="PeregrineFullKVCache",
        expression=f"min_over_time({families.KV_USAGE.full_name}[10m])",
        condition="> 0.95",
        lasts="10m",
        severity="info",
        summary="The KV cache of {{ $labels.instance }} is full all the time",
        description="Requests wait for memory, not for arithmetic.",
    ),
    Alert(
        name="PeregrineReplicasDiffer",
        expression=f"count by (model_name) (count by (model_name, fingerprint) ({families.BUILD_INFO.full_name}))",
        condition="> 1",
        lasts="1h",
        severity="info",
        summary="Replicas of {{ $labels.model_name }} run {{ $value }} different builds or weights",
        description="Equal seeds give different answers on them. Right during a rollout, wrong after it.",
    ),
)


def rules_page() -> str:
    """The file configs/monitoring/rules.yml, which a test compares with this."""
    recorded = [{"record": rule.name, "expr": rule.expression} for rule in RECORDINGS]
    alerts = [
        {
            "alert": alert.name,
            "expr": alert.whole,
            "for": alert.lasts,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "description": alert.description},
        }
        for alert in ALERTS
    ]
    groups = [{"name": "peregrine-recorded", "rules": recorded}, {"name": "peregrine-alerts", "rules": alerts}]
    head = "# Made by: python -m server.monitoring.rules > configs/monitoring/rules.yml\n"
    return head + yaml.safe_dump({"groups": groups}, sort_keys=False, width=120)


if __name__ == "__main__":
    sys.exit(print_all(rules_page()))
