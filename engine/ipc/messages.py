"""The messages between the server process and the engine process: typed MessagePack, never pickle."""

from __future__ import annotations

import msgspec

from engine.types import Pooling, Request, StepOutput, StepStats


class Setting(msgspec.Struct, frozen=True):
    """A resolved setting and where its value came from ("config", "model", "measured", "default")."""

    value: str | int | float | bool | None
    source: str
    reason: str = ""


class TokenizerAssets(msgspec.Struct, frozen=True, kw_only=True):
    """All that the server needs to turn text into ids and back, without transformers' model code."""

    tokenizer_json: str  # the tokenizers library's serialisation
    chat_template: str | None
    special_tokens: dict[str, str]  # "bos_token", "eos_token", ... as chat templates name them
    add_bos_token: bool = False  # plain prompts start with BOS (only where tokenizer_json does not do it itself)


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine loaded."""

    path: str
    architecture: str
    num_parameters: int
    vocab_size: int
    hidden_size: int = 0  # of the vectors of a request with `pooling`
    trained_context: int  # tokens
    max_model_len: int  # tokens, as served
    num_kv_tokens: int  # tokens that fit into the KV cache
    num_kv_blocks: int = 0  # of all groups of layers together
    num_drafts: int = 0  # that a step verifies of a request, at most
    eos_token_ids: list[int]
    pooling: Pooling = "last"  # of embeddings, where a request does not say
    generation_defaults: dict[str, float]  # temperature, top_p, top_k, ... where the model's files name them
    tokenizer: TokenizerAssets
    fingerprint: str  # changes exactly when something that may change numerics changes
    settings: dict[str, Setting]  # every "auto", resolved
    weights: dict[str, dict[str, int]] = {}  # by matrix, without the layer's number: format -> in how many layers
    phase_seconds: dict[str, float]  # how long each phase of the start took
    bytes_per_second: float  # measured ceiling of memory reads, 0 if not measured
    flops_per_second: float  # measured ceiling of matrix products, 0 if not measured


class Add(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """The engine process ends; requests that still run are forgotten."""


class Configure(msgspec.Struct, frozen=True, tag=True):
    """The first frame: the engine's config as JSON."""

    config_json: str


class Phase(msgspec.Struct, frozen=True, tag=True):
    """Start-up entered a phase ("import", "weights", "kv_cache", ...)."""

    name: str
    detail: str = ""


class Ready(msgspec.Struct, frozen=True, tag=True):
    model: ModelInfo


class Step(msgspec.Struct, frozen=True, tag=True):
    """The outputs of one step, for all of its requests."""

    outputs: list[StepOutput]
    started: list[str]  # requests that ran for the first time in this step: they left the queue
    stats: StepStats | None
    num_received: int = (
        0  # frames received before the step: an Add with a higher number is of a later request of the id
    )


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """A sign of life, once a second, from a thread of its own, with the age of the current step."""

    step_seconds: float  # 0 while idle
    step_limit: float = 0.0  # seconds after which the engine holds this step to be hung; 0: unknown


EXIT_CODES = {"internal": 1, "config": 2, "memory": 3, "model": 4, "crash_loop": 5}
"""Exit code of the engine process, and of the server that gives up because of it, by `Failed.kind`."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start or go on; the process exits after it."""

    kind: str  # a key of EXIT_CODES
    message: str


ToEngine = Configure | Add | Abort | Shutdown
FromEngine = Phase | Ready | Step | Heartbeat | Failed
