"""The language model inside of a multimodal checkpoint: its config, and its weights by the names it has alone.

Text runs through it as through a model of its own, in the families that are named here: images and sounds only replace
rows of the embedding, positions in three dimensions are equal where there is text alone. Elsewhere more than that
happens (prompts that look ahead, layers that attend to the image), so other families are refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator

from torch import Tensor

from engine.models.checkpoint_config import BareConfig, CheckpointConfig
from engine.quantization.stored_levels import StoredLevels

FAMILIES = (  # config.model_type
    "gemma3",
    "gemma4",
    "gemma4_unified",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
)
_PLAIN_FAMILY = {  # of text parts that have a name of their own for the three dimensions of their positions
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
_OF_IMAGES = ("mrope_section", "mrope_interleaved")  # of the rotation: which dimension a position is taken from
_STACKED_EXPERTS = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
_HIDDEN_DIM = {"gate_up_proj": 2, "down_proj": 1}  # where a matrix [experts, outputs, inputs] has the hidden size
_PREFIXES = (  # of the text part's names, from the longest; what releases of transformers have called the same place
    (r"model\.language_model\.model\.", "model."),
    (r"(?:model\.)?language_model\.lm_head\.", "lm_head."),
    (r"language_model\.model\.", "model."),
    (r"model\.(?:language_model|text_model)\.", "model."),
    (r"(?:model\.(?:embed_tokens|layers|norm)|lm_head)\.", None),
)


def is_multimodal(config: CheckpointConfig) -> bool:
    is_other_kind = isinstance(config, BareConfig) or config.is_encoder_decoder
    return not is_other_kind and config.get_text_config() is not config


def text_config(config: CheckpointConfig) -> CheckpointConfig:
    """The config of the language model in `config`; the same config where it is one. ValueError for other families."""
    if not is_multimodal(config):
        return config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{config.model_type} is a model for more than text, and its text alone cannot be served; of that kind, "
            f"{', '.join(FAMILIES)} can"
        )
    text = copy.deepcopy(config.get_text_config())
    if plain := _PLAIN_FAMILY.get(text.model_type):
        text = _of_plain_family(text, plain)
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    text.architectures = config.architectures
    for field in ("eos_token_id", "bos_token_id"):
        if getattr(text, field, None) is None and getattr(config, field, None) is not None:
            setattr(text, field, getattr(config, field))
    return text


def _of_plain_family(text: CheckpointConfig, family: str) -> CheckpointConfig:
    fields = {name: value for name, value in vars(text).items() if not name.startswith("_") and name != "model_type"}
    rope: dict[str, object] = fields.get("rope_parameters") or {}
    fields["rope_parameters"] = {name: value for name, value in rope.items() if name not in _OF_IMAGES}
    if family == "qwen3_moe":
        fields["norm_topk_prob"] = True  # the multimodal model always does, and has no field for it
    return BareConfig(**fields, model_type=family).of_family()


def text_weights(
    weights: Iterable[tuple[str, Tensor | StoredLevels]], *, hidden_size: int
) -> Iterator[tuple[str, Tensor | StoredLevels]]:
    """The weights of the language model, under the names and in the shapes that it has as a checkpoint of its own."""
    for name, weight in weights:
        text_name = name_in_text_part(name)
        if text_name is None:
            continue
        stacked = _STACKED_EXPERTS.search(name)
        if (
            stacked
            and isinstance(weight, Tensor)
            and weight.dim() == 3
            and weight.shape[_HIDDEN_DIM[stacked[1]]] != hidden_size
        ):
            weight = weight.transpose(1, 2)  # Qwen3-VL's experts are kept as [experts, inputs, outputs]
        yield text_name, weight


def name_in_text_part(name: str) -> str | None:
    """None for a weight of the other parts."""
    for pattern, replacement in _PREFIXES:
        if match := re.match(pattern, name):
            return name if replacement is None else replacement + name[match.end() :]
    return None
