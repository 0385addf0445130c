"""Every setting of the engine, validated once. Frozen; unknown keys fail; "auto" is resolved in `engine.build`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

DEFAULT_MODEL = "smollm2-135m-instruct"  # a name of its own: the GGUF file that comes as a wheel


@dataclass(frozen=True, slots=True)
class Flag:
    """The command-line flag of a setting.

    With a key, the flag takes a JSON object, and the setting is its value under that key.
    """

    name: str
    key: str | None = None


class Section(BaseModel):
    """A group of settings. Those that only operators turn are kept out of configs/default.yaml, which stays short."""

    for_operators: ClassVar[bool] = False

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: object, info: ValidationInfo) -> object:
        """True is no number, though Python counts it as 1."""
        if isinstance(value, bool) and not _names(cls.model_fields[info.field_name or ""].annotation, bool):
            raise ValueError(f"{str(value).lower()} is neither a number nor a name; leave it out for the default")
        return value


def _names(annotation: object, kind: type) -> bool:
    """Whether a type is one of those that an annotation allows."""
    return annotation is kind or any(_names(part, kind) for part in get_args(annotation))


Activations = Literal["int16", "int8"]
Count = Annotated[int, Field(ge=1)]
CountOrAuto = Count | Literal["auto"]
NumDrafts = Annotated[int, Field(ge=1, le=64)]
NgramLength = Annotated[int, Field(ge=1, le=16)]


class ModelConfig(Section):
    path: str = Field(default=DEFAULT_MODEL, description="directory, hub id, .gguf file, or the default model's name")
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = Field(
        default="auto", description="dummy: random weights"
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Flag("--dtype")] = Field(
        default="auto", description="auto: the device's fastest"
    )
    max_model_len: Annotated[CountOrAuto, Flag("--max-model-len")] = Field(
        default="auto", description="longest prompt + output, tokens"
    )
    quantization: Annotated[str, Flag("--quantization")] = Field(
        default="auto",
        description="weight format computed at load time: none (exactly the model's weights), fp16 (within a "
        "thousandth of each weight), int8, int4; on GPUs fp8 (activations as well) and stored (what a checkpoint has "
        "quantised); auto: fp16 on a CPU that lacks faster, none elsewhere",
    )
    activations: Activations = Field(
        default="int16",
        description="bits of what meets integer weights in compiled CPU layers; int8 is lossy (perplexity +0.0 to "
        "+0.3%) and meant for AVX512-VNNI",
    )
    implementation: Literal["auto", "own", "transformers"] = Field(default="auto", description="whose layers to run")
    tokenizer: str | None = Field(default=None, description="directory or hub id of another tokenizer")
    chat_template: str | None = Field(
        default=None, description="file with a Jinja chat template that replaces the model's"
    )


class DeviceConfig(Section):
    name: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where the model runs")
    kernels: Literal["auto", "torch", "triton", "numba"] = Field(
        default="auto", description="auto: Triton on a GPU; Numba on a CPU, for models of Llama's kind; else torch"
    )
    num_threads: CountOrAuto = Field(default="auto", description="CPU threads of the engine process")
    cpu_features: Literal["auto", "avx2", "avx512", "avx512-vnni", "avx512-bf16"] = Field(
        default="auto", description="vector instructions of compiled CPU kernels, at most; auto: all that there are"
    )
    determinism: Literal["fast", "strict"] = Field(
        default="fast",
        description="strict: not even the last bits of log-probabilities depend on what else runs; slower",
    )

    @property
    def is_strict(self) -> bool:
        return self.determinism == "strict"


class SchedulerConfig(Section):
    max_num_seqs: Annotated[CountOrAuto, Flag("--max-num-seqs")] = Field(
        default="auto", description="requests that run at once"
    )
    max_num_batched_tokens: Annotated[CountOrAuto, Flag("--max-num-batched-tokens")] = Field(
        default="auto",
        description="token budget of one step; with compiled CPU kernels prompts get less beside decoding requests",
    )
    target_itl_ms: Annotated[float, Field(gt=0, le=60_000, allow_inf_nan=False)] | None = Field(
        default=None,
        description="milliseconds between tokens of a stream that prompts beside it may take at most: their chunks are "
        "cut to what a step of that time has room for; null: by the number of tokens alone",
    )


class KVCacheConfig(Section):
    memory: Annotated[Literal["auto"] | str, Flag("--gpu-memory-utilization")] = Field(
        default="auto", description='"0.9" of the device, "2GiB", or "100000tokens"'
    )
    block_size: Annotated[int, Field(ge=1, le=256)] = Field(default=16, description="tokens per block")
    dtype: Annotated[Literal["auto"] | str, Flag("--kv-cache-dtype")] = Field(
        default="auto",
        description="or int8, fp8 (GPU), float16; auto: the model's dtype, float16 with compiled CPU kernels",
    )
    prefix_caching: Annotated[bool, Flag("--enable-prefix-caching")] = Field(
        default=True, description="reuse the KV cache of equal prefixes"
    )


class SpeculationConfig(Section):
    method: Annotated[str, Flag("--speculative-config", "method")] = Field(
        default="none", description="who guesses the next tokens: none, ngram, suffix, medusa, eagle3, draft_model"
    )
    model: Annotated[str | None, Flag("--speculative-config", "model")] = Field(
        default=None,
        description="the draft model, the EAGLE head, or the Medusa heads where not those that come with a model",
    )
    depth: Annotated[NumDrafts | Literal["auto"], Flag("--speculative-config", "depth")] = Field(
        default="auto", description="drafts of a request that a step verifies; auto: as many as pay, or none"
    )
    num_drafts: Annotated[NumDrafts | Literal["auto"], Flag("--speculative-config", "num_speculative_tokens")] = Field(
        default="auto", description="at most, for which memory is planned"
    )
    ngram_max: Annotated[NgramLength, Flag("--speculative-config", "prompt_lookup_max")] = Field(
        default=4, description="longest n-gram to look up"
    )
    ngram_min: Annotated[NgramLength, Flag("--speculative-config", "prompt_lookup_min")] = Field(
        default=2, description="shortest n-gram to look up"
    )
    parallel_drafting: Annotated[bool | None, Flag("--speculative-config", "parallel_drafting")] = Field(
        default=None, description="whether all drafts are made in one pass; null: as the method, or the head, has it"
    )

    @model_validator(mode="after")
    def _check_passes(self) -> Self:
        """What an EAGLE head does, only its checkpoint says."""
        ways = {
            "medusa": (True, "makes all drafts in one pass"),
            "draft_model": (False, "makes each in a pass of its own"),
        }
        is_parallel, way = ways.get(self.method, (False, "makes drafts without a pass"))
        if self.method not in ("eagle", "eagle3") and self.parallel_drafting not in (None, is_parallel):
            given = str(self.parallel_drafting).lower()
            raise ValueError(f"parallel_drafting is {given}, but the method {self.method} {way}; leave it out")
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.ngram_min > self.ngram_max:
            raise ValueError(f"ngram_min ({self.ngram_min}) must not be above ngram_max ({self.ngram_max})")
        if self.depth != "auto" and self.num_drafts != "auto" and self.depth > self.num_drafts:
            raise ValueError(f"depth ({self.depth}) must not be above num_drafts ({self.num_drafts})")
        if self.model is not None and self.method in ("none", "ngram", "suffix"):
            raise ValueError(
                f"model is {self.model}, but method is {self.method}, which needs none: set method to draft_model, "
                "eagle3 or medusa, or leave model out"
            )
        return self


def _own_acceptance(value: object) -> object:
    """vLLM's names of the two ways."""
    return {"rejection_sampler": "exact", "typical_acceptance_sampler": "typical"}.get(str(value), value)


class LossySpeculationConfig(Section):
    """LOSSY: what speculation may change in answers. Off by default, so that drafts change the speed and nothing else.

    Typical acceptance (Medusa, arXiv 2401.10774, section 3.3.1) keeps drafts that are likely enough where a request is
    sampled. Answers are no samples of the model any more, and a seed no longer gives the same one.
    """

    for_operators: ClassVar[bool] = True

    acceptance: Annotated[
        Literal["exact", "typical"],
        BeforeValidator(_own_acceptance),
        Flag("--speculative-config", "acceptance_method"),
    ] = Field(
        default="exact", description="which drafts are kept: those that are sampled, or LOSSY: those that are likely"
    )
    posterior_threshold: Annotated[float, Field(gt=0, le=1), Flag("--speculative-config", "posterior_threshold")] = (
        Field(default=0.09, description="probability above which a draft is always kept: the paper's epsilon")
    )
    posterior_alpha: Annotated[float, Field(gt=0, le=10), Flag("--speculative-config", "posterior_alpha")] = Field(
        default=0.3, description="times exp(-entropy): probability above which it is kept where the model is unsure"
    )


class SupervisionConfig(Section):
    """When the engine process is replaced, and when the server gives up on it and ends with exit code 5.

    Deaths that are put down to one request, which ends in a quarantine, do not count, nor do kills of a process that
    has not computed anything yet.
    """

    for_operators: ClassVar[bool] = True

    max_deaths: Count = Field(
        default=3, description="deaths of the engine process within the window that end the server"
    )
    window: Annotated[float, Field(gt=0, le=86400)] = Field(
        default=300.0, description="seconds after which a death does not count any more"
    )
    step_timeout: Annotated[float, Field(ge=1, le=86400)] = Field(
        default=120.0,
        description="seconds without progress, while requests run, after which the engine process is replaced: of one "
        "step, or without any; more where such steps were measured to take long",
    )
    record_steps: Literal["off", "shapes", "contents"] = Field(
        default="off",
        description="keep the inputs of a step that fails or ends the process, for python -m engine.replay; "
        "contents: with the token ids of its requests",
    )


class LoggingConfig(Section):
    """What both processes write to standard error."""

    for_operators: ClassVar[bool] = True

    level: Annotated[Literal["debug", "info", "warning", "error"], Flag("--log-level")] = Field(
        default="info", description="the least important lines that are written; debug: probes of /readyz as well"
    )
    format: Annotated[Literal["text", "json"], Flag("--log-format")] = Field(
        default="text", description="json: one object per line, also for what is else printed at the start"
    )


class EngineConfig(Section):
    model: ModelConfig = ModelConfig()
    device: DeviceConfig = DeviceConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    kv_cache: KVCacheConfig = KVCacheConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    lossy_speculation: LossySpeculationConfig = LossySpeculationConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    logging: LoggingConfig = LoggingConfig()
    seed: Annotated[int, Flag("--seed")] = Field(
        default=0,
        description="of random weights (load_format: dummy) alone; a request names its own, or gets one by chance",
    )
