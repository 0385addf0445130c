"""Which tokens end an answer, and how the model's makers sample from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from engine.ipc.messages import TokenizerAssets
from engine.models.checkpoint_config import CheckpointConfig
from engine.models.model_error import ModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig

_END_OF_TEXT = ("<|endoftext|>",)
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")
_DEFAULTS = {  # the least and the most that the sampler takes
    "temperature": (0.0, 100.0),
    "top_p": (1e-9, 1.0),
    "top_k": (-1.0, 2.0**31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
}


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


def _ids(value: object) -> list[int]:
    """Of a field that is one id, several, or nothing; what else it holds is no id of a token."""
    return [token_id for token_id in (value if isinstance(value, list) else [value]) if type(token_id) is int]


def read_generation_defaults(generation: GenerationConfig | None, place: str) -> dict[str, float]:
    """Sampling values that the model's files name. None for a model whose makers decode greedily.

    ModelError for values that nothing can be sampled with: every request that names none would fail. place: the file
    """
    if generation is None or not generation.do_sample:
        return {}
    values = {name: getattr(generation, name, None) for name in _DEFAULTS}
    for name, value in values.items():
        least, most = _DEFAULTS[name]
        if value is not None and not (isinstance(value, int | float) and least <= value <= most):
            raise ModelError(f"{place} has {name} = {value!r}, but it must be between {least:g} and {most:g}; mend it")
    return {name: float(value) for name, value in values.items() if value is not None}
