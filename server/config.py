"""The schema of the server's settings, beside the engine's: YAML keys, `--set` and the flags all come from it."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from engine.config import Count, CountOrAuto, EngineConfig, Flag, Section

MAX_DEFAULT_SETTINGS = 40  # in configs/default.yaml, which a test holds to it; operators have sections of their own


def _as_list(value: JsonValue) -> JsonValue:
    return [value] if isinstance(value, str | int) else value


def _check_network(value: str) -> str:
    """Raises ValueError for what is neither an address nor a network."""
    if value != "*":
        ipaddress.ip_network(value)  # raises, and says what is wrong
    return value


Texts = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)]
Origin = Annotated[str, Field(pattern=r"^(\*|null|[a-z][a-z0-9+.-]*://[^/\s]+)$")]
Origins = Annotated[list[Origin], BeforeValidator(_as_list)]
Network = Annotated[str, AfterValidator(_check_network)]
Seconds = Annotated[float, Field(ge=0, le=86400)]
Timeout = Annotated[float, Field(gt=0, le=86400)]


class ServerConfig(Section):
    host: Annotated[str, Flag("--host")] = Field(
        default="127.0.0.1", description="address to listen on; 0.0.0.0 is every one"
    )
    port: Annotated[int, Field(ge=0, le=65535), Flag("--port")] = Field(default=8000, description="0 takes a free one")
    api_keys: Annotated[Texts, Flag("--api-key")] = Field(
        default=[],
        description="keys that clients may send as Authorization: Bearer KEY; empty: none is needed. Safer in the "
        "environment variable PEREGRINE_API_KEY (several with commas)",
    )
    operator_keys: Texts = Field(
        default=[],
        description="keys that also open what belongs to all clients (the trace, explanations of any request); with "
        "any key, all but the probes needs one. Safer in the environment variable PEREGRINE_OPERATOR_KEY",
    )
    served_model_name: Annotated[Texts, Flag("--served-model-name")] = Field(
        default=[], description="names by which clients ask for the model, the first is shown; empty: its own"
    )
    shutdown_timeout: Annotated[Seconds, Flag("--shutdown-timeout")] = Field(
        default=30.0, description="seconds that running requests get to finish at SIGTERM, after drain_delay"
    )
    drain_delay: Annotated[Seconds, Flag("--drain-delay")] = Field(
        default=0.0,
        description="seconds at SIGTERM in which /readyz says 503 and requests are still served: more than a load "
        "balancer's checks need to notice",
    )
    cors_origins: Annotated[Origins, Flag("--allowed-origins")] = Field(
        default=[],
        description='web pages whose scripts may call the server, as "https://chat.example"; "*": any; empty: none',
    )
    strict: bool = Field(default=False, description="refuse unknown fields in requests, instead of naming them")


class LimitsConfig(Section):
    """What one client may ask for."""

    for_operators: ClassVar[bool] = True

    max_queued_requests: Count = Field(
        default=1024, description="choices that may wait for the engine; beyond: 429, and 400 for one request of more"
    )
    max_queued_tokens: Count = Field(
        default=1048576, description="prompt tokens that may wait; beyond: 429, and 400 for one request of more"
    )
    max_queue_seconds: Annotated[float, Field(ge=0.01, le=86400)] | None = Field(
        default=None,
        description="seconds that a request may have to wait, by how fast the queue drains; beyond: 429; null: any",
    )
    max_body_bytes: Count = Field(default=16777216, description="size of a request body; beyond: 413")
    priority: bool = Field(default=False, description="requests may ask for a priority; else other than 0 is a 400")
    max_body_fields: Count = Field(default=32768, description="JSON fields, lists and objects of a body; beyond: 400")
    max_body_values: Count = Field(default=262144, description="JSON values of a body, token ids included; beyond: 400")
    max_template_seconds: Annotated[float, Field(ge=0.01, le=600)] = Field(
        default=2.0, description="processor time that a chat template may take for a conversation; beyond: 400"
    )
    max_template_characters: Count = Field(
        default=16777216, description="text that a chat template may make of a conversation; beyond: 400"
    )
    max_grammar_bytes: Count = Field(
        default=1048576, description="size of a JSON Schema or another grammar that an answer shall follow; beyond: 400"
    )
    max_grammar_seconds: Annotated[float, Field(ge=0.01, le=600)] = Field(
        default=2.0, description="processor time that compiling a grammar may take; beyond: 400"
    )
    max_tools: Annotated[int, Field(ge=1, le=1024)] = Field(default=128, description="tools of a chat; beyond: 400")
    max_tool_bytes: Count = Field(
        default=262144, description="names, descriptions and schemas of a chat's tools together; beyond: 400"
    )
    max_tokenize_bytes: Count = Field(default=1048576, description="text that POST /tokenize takes; beyond: 400")
    max_stored_responses: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="answers of /v1/responses that are kept in memory, to be asked for and followed by their id, the "
        "newest of all clients; 0: none",
    )
    max_stored_bytes: Count = Field(
        default=67108864, description="size of all of them together, with the conversations that they end"
    )
    max_n: Annotated[int, Field(ge=1, le=128)] = Field(default=128, description="choices per prompt")
    max_prompts: Count = Field(default=64, description="prompts in one request")
    max_embedding_inputs: Count = Field(
        default=1024,
        description="texts in one request for embeddings, scores or a ranking; all of them wait in the queue at once",
    )
    max_stop_strings: Annotated[int, Field(ge=0, le=16)] = Field(default=16, description="stop strings in one request")
    max_logit_bias: Annotated[int, Field(ge=0)] = Field(default=1024, description="entries of logit_bias")
    max_logprobs: Annotated[int, Field(ge=0, le=1000)] = Field(default=20, description="likeliest tokens per position")
    request_timeout: Annotated[float, Field(gt=0, le=86400)] | None = Field(
        default=None, description="seconds that a request may take if it names no deadline; null: as long as it takes"
    )


class OperationConfig(Section):
    """What all clients together may take of the server before it knows who they are."""

    for_operators: ClassVar[bool] = True

    max_connections: Count = Field(
        default=2048, description="open connections; beyond, the one that has idled longest is closed, or if none: 503"
    )
    max_head_bytes: Annotated[int, Field(ge=1024, le=2**24)] = Field(
        default=65536,
        description="request line and headers, and likewise what surrounds the chunks of a body; beyond: 431",
    )
    max_total_head_bytes: Count = Field(
        default=16777216,
        description="unfinished heads of all connections together; beyond, the oldest of them is closed with 408",
    )
    max_total_body_bytes: Count = Field(
        default=33554432,
        description="bodies being read, all connections together; beyond: 503. One alone may always have "
        "limits.max_body_bytes",
    )
    template_memory_bytes: Annotated[int, Field(ge=2**20)] = Field(
        default=536870912, description="memory that a chat template may take while it is rendered"
    )
    grammar_memory_bytes: Annotated[int, Field(ge=2**20)] = Field(
        default=536870912, description="memory that compiling a grammar may take"
    )
    head_timeout: Timeout = Field(
        default=30.0,
        description="seconds from the opening of a connection, or the first byte of a further request, "
        "to the end of the request's headers; beyond: 408",
    )
    body_timeout: Timeout = Field(default=60.0, description="seconds that a body may take to come; beyond: 408")
    send_timeout: Timeout = Field(
        default=300.0, description="seconds that a client may take nothing of its answer before it is left"
    )
    keep_alive_timeout: Timeout = Field(
        default=75.0,
        description="seconds that a connection may idle between requests; longer than clients and load balancers "
        "keep theirs, so that they close them first",
    )


class AccessConfig(Section):
    """How clients come to the server: by which path and through whom, and what is written down of them."""

    for_operators: ClassVar[bool] = True

    log: Annotated[bool, Flag("--access-log")] = Field(default=True, description="a line in the log for each request")
    trusted_proxies: Annotated[list[Network], BeforeValidator(_as_list)] = Field(
        default=[],
        description="addresses and networks of load balancers, whose X-Forwarded-For and X-Forwarded-Proto are "
        'believed; "*": anybody\'s',
    )
    root_path: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._~-]+)*$"), Flag("--root-path")] = Field(
        default="", description='where a load balancer has put the server, as "/llm"; paths without it are taken too'
    )
    key_file: Annotated[str | None, Flag("--api-key-file")] = Field(
        default=None,
        description="file with a line NAME KEY for each API key, beside server.api_keys, and behind the key if wanted "
        "weight=2 (of a share of a busy server) and tokens_per_minute=60000; keys of one name share their cached "
        "prefixes. Read again when it changes, and at SIGHUP",
    )


class TracingConfig(Section):
    """Spans for a collector (OpenTelemetry). A caller's trace is in the log and the answer with and without."""

    for_operators: ClassVar[bool] = True

    endpoint: Annotated[str, Field(pattern=r"^https?://[^/\s]+(/\S*)?$")] | None = Field(
        default=None,
        description="where OTLP over HTTP is taken, as http://collector:4318; needs pip install 'peregrine[tracing]'",
    )
    ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0, description="share of the requests with a span, of those whose caller has not decided it"
    )


class MetricsConfig(Section):
    vllm_names: bool = Field(default=False, description="also under the names that vLLM's dashboards read")
    public: bool = Field(default=False, description="GET /metrics needs no API key")


class BatchesConfig(Section):
    """Files of requests that are answered when nothing else is to do: /v1/files and /v1/batches."""

    for_operators: ClassVar[bool] = True

    folder: Annotated[str | None, Flag("--batch-folder")] = Field(
        default=None,
        description="where files and batches are kept, by one server at a time; null: there are no /v1/files and "
        "/v1/batches",
    )
    max_file_bytes: Count = Field(default=209715200, description="size of an uploaded file; beyond: 413")
    max_files: Count = Field(
        default=1000,
        description="files of one API key, answers included; beyond: 400. Also its batches; the oldest go",
    )
    max_key_bytes: Count = Field(
        default=5368709120, description="bytes of the files of one API key, answers included; beyond, uploads: 400"
    )
    max_total_bytes: Count = Field(
        default=21474836480, description="bytes of all files, answers included; beyond, uploads: 507"
    )
    max_lines: Count = Field(default=50000, description="requests in a batch; one with more fails")
    max_unfinished: Count = Field(default=32, description="unfinished batches of one API key; beyond: 429")
    keep_days: Annotated[float, Field(gt=0, le=3650)] = Field(
        default=30.0, description="days that files and finished batches are kept, where an upload names no time"
    )
    concurrency: CountOrAuto = Field(
        default="auto", description="lines in work at once, of all batches; auto: twice scheduler.max_num_seqs"
    )
    priority: Annotated[int, Field(ge=1, le=10000)] = Field(
        default=100,
        description="steps that lines stand behind other requests while these wait; 30 s of waiting make up for one",
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.05, description="share of seats and memory that batches keep beside other requests, of 1 for those"
    )


class Config(EngineConfig):
    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    operation: OperationConfig = OperationConfig()
    access: AccessConfig = AccessConfig()
    tracing: TracingConfig = TracingConfig()
    metrics: MetricsConfig = MetricsConfig()
    batches: BatchesConfig = BatchesConfig()

    def engine_config(self) -> EngineConfig:
        """The engine's part: all that crosses to its process; API keys do not."""
        return EngineConfig.model_validate({name: getattr(self, name) for name in EngineConfig.model_fields})

    @property
    def needs_key(self) -> bool:
        return bool(self.server.api_keys or self.server.operator_keys or self.access.key_file)

    def model_names(self) -> list[str]:
        """Names that clients may use. A local path shows as its last part: where it lies is nobody's business."""
        if self.server.served_model_name:
            return list(self.server.served_model_name)
        path = Path(self.model.path)
        if not path.exists():
            return [self.model.path]
        return [path.resolve().stem if path.suffix == ".gguf" else path.resolve().name]
