"""Which class runs which model."""

from __future__ import annotations

from typing import Literal, Protocol, cast

import torch

from engine.lazy_import import load_object
from engine.models.architecture import UnsupportedArchitectureError, check_is_causal_lm
from engine.models.checkpoint_config import BareConfig, CheckpointConfig
from engine.models.model import Model
from engine.quantization.linear import LinearMethods

MODELS = {  # config.model_type -> "module:Class"
    "llama": "engine.models.llama:Llama",  # SmolLM2 too
    "mistral": "engine.models.llama:Llama",
    "smollm3": "engine.models.llama:Llama",
    "qwen2": "engine.models.variants:Qwen2",
    "qwen3": "engine.models.variants:Qwen3",
    "phi3": "engine.models.variants:Phi3",
    "mixtral": "engine.models.moe:SparseLlama",
    "qwen2_moe": "engine.models.moe:SparseLlama",
    "qwen3_moe": "engine.models.moe:Qwen3Moe",
    "olmoe": "engine.models.moe:Olmoe",
}
FALLBACK = "engine.models.transformers_fallback:TransformersModel"


class ModelClass(Protocol):
    def from_config(
        self, config: CheckpointConfig, *, dtype: torch.dtype, max_model_len: int | None, methods: LinearMethods
    ) -> Model: ...


def build_model(
    config: CheckpointConfig,
    *,
    dtype: torch.dtype,
    implementation: Literal["auto", "own", "transformers"] = "auto",
    max_model_len: int | None = None,
    methods: LinearMethods | None = None,
) -> Model:
    """A model with memory for its weights, and nothing in it yet, on torch's current default device.

    Matrices are kept as `methods` say, from the moment when they are loaded (None: as plain floats).
    Build it under `torch.device("meta")` to learn its sizes for free, under `torch.device("cuda")` to fill it there.
    `max_model_len` is the longest context that will be served (None: as trained); some rotations depend on it.
    Raises ValueError for what cannot be run, with the reason.
    """
    check_is_causal_lm(config)
    methods = methods or LinearMethods()
    if implementation == "transformers":
        return _fallback(config, dtype=dtype, max_model_len=max_model_len, methods=methods)
    try:
        return _own_class(config).from_config(config, dtype=dtype, max_model_len=max_model_len, methods=methods)
    except UnsupportedArchitectureError as error:
        if implementation == "own":
            raise ValueError(f"{error}; set model.implementation to auto or transformers") from error
        return _fallback(config, dtype=dtype, max_model_len=max_model_len, methods=methods)


def _fallback(
    config: CheckpointConfig, *, dtype: torch.dtype, max_model_len: int | None, methods: LinearMethods
) -> Model:
    from transformers.initialization import no_init_weights  # seconds: it imports what only the fallback needs

    if isinstance(config, BareConfig):
        config = config.of_family()
    with no_init_weights():
        model_class = cast(ModelClass, load_object(FALLBACK))
        return model_class.from_config(config, dtype=dtype, max_model_len=max_model_len, methods=methods)


def _own_class(config: CheckpointConfig) -> ModelClass:
    if config.model_type not in MODELS:
        raise UnsupportedArchitectureError(f"{config.model_type} has no layers of our own; {', '.join(MODELS)} have")
    return cast(ModelClass, load_object(MODELS[config.model_type]))
