"""Every setting of the server beside the engine's. One schema: YAML keys, `--set` and the flags all come from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from engine.config import Count, EngineConfig, Section

MAX_SETTINGS = 40  # a test holds the schema to it


class ServerConfig(Section):
    host: str = Field(
        "127.0.0.1", description="address to listen on; 0.0.0.0 is every one", json_schema_extra={"flag": "--host"}
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8000, description="0 takes a free one", json_schema_extra={"flag": "--port"}
    )
    api_keys: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="keys that may be sent as `Authorization: Bearer KEY`; empty: no key is needed. "
        "Better set by the environment variable PEREGRINE_API_KEY (several with commas)",
        json_schema_extra={"flag": "--api-key"},
    )
    served_model_name: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="names under which clients ask for the model, the first is shown; empty: the model's own",
        json_schema_extra={"flag": "--served-model-name"},
    )
    shutdown_timeout: Annotated[float, Field(ge=0, le=86400)] = Field(
        30.0, description="seconds that running requests get to finish at SIGTERM", json_schema_extra={"flag": "--shutdown-timeout"}
    )
    strict: bool = Field(False, description="refuse unknown fields in requests, instead of naming them in a header")


class LimitsConfig(Section):
    max_queued_requests: Count = Field(1024, description="sequences that may wait for the engine; one more is 429")
    max_queued_tokens: Count = Field(1_048_576, description="prompt tokens that may wait for the engine; one more is 429")
    max_body_bytes: Count = Field(16 * 1024 * 1024, description="size of a request body; one more is 413")
    max_n: Annotated[int, Field(ge=1, le=128)] = Field(8, description="choices per prompt")
    max_prompts: Count = Field(64, description="prompts in one request")
    max_stop_strings: Annotated[int, Field(ge=0, le=16)] = Field(4, description="stop strings in one request")
    max_logit_bias: Annotated[int, Field(ge=0)] = Field(1024, description="entries of logit_bias")
    max_logprobs: Annotated[int, Field(ge=0, le=1000)] = Field(20, description="most likely tokens shown per position")
    request_timeout: Annotated[float, Field(gt=0, le=86400)] | None = Field(
        None, description="seconds that a request may take if it names no deadline; null: no deadline"
    )


class MetricsConfig(Section):
    vllm_names: bool = Field(False, description="also under the names that vLLM's dashboards and autoscalers read")
    public: bool = Field(False, description="GET /metrics needs no API key")


class Config(EngineConfig):
    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    metrics: MetricsConfig = MetricsConfig()

    def engine_config(self) -> EngineConfig:
        """The engine's part: all that crosses to its process; API keys do not."""
        return EngineConfig.model_validate({name: getattr(self, name) for name in EngineConfig.model_fields})

    def model_names(self) -> list[str]:
        """Names that clients may use. A local path shows as its last part: where it lies is nobody's business."""
        if self.server.served_model_name:
            return list(self.server.served_model_name)
        path = Path(self.model.path)
        if not path.exists():
            return [self.model.path]
        return [path.resolve().stem if path.suffix == ".gguf" else path.resolve().name]
