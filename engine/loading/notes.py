"""Lines for a start about what is served otherwise than the files of a model may seem to say."""

from __future__ import annotations

from collections.abc import Iterator

from engine.loading.checkpoint import Checkpoint
from engine.loading.model_facts import ModelFacts
from engine.models.model import is_kv_scale


def checkpoint_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """About its files, whatever it is served with."""
    return (
        *_adapter(checkpoint),
        *_unsaid_window(checkpoint),
        *_other_parts(checkpoint),
        *_activations_of_config(checkpoint),
        *_kv_scales(checkpoint),
    )


def length_notes(facts: ModelFacts, max_model_len: int) -> list[str]:
    """About contexts of up to `max_model_len` tokens."""
    limit = facts.rope_changes_at
    if limit is None or max_model_len <= limit:
        return []
    return [
        f"every text is rotated as one of {max_model_len} tokens, whatever its length (longrope's long factors, or "
        f"dynamic scaling at its end); where no text is longer than {limit}, set model.max_model_len to that"
    ]


def rounding_notes(activations: str) -> list[str]:
    """About `model.activations`."""
    if activations == "int16":
        return []
    return [
        "activations are rounded to 8 bits where they meet integer weights, which is lossy: perplexities rose by up to "
        "0.3% (docs/performance.md); model.activations int16 loses nothing that was measured"
    ]


def _adapter(checkpoint: Checkpoint) -> Iterator[str]:
    files = [] if checkpoint.source.kind == "gguf" else sorted(checkpoint.source.path.glob("adapter_model.*"))
    if files:
        yield f"{files[0].name} lies beside the weights and is ignored: merge it with peft's merge_and_unload to use it"


def _unsaid_window(checkpoint: Checkpoint) -> Iterator[str]:
    """Mistral's files are called Llama's in the format, which has no key for a Llama's window."""
    if checkpoint.source.kind != "gguf":
        return
    header = checkpoint.source.gguf_header
    names = [header.metadata.get(f"general.{key}") for key in ("name", "basename")] + [checkpoint.source.path.name]
    if header.architecture == "llama" and any("mistral" in str(name).lower() for name in names):
        yield (
            "a GGUF of this family cannot say whether its layers have a sliding window; every token attends to all "
            "before it (the first Mistral 7B has a window of 4,096: for longer texts, use its safetensors)"
        )


def _other_parts(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.is_part:
        yield f"of this {checkpoint.whole_config.model_type} model the language model is served: text only"


def _kv_scales(checkpoint: Checkpoint) -> Iterator[str]:
    if any(map(is_kv_scale, checkpoint.stored)):
        yield (
            "the checkpoint's scales of an 8-bit KV cache are not used: with kv_cache.dtype int8 or fp8 each token and "
            "head has a scale of its own, which rounds less; auto keeps floats"
        )


def _activations_of_config(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.quantized.rounds_activations:
        yield (
            "activations keep 16 bits or more where the checkpoint's config has 8 or fewer, which loses less; scales "
            "of activations are not read"
        )
