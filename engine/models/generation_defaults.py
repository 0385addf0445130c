"""Which tokens end an answer, and how the model's makers sample from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from engine.messages import TokenizerAssets
from engine.models.checkpoint_config import CheckpointConfig

if TYPE_CHECKING:
    from transformers import GenerationConfig

_END_OF_TEXT = ("<|endoftext|>",)
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def find_eos_token_ids(
    config: CheckpointConfig, generation: GenerationConfig | None, tokenizer: TokenizerAssets
) -> list[int]:
    """Ids of the generation config, the config and the tokenizer, and of the turn's end in the chat template."""
    backend = Tokenizer.from_str(tokenizer.tokenizer_json)
    found = set(_ids(getattr(config, "eos_token_id", None)))
    if generation is not None:
        found.update(_ids(generation.eos_token_id))
    special = {str(token) for token in backend.get_added_tokens_decoder().values() if token.special}
    names = [tokenizer.special_tokens["eos_token"]] if "eos_token" in tokenizer.special_tokens else []
    names += [name for name in _END_OF_TEXT if name in special]
    names += [name for name in _END_OF_TURN if name in special and name in (tokenizer.chat_template or "")]
    found.update(token_id for name in names if (token_id := backend.token_to_id(name)) is not None)
    return sorted(found)


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def read_generation_defaults(generation: GenerationConfig | None) -> dict[str, float]:
    """Sampling values that the model's files name. None for a model whose makers decode greedily."""
    if generation is None or not generation.do_sample:
        return {}
    values = {name: getattr(generation, name, None) for name in _DEFAULTS}
    return {name: float(value) for name, value in values.items() if value is not None}
