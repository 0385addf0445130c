"""The rows of the dashboard: an overview for everybody, and closed rows for who wants to know why."""

from __future__ import annotations

from server.monitoring.batches_row import batches_row
from server.monitoring.panels import Panel, Query, Row
from server.monitoring.promql import Scope, ratio
from server.telemetry import metric_families as families
from server.telemetry.metric_families import Family

SCOPE = Scope('model_name=~"$model", instance=~"$instance"', "$__rate_interval")
PROCESS = 'instance=~"$instance"'  # metrics of the server's process, which know no model
NOT_SERVED = "4..|5.."


def quantiles(family: Family, *levels: float) -> list[Query]:
    return [Query(SCOPE.quantile(level, family), f"p{100 * level:g}") for level in levels]


def errors() -> str:
    return SCOPE.rate(families.REQUESTS, status="5..")


OVERVIEW = Row(
    "Overview",
    is_open=True,
    panels=[
        Panel(
            title="Replicas ready", kind="stat", unit="none", width=3, thresholds=(1, 1), is_more_better=True,
            description="Servers that take requests now (GET /readyz).",
            queries=[Query(SCOPE.gauge(families.READY), "ready")],
        ),
        Panel(
            title="Requests", kind="stat", unit="reqps", width=3,
            description="Requests for text that arrive.",
            queries=[Query(SCOPE.rate(families.REQUESTS_RECEIVED))],
        ),
        Panel(
            title="Output", kind="stat", unit="tokens/s", width=3,
            description="Tokens handed to requests.",
            queries=[Query(SCOPE.rate(families.GENERATION_TOKENS))],
        ),
        Panel(
            title="Errors", kind="stat", unit="percentunit", width=3, thresholds=(0.01, 0.05),
            description="Share of the requests that ended with a status of 500 and above: our mistakes, and servers "
            "that started, drained or were down.",
            queries=[Query(ratio(errors(), SCOPE.rate(families.REQUESTS)))],
        ),
        Panel(
            title="Turned away", kind="stat", unit="percentunit", width=3, thresholds=(0.01, 0.05),
            description="Share of the requests that got a 429, as the queue was full: more replicas are needed.",
            queries=[Query(ratio(SCOPE.rate(families.REQUESTS, status="429"), SCOPE.rate(families.REQUESTS)))],
        ),
        Panel(
            title="First token, p99", kind="stat", unit="s", width=3, thresholds=(2, 10),
            description="Time to the first token of all but the slowest hundredth of requests.",
            queries=quantiles(families.TIME_TO_FIRST_TOKEN, 0.99),
        ),
        Panel(
            title="Next token, p99", kind="stat", unit="s", width=3, thresholds=(0.1, 0.5),
            description="Time between tokens of all but the slowest hundredth of them.",
            queries=quantiles(families.INTER_TOKEN_LATENCY, 0.99),
        ),
        Panel(
            title="Fullest KV cache", kind="stat", unit="percentunit", width=3, thresholds=(0.8, 0.95),
            description="Owned share of the KV blocks, of the replica where it is highest.",
            queries=[Query(SCOPE.gauge(families.KV_USAGE, aggregate="max"))],
        ),
        Panel(
            title="Requests by outcome", unit="reqps", is_stacked=True,
            description="Ends of requests. stop and length are answers; abort: the client left; rejected: no room "
            "(429), or not serving (503); invalid: the client's mistake.",
            queries=[Query(SCOPE.rate(families.REQUESTS, by=("outcome",)), "{{outcome}}")],
        ),
        Panel(
            title="Errors by status", unit="reqps",
            description="Ends without an answer, by HTTP status: 429 asks for more replicas, 503 for a look at the "
            "replicas, 500 for one at the log, 4xx at the clients. 499: the client left.",
            queries=[Query(SCOPE.rate(families.REQUESTS, by=("status",), status=NOT_SERVED), "{{status}}")],
        ),
        Panel(
            title="Tokens", unit="tokens/s",
            description="Output as it comes; prompts when their requests end, those found in the prefix cache beside "
            "all.",
            queries=[
                Query(SCOPE.rate(families.GENERATION_TOKENS), "output"),
                Query(SCOPE.rate(families.PROMPT_TOKENS), "prompts"),
                Query(SCOPE.rate(families.CACHED_PROMPT_TOKENS), "of these cached"),
            ],
        ),
        Panel(
            title="Time to first token", kind="heatmap", unit="s", width=12,
            description="From the arrival of a request to its first token. Two bands are two kinds of requests; a band "
            "that rises is a queue.",
            queries=[Query(SCOPE.heatmap(families.TIME_TO_FIRST_TOKEN))],
        ),
        Panel(
            title="Time between tokens", kind="heatmap", unit="s", width=12,
            description="Of one choice, per token. A second band above the first: prompts of others in the same steps.",
            queries=[Query(SCOPE.heatmap(families.INTER_TOKEN_LATENCY))],
        ),
        Panel(
            title="Queue", unit="none",
            description="Sequences that run, and that wait for a place in the batch or in the KV cache.",
            queries=[
                Query(SCOPE.gauge(families.REQUESTS_RUNNING), "running"),
                Query(SCOPE.gauge(families.REQUESTS_WAITING), "waiting"),
            ],
        ),
        Panel(
            title="Saturation", unit="percentunit",
            description="What is full first: seats in the batch (scheduler.max_num_seqs), KV blocks, or the time of "
            "the engine (share of it spent in steps).",
            queries=[
                Query(
                    ratio(SCOPE.gauge(families.REQUESTS_RUNNING), SCOPE.gauge(families.MAX_REQUESTS_RUNNING)), "seats"
                ),
                Query(SCOPE.gauge(families.KV_USAGE, aggregate="avg"), "KV blocks"),
                Query(
                    # rates are extrapolated to the ends of the window, which may give a hundredth too much
                    f"clamp_max({ratio(SCOPE.sums(families.STEP_SECONDS), SCOPE.gauge(families.ENGINE_READY))}, 1)",
                    "engine's time",
                ),
            ],
        ),
        Panel(
            title="Prompt tokens that wait", unit="tokens",
            description="Of the sequences in the queue: the work ahead of who comes now.",
            queries=[Query(SCOPE.gauge(families.WAITING_TOKENS), "waiting")],
        ),
    ],
)  # fmt: skip

LATENCY = Row(
    "Latency: where the time goes",
    panels=[
        Panel(
            title="Time to first token", unit="s", description="From arrival to the first token.",
            queries=quantiles(families.TIME_TO_FIRST_TOKEN, 0.5, 0.9, 0.99),
        ),
        Panel(
            title="Time between tokens", unit="s",
            description="Of one choice; k tokens that come together count as k, each with 1/k of the time.",
            queries=quantiles(families.INTER_TOKEN_LATENCY, 0.5, 0.9, 0.99),
        ),
        Panel(
            title="Whole requests", unit="s", description="From arrival to the end, of requests that ran.",
            queries=quantiles(families.REQUEST_DURATION, 0.5, 0.9, 0.99),
        ),
        Panel(
            title="Parts of a request, mean", unit="s", is_stacked=True,
            description="In the engine: the queue, from the first step to the first token, from there to the last.",
            queries=[
                Query(SCOPE.mean(families.QUEUE_TIME), "queue"),
                Query(SCOPE.mean(families.PREFILL_TIME), "prefill"),
                Query(SCOPE.mean(families.DECODE_TIME), "decode"),
            ],
        ),
        Panel(
            title="Queue and prefill", unit="s",
            description="The two parts of the time to the first token. A long queue wants replicas, a long prefill "
            "shorter or better shared prompts.",
            queries=[
                Query(SCOPE.quantile(0.5, families.QUEUE_TIME), "queue p50"),
                Query(SCOPE.quantile(0.99, families.QUEUE_TIME), "queue p99"),
                Query(SCOPE.quantile(0.5, families.PREFILL_TIME), "prefill p50"),
                Query(SCOPE.quantile(0.99, families.PREFILL_TIME), "prefill p99"),
            ],
        ),
        Panel(
            title="Steps of a request", unit="s",
            description="From a request's first step to its last token, and the part of it after the first token.",
            queries=[
                Query(SCOPE.quantile(0.5, families.INFERENCE_TIME), "all p50"),
                Query(SCOPE.quantile(0.99, families.INFERENCE_TIME), "all p99"),
                Query(SCOPE.quantile(0.5, families.DECODE_TIME), "decode p50"),
                Query(SCOPE.quantile(0.99, families.DECODE_TIME), "decode p99"),
            ],
        ),
        Panel(
            title="Pace of a request", unit="s",
            description="Decode time of a request by its tokens after the first: what a reader of a stream feels.",
            queries=quantiles(families.TIME_PER_OUTPUT_TOKEN, 0.5, 0.9, 0.99),
        ),
        Panel(
            title="A step by phase, mean", unit="s", is_stacked=True,
            description="All but forward and sample is overhead of the host.",
            queries=[Query(SCOPE.mean(families.STEP_SECONDS, by=("phase",)), "{{phase}}")],
        ),
        Panel(
            title="A step by phase, p99", unit="s", description="The slow steps: usually those with prompts.",
            queries=[Query(SCOPE.quantile(0.99, families.STEP_SECONDS, by=("phase",)), "{{phase}}")],
        ),
        Panel(
            title="What is in a step, mean", unit="none",
            description="Tokens computed (prompts and drafts included), tokens that brought requests further, and "
            "sequences.",
            queries=[
                Query(SCOPE.mean(families.STEP_SIZE), "tokens computed"),
                Query(SCOPE.mean(families.STEP_PROGRESS), "of use"),
                Query(SCOPE.mean(families.STEP_SEQUENCES), "sequences"),
            ],
        ),
        Panel(
            title="Prompts beside streams", unit="none",
            description="With scheduler.target_itl_ms: the prompt tokens of a step beside streams, mean, and which "
            "share of such steps the target has cut, or could not be met in, however little the prompts got.",
            queries=[
                Query(SCOPE.mean(families.PACED_PROMPT_TOKENS), "prompt tokens"),
                Query(
                    ratio(SCOPE.rate(families.PACED_STEPS, limit="target"), SCOPE.rate(families.PACED_STEPS)),
                    "share cut to the target",
                ),
                Query(
                    ratio(SCOPE.rate(families.PACED_STEPS, limit="least"), SCOPE.rate(families.PACED_STEPS)),
                    "share beyond the target",
                ),
            ],
        ),
        Panel(
            title="Predicted step time", unit="none",
            description="With scheduler.target_itl_ms: the time of a step over what was predicted for it. 1 is right.",
            queries=quantiles(families.STEP_TIME_RATIO, 0.1, 0.5, 0.9),
        ),
        Panel(
            title="Lengths", unit="tokens", description="Of prompts and answers.",
            queries=[
                Query(SCOPE.quantile(0.5, families.REQUEST_PROMPT_TOKENS), "prompt p50"),
                Query(SCOPE.quantile(0.99, families.REQUEST_PROMPT_TOKENS), "prompt p99"),
                Query(SCOPE.quantile(0.5, families.REQUEST_GENERATION_TOKENS), "answer p50"),
                Query(SCOPE.quantile(0.99, families.REQUEST_GENERATION_TOKENS), "answer p99"),
            ],
        ),
        Panel(
            title="What is asked for, mean", unit="none",
            description="Output tokens allowed per choice (max_tokens), and choices per prompt (n).",
            queries=[
                Query(SCOPE.mean(families.REQUEST_MAX_TOKENS), "max_tokens"),
                Query(SCOPE.mean(families.REQUEST_CHOICES), "n"),
            ],
        ),
    ],
)  # fmt: skip

MEMORY = Row(
    "KV memory and prefixes",
    panels=[
        Panel(
            title="KV blocks", unit="none", is_stacked=True,
            description="Owned by sequences; cached: free, with a prefix that may be reused; free.",
            queries=[Query(SCOPE.gauge(families.KV_BLOCKS, by=("state",)), "{{state}}")],
        ),
        Panel(
            title="Prefix hit ratio", unit="percentunit",
            description="Share of the looked-up prompt tokens that were cached, and of all prompt tokens of requests "
            "that ended. Low with long common prompts: they do not begin alike, or go to replicas in turn.",
            queries=[
                Query(ratio(SCOPE.rate(families.PREFIX_HITS), SCOPE.rate(families.PREFIX_QUERIES)), "of looked up"),
                Query(ratio(SCOPE.rate(families.CACHED_PROMPT_TOKENS), SCOPE.rate(families.PROMPT_TOKENS)), "of all"),
            ],
        ),
        Panel(
            title="Prefix lookups", unit="tokens/s",
            description="Prompt tokens looked up in the prefix cache, and found.",
            queries=[
                Query(SCOPE.rate(families.PREFIX_QUERIES), "looked up"),
                Query(SCOPE.rate(families.PREFIX_HITS), "found"),
            ],
        ),
        Panel(
            title="Preemptions", unit="short",
            description="Sequences per second that lost their blocks to others and were recomputed: the KV cache is "
            "too small for this traffic.",
            queries=[Query(SCOPE.rate(families.PREEMPTIONS), "preemptions")],
        ),
        Panel(
            title="Waiting for memory or a seat", unit="none",
            description="Sequences in the queue, by what they wait for.",
            queries=[Query(SCOPE.gauge(families.WAITING_BY_REASON, by=("reason",)), "{{reason}}")],
        ),
        Panel(
            title="How the caches were made", kind="bargauge", unit="none",
            description="Replicas by the size and type of their cache: those that differ here hold less or more.",
            queries=[
                Query(
                    SCOPE.gauge(families.KV_CONFIG, by=("dtype", "num_tokens"), aggregate="count"),
                    "{{num_tokens}} tokens of {{dtype}}",
                )
            ],
        ),
    ],
)  # fmt: skip

SPECULATION = Row(
    "Speculation",
    panels=[
        Panel(
            title="Acceptance rate", unit="percentunit",
            description="Share of the verified drafts that were right.",
            queries=[
                Query(
                    ratio(
                        SCOPE.rate(families.ACCEPTED_DRAFT_TOKENS, by=("proposer",)),
                        SCOPE.rate(families.DRAFT_TOKENS, by=("proposer",)),
                    ),
                    "{{proposer}}",
                )
            ],
        ),
        Panel(
            title="Acceptance by position", unit="percentunit",
            description="How often the draft at each depth was right, of all times that a sequence had drafts. 0 is "
            "the first.",
            queries=[
                Query(
                    ratio(
                        SCOPE.rate(families.ACCEPTED_DRAFT_TOKENS, by=("proposer", "position")),
                        SCOPE.rate(families.DRAFTS, by=("proposer",)),
                        on="proposer",
                    ),
                    "position {{position}}",
                )
            ],
        ),
        Panel(
            title="Tokens per verified draft run", unit="none",
            description="What a sequence with drafts gets from a step: 1 is none of them. Drafts cost rows of the "
            "step.",
            queries=[
                Query(
                    "1 + "
                    + ratio(
                        SCOPE.rate(families.ACCEPTED_DRAFT_TOKENS, by=("proposer",)),
                        SCOPE.rate(families.DRAFTS, by=("proposer",)),
                    ),
                    "{{proposer}}",
                )
            ],
        ),
        Panel(
            title="Drafts", unit="tokens/s", description="Verified, and accepted.",
            queries=[
                Query(SCOPE.rate(families.DRAFT_TOKENS, by=("proposer",)), "{{proposer}}: verified"),
                Query(SCOPE.rate(families.ACCEPTED_DRAFT_TOKENS, by=("proposer",)), "{{proposer}}: accepted"),
            ],
        ),
        Panel(
            title="What came of drafting", unit="short", is_stacked=True,
            description="Steps per second by what the proposer made for the next one: drafted; no_guess; unlikely (no "
            "draft was worth its row); too_slow (drafting costs more than it gains); failed.",
            queries=[Query(SCOPE.rate(families.DRAFTED_STEPS, by=("outcome",)), "{{outcome}}")],
        ),
    ],
)  # fmt: skip

STRUCTURE = Row(
    "Structured output",
    panels=[
        Panel(
            title="Grammars", unit="reqps", is_stacked=True,
            description="Requests per second whose answers must follow a grammar, by what came of it: compiled; cached "
            "(known from another request); refused (400). Many compiled ones: clients send another each time.",
            queries=[Query(SCOPE.rate(families.GRAMMARS, by=("outcome",)), "{{outcome}}")],
        ),
        Panel(
            title="Compiling a grammar", unit="s",
            description="Time that a request with a new grammar waits before it is queued. Schemas that take long are "
            "large, or have bounds such as maxLength: 10000.",
            queries=quantiles(families.GRAMMAR_SECONDS, 0.5, 0.99),
        ),
    ],
)  # fmt: skip

ROOFLINE = Row(
    "Roofline",
    panels=[
        Panel(
            title="Of what the machine can do", unit="percentunit",
            description="Least time that the ceilings allow for the forward pass, by the time that it took, over its "
            "last seconds. Low with small batches is normal; low with large ones is a slow kernel or a busy machine.",
            queries=[Query(SCOPE.gauge(families.ROOFLINE, by=("instance",), aggregate="max"), "{{instance}}")],
        ),
        Panel(
            title="Reads", unit="Bps",
            description="Of weights and KV cache in the forward pass, and the fastest seen here.",
            queries=[
                Query(SCOPE.gauge(families.ACHIEVED_BYTES, by=("instance",), aggregate="max"), "{{instance}}"),
                Query(SCOPE.gauge(families.CEILING_BYTES, by=("instance",), aggregate="max"), "{{instance}}: ceiling"),
            ],
        ),
        Panel(
            title="Arithmetic", unit="FLOP/s", description="In the forward pass, and the fastest seen here.",
            queries=[
                Query(SCOPE.gauge(families.ACHIEVED_FLOPS, by=("instance",), aggregate="max"), "{{instance}}"),
                Query(SCOPE.gauge(families.CEILING_FLOPS, by=("instance",), aggregate="max"), "{{instance}}: ceiling"),
            ],
        ),
        Panel(
            title="Reads, idle time included", unit="Bps",
            description="What the steps had to read, by the clock on the wall.",
            queries=[Query(SCOPE.rate(families.MODEL_BYTES, by=("instance",)), "{{instance}}")],
        ),
        Panel(
            title="Arithmetic, idle time included", unit="FLOP/s",
            description="What the steps had to compute, by the clock on the wall.",
            queries=[Query(SCOPE.rate(families.MODEL_FLOPS, by=("instance",)), "{{instance}}")],
        ),
    ],
)  # fmt: skip

BY_REPLICA = ("instance",)
REPLICAS = Row(
    "Replicas",
    panels=[
        Panel(
            title="Ready", unit="none",
            description="1 while a replica takes requests, and while its engine has a model.",
            queries=[
                Query(SCOPE.gauge(families.READY, by=BY_REPLICA, aggregate="max"), "{{instance}}"),
                Query(SCOPE.gauge(families.ENGINE_READY, by=BY_REPLICA, aggregate="max"), "{{instance}}: engine"),
            ],
        ),
        Panel(
            title="Requests", unit="reqps",
            description="That arrive. Replicas that get unequal shares are balanced badly.",
            queries=[Query(SCOPE.rate(families.REQUESTS_RECEIVED, by=BY_REPLICA), "{{instance}}")],
        ),
        Panel(
            title="Output", unit="tokens/s", description="Tokens handed to requests.",
            queries=[Query(SCOPE.rate(families.GENERATION_TOKENS, by=BY_REPLICA), "{{instance}}")],
        ),
        Panel(
            title="Time to first token, p99", unit="s",
            description="A replica that stands out waits, or is a slow machine.",
            queries=[Query(SCOPE.quantile(0.99, families.TIME_TO_FIRST_TOKEN, by=BY_REPLICA), "{{instance}}")],
        ),
        Panel(
            title="Running and waiting", unit="none", description="Sequences, by replica.",
            queries=[
                Query(SCOPE.gauge(families.REQUESTS_RUNNING, by=BY_REPLICA), "{{instance}}: running"),
                Query(SCOPE.gauge(families.REQUESTS_WAITING, by=BY_REPLICA), "{{instance}}: waiting"),
            ],
        ),
        Panel(
            title="KV cache", unit="percentunit", thresholds=(0.8, 0.95), description="Owned share of the blocks.",
            queries=[Query(SCOPE.gauge(families.KV_USAGE, by=BY_REPLICA, aggregate="max"), "{{instance}}")],
        ),
        Panel(
            title="Engine deaths and restarts", unit="none",
            description="In each interval; replayed: requests that a new engine went on with. The log has the reason.",
            queries=[
                Query(SCOPE.increase(families.ENGINE_DEATHS, by=BY_REPLICA), "{{instance}}: deaths"),
                Query(SCOPE.increase(families.ENGINE_RESTARTS, by=BY_REPLICA), "{{instance}}: restarts"),
                Query(SCOPE.increase(families.REPLAYED_REQUESTS, by=BY_REPLICA), "{{instance}}: replayed"),
            ],
        ),
        Panel(
            title="Degraded", unit="none",
            description="1 while steps do without something that has failed, until it is tried again.",
            queries=[
                Query(
                    SCOPE.gauge(families.ENGINE_DEGRADED, by=("instance", "mode"), aggregate="max"),
                    "{{instance}}: {{mode}}",
                )
            ],
        ),
        Panel(
            title="Latest start", kind="bargauge", unit="s",
            description="Seconds of each phase of the engine's latest start.",
            queries=[Query(SCOPE.gauge(families.STARTUP_SECONDS, by=("phase",), aggregate="max"), "{{phase}}")],
        ),
        Panel(
            title="What runs", kind="bargauge", unit="none",
            description="Replicas by version and fingerprint. Two fingerprints: equal seeds give different answers.",
            queries=[
                Query(
                    SCOPE.gauge(families.BUILD_INFO, by=("version", "fingerprint"), aggregate="count"),
                    "{{version}} {{fingerprint}}",
                )
            ],
        ),
        Panel(
            title="Memory of the server process", unit="bytes",
            description="Resident; the engine's process is another one.",
            queries=[Query(f"process_resident_memory_bytes{{{PROCESS}}}", "{{instance}}")],
        ),
        Panel(
            title="Tasks of the server process", unit="none",
            description="One for each request, and a few more. A level that rises while the load does not is a leak.",
            queries=[Query(SCOPE.gauge(families.SERVER_TASKS, by=("instance",)), "{{instance}}")],
        ),
        Panel(
            title="Processor time of the server process", unit="none",
            description="Cores in use for HTTP and text. At 1 it is the bottleneck.",
            queries=[Query(f"rate(process_cpu_seconds_total{{{PROCESS}}}[$__rate_interval])", "{{instance}}")],
        ),
    ],
)  # fmt: skip

ROWS = (OVERVIEW, LATENCY, MEMORY, SPECULATION, STRUCTURE, ROOFLINE, batches_row(SCOPE), REPLICAS)
