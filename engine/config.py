"""Every setting of the engine, validated once. Frozen; unknown keys fail; "auto" is resolved in `engine.build`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_MODEL = "smollm2-135m-instruct"  # a name of its own: the GGUF file that comes as a wheel


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


Count = Annotated[int, Field(ge=1)]


class ModelConfig(Section):
    path: str = Field(DEFAULT_MODEL, description="directory, hub id, .gguf file, or the default model's name")
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = Field("auto", description="dummy: random weights")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: the device's fastest")
    max_model_len: Count | Literal["auto"] = Field("auto", description="longest prompt + output, tokens")
    quantization: str = Field("none", description="weight format computed at load time; `peregrine doctor` lists them")
    implementation: Literal["auto", "own", "transformers"] = Field("auto", description="whose layers to run")
    tokenizer: str | None = Field(None, description="directory or hub id of another tokenizer")
    chat_template: str | None = Field(None, description="file with a Jinja chat template that replaces the model's")


class DeviceConfig(Section):
    name: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    kernels: Literal["auto", "torch", "triton"] = Field("auto", description="auto: Triton on a GPU, torch elsewhere")
    num_threads: Count | Literal["auto"] = Field("auto", description="CPU threads of the engine process")


class SchedulerConfig(Section):
    max_num_seqs: Count | Literal["auto"] = Field("auto", description="requests that run at once")
    max_num_batched_tokens: Count | Literal["auto"] = Field("auto", description="token budget of one step")


class KVCacheConfig(Section):
    memory: Literal["auto"] | str = Field("auto", description='"0.9" of the device, "2GiB", or "100000tokens"')
    block_size: Annotated[int, Field(ge=1, le=256)] = Field(16, description="tokens per block")
    dtype: Literal["auto"] | str = Field("auto", description="auto: the model's dtype")
    prefix_caching: bool = Field(True, description="reuse the KV cache of equal prefixes")


class SpeculationConfig(Section):
    method: str = Field("none", description='"none" or "ngram"')
    num_drafts: Annotated[int, Field(ge=1, le=64)] = Field(4, description="drafted tokens per step")
    ngram_max: Annotated[int, Field(ge=1, le=16)] = Field(4, description="longest n-gram to look up")
    ngram_min: Annotated[int, Field(ge=1, le=16)] = Field(2, description="shortest n-gram to look up")


class EngineConfig(Section):
    model: ModelConfig = ModelConfig()
    device: DeviceConfig = DeviceConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    kv_cache: KVCacheConfig = KVCacheConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    seed: int = Field(0, description="seed of dummy weights and of requests without a seed in deterministic runs")
