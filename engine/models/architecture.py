"""Reads a transformers config into the facts our own models are built from. Nothing else reads its fields.

transformers' configs have no common schema: the same fact has a field in one family, is implied by the family's name
in another, and moved between releases. What is read here is explicit from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch

from engine.kv_cache.layer_spec import AttentionLayer, group_layers
from engine.models.checkpoint_config import CheckpointConfig
from engine.models.context_length import read_trained_context
from engine.models.rope import Rope, default_rope, rope_parameters, scaled_rope


class UnsupportedArchitectureError(ValueError):
    """Our own layers cannot run this config; the text says which of its fields is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The experts that a layer has instead of one MLP."""

    num_experts: int
    top_k: int  # experts of each token
    intermediate_size: int  # of one expert
    normalises: bool  # scales the shares of a token's experts to sum to one
    shared_size: int  # of the expert that every token goes through besides, with a gate of its own; 0: there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A pre-norm decoder with rotary positions, grouped-query attention and SwiGLU, down to the last bias."""

    dtype: torch.dtype
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    attention_layers: tuple[AttentionLayer, ...]
    ropes: tuple[Rope, ...]
    rope_of_layer: tuple[int | None, ...]  # index into `ropes`; None: the layer has no positions (NoPE)
    norm_eps: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    qk_norm: Literal["head", "projection"] | None = None  # RMSNorm of q and k before the rotation, over what
    mixtures: tuple[Mixture | None, ...] = ()  # by layer; None: one MLP. Empty: nowhere
    has_merged_weights: bool = False  # the checkpoint holds qkv_proj and gate_up_proj


def read_architecture(config: CheckpointConfig, *, dtype: torch.dtype, max_model_len: int | None) -> Architecture:
    """The facts of a Llama-like config, served with contexts of `max_model_len` tokens (None: as trained).

    What a family has by its name alone, and no field says, its variant adds. Raises UnsupportedArchitectureError where
    the config asks for what our own layers do not do.
    """
    activation = _text(config, "hidden_act")
    if activation not in ("silu", "swish"):
        raise UnsupportedArchitectureError(f"hidden_act is {activation!r}; our own layers have silu")
    layers = _attention_layers(config)
    ropes, rope_of_layer = _ropes(config, layers[0].head_dim, max_model_len or read_trained_context(config))
    attention_bias = _flag(config, "attention_bias")
    return Architecture(
        dtype=dtype,
        vocab_size=_number(config, "vocab_size"),
        hidden_size=_number(config, "hidden_size"),
        intermediate_size=_number(config, "intermediate_size"),
        attention_layers=layers,
        ropes=ropes,
        rope_of_layer=rope_of_layer,
        norm_eps=float(getattr(config, "rms_norm_eps", 1e-6)),
        qkv_bias=attention_bias or _flag(config, "qkv_bias"),
        output_bias=attention_bias,
        mlp_bias=_flag(config, "mlp_bias"),
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        mixtures=_mixtures(config),
    )


def check_is_causal_lm(config: CheckpointConfig) -> None:
    """Raises ValueError for checkpoints that are no plain next-token model."""
    names = config.architectures or []
    if names and not any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names):
        raise ValueError(f"{names[0]} does not generate text; use a checkpoint whose architecture ends in ForCausalLM")
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder-decoder; only decoders are supported")


def check_attention_layers(config: CheckpointConfig, layers: list[AttentionLayer]) -> None:
    """Raises ValueError unless the layers that attend are all that the config has, each with its window.

    A layer of another kind, or one whose window is only in transformers' masks, would otherwise be silently wrong.
    """
    problem = f"{config.model_type} cannot run on a paged KV cache: "
    num_layers = _number(config, "num_hidden_layers")
    if len(layers) != num_layers:
        raise ValueError(f"{problem}{len(layers)} of its {num_layers} layers attend through transformers' interface")
    kinds: list[str] | None = getattr(config, "layer_types", None)
    _checked_windows([layer.window for layer in layers])
    has_window = [layer.window is not None for layer in layers]
    if kinds is None:
        is_windowed = bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
        expected = [is_windowed] * num_layers
    else:
        _check_kinds(kinds, problem)
        expected = [kind == "sliding_attention" for kind in kinds[:num_layers]]
    if has_window != expected:
        raise ValueError(f"{problem}it does not tell its attention which layers have a sliding window")


def _check_kinds(kinds: list[str], problem: str) -> None:
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedArchitectureError(f"{problem}its layers have {', '.join(sorted(unknown))}")


def _attention_layers(config: CheckpointConfig) -> tuple[AttentionLayer, ...]:
    num_heads = _number(config, "num_attention_heads")
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    head_dim = int(getattr(config, "head_dim", None) or _number(config, "hidden_size") // num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}")
    layers = [
        AttentionLayer(i, num_heads, num_kv_heads, head_dim, scale=head_dim**-0.5, window=window)
        for i, window in enumerate(_windows(config))
    ]
    return tuple(group_layers(layers))


def _windows(config: CheckpointConfig) -> list[int | None]:
    """Each layer's sliding window. Without `layer_types`, a window is every layer's (Mistral, Phi-3)."""
    num_layers = _number(config, "num_hidden_layers")
    window: int | None = getattr(config, "sliding_window", None)
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds is None:
        return _checked_windows([window] * num_layers)
    _check_kinds(kinds, "our own layers attend to all tokens or to a window, but ")
    return _checked_windows([window if kind == "sliding_attention" else None for kind in kinds[:num_layers]])


def _checked_windows(windows: list[int | None]) -> list[int | None]:
    odd = [window for window in windows if window is not None and window < 1]
    if odd:
        raise ValueError(f"sliding_window is {odd[0]}, but a layer with a window of that size attends to nothing")
    return windows


def _mixtures(config: CheckpointConfig) -> tuple[Mixture | None, ...]:
    """Each layer's experts; empty for the families that have none."""
    if getattr(config, "num_experts_per_tok", None) is None:
        return ()
    if getattr(config, "clip_qkv", None) is not None:
        raise UnsupportedArchitectureError("our own layers do not clip queries, keys and values (clip_qkv)")
    num_experts, top_k = _number(config, "num_experts"), _number(config, "num_experts_per_tok")
    if top_k > num_experts:
        raise ValueError(f"num_experts_per_tok is {top_k}, but there are {num_experts} experts")
    has_own_size = getattr(config, "moe_intermediate_size", None) is not None
    mixture = Mixture(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=_number(config, "moe_intermediate_size" if has_own_size else "intermediate_size"),
        normalises=bool(getattr(config, "norm_topk_prob", True)),  # Mixtral always does
        shared_size=int(getattr(config, "shared_expert_intermediate_size", None) or 0),
    )
    dense: list[int] = getattr(config, "mlp_only_layers", None) or []
    step = int(getattr(config, "decoder_sparse_step", 1))
    layers = range(_number(config, "num_hidden_layers"))
    return tuple(mixture if i not in dense and (i + 1) % step == 0 else None for i in layers)


def _ropes(
    config: CheckpointConfig, head_dim: int, max_model_len: int
) -> tuple[tuple[Rope, ...], tuple[int | None, ...]]:
    """The distinct rotations, and which one each layer has."""
    parameters = rope_parameters(config)
    ropes = tuple(
        _read_rope(config, values, head_dim, layer_type=layer_type, max_model_len=max_model_len)
        for layer_type, values in parameters.items()
    )
    num_layers = _number(config, "num_hidden_layers")
    has_rope: list[int] = getattr(config, "no_rope_layers", None) or [1] * num_layers  # SmolLM3: 1 means rotated
    index = {layer_type: i for i, layer_type in enumerate(parameters)}
    kinds: list[str | None] = getattr(config, "layer_types", None) or [None] * num_layers
    shared = index.get(None)
    of_layer = tuple(
        (index[kind] if shared is None else shared) if rotated else None
        for kind, rotated in zip(kinds[:num_layers], has_rope, strict=False)
    )
    return ropes, of_layer


def _read_rope(
    config: CheckpointConfig,
    parameters: dict[str, object],
    head_dim: int,
    *,
    layer_type: str | None,
    max_model_len: int,
) -> Rope:
    rope_type = str(parameters.get("rope_type", "default"))
    if rope_type != "default":
        return scaled_rope(config, rope_type, layer_type=layer_type, max_model_len=max_model_len)
    fraction = float(cast(float, parameters.get("partial_rotary_factor") or 1.0))
    return default_rope(float(cast(float, parameters["rope_theta"])), int(head_dim * fraction))


def _number(config: CheckpointConfig, field: str) -> int:
    value = getattr(config, field, None)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{config.model_type}'s config has {field} = {value!r}; it must be a positive number")
    return value


def _flag(config: CheckpointConfig, field: str) -> bool:
    return bool(getattr(config, field, False))


def _text(config: CheckpointConfig, field: str) -> str:
    return str(getattr(config, field, ""))
