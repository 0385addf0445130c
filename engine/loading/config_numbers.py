"""Bounds for the numbers of a config.json, checked before anything is built from them.

A million layers would be built for minutes, and a negative size fails in the middle of some layer. The bounds are far
beyond every model that there is; what passes them and is still wrong does not fit the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from engine.loading.json_file import JsonObject
from engine.models.model_error import ModelError

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")  # of multimodal checkpoints
_MOST = (  # of whole numbers, by what the name of a field says; the first that matches
    (re.compile(r"layers$|n_layer$"), 1_000),
    (re.compile(r"experts?(_per_tok)?$|heads$|n_head$|groups?$|top_?k$"), 8_192),
    (re.compile(r"head_dim|rank$|kernel_size$"), 65_536),
    (re.compile(r"positions?$|position_embeddings$|ctx$|length$|seq_len$|window$"), 1 << 31),
    (re.compile(r"size$|dim$|inner$|embd$|d_model$|d_ff$|vocab_size"), 1 << 24),
)
_AT_LEAST_ONE = re.compile(
    r"vocab_size|hidden_size|intermediate_size|num_hidden_layers|num_attention_heads|num_key_value_heads|head_dim"
    r"|max_position_embeddings|n_layer|n_head|n_embd|n_positions|num_experts|num_local_experts"
    r"|num_experts_per_tok|moe_intermediate_size"
)
_EPSILON = re.compile(r"eps(ilon)?$")
_MOST_OF_ROPE = {"rope_theta": 1e15, "factor": 1e6, "partial_rotary_factor": 1.0}
_ROPE_LENGTH = "original_max_position_embeddings"


def check_numbers(fields: JsonObject, place: str) -> None:
    """ModelError that names the first number out of bounds. fields: of config.json; place: how to call the file"""
    for where, name, value in _numbers(fields):
        problem = _problem(name, value)
        if problem:
            raise ModelError(f"{place} is damaged: {where}{name} is {_brief(value)}, but {problem}; download it again")
    for where, rope in _ropes(fields):
        for name, content in rope.items():
            problem = _rope_problem(name, content)
            if problem:
                what = f"{where}.{name} is {_brief(content)}"
                raise ModelError(f"{place} is damaged: {what}, but {problem}; download it again")


def _numbers(fields: JsonObject) -> Iterator[tuple[str, str, int | float]]:
    """(a prefix for people, field, number) of the model, and of the language model in a multimodal one."""
    parts: list[tuple[str, JsonObject]] = [("", fields)]
    for name in _TEXT_CONFIGS:
        part = fields.get(name)
        if isinstance(part, dict):
            parts.append((f"{name}.", part))
    for where, part in parts:
        for name, value in part.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield where, name, value


def _problem(name: str, value: float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "it must be a number"
    if _EPSILON.search(name):
        return "" if 0 <= value <= 1 else "it must be between 0 and 1"
    if name in _MOST_OF_ROPE:
        return _rope_problem(name, value)
    for pattern, most in _MOST:
        if pattern.search(name):
            least = 1 if _AT_LEAST_ONE.fullmatch(name) else 0
            if not least <= value <= most:
                return f"it must be between {least} and {most:,}"
            return "" if isinstance(value, int) or not _AT_LEAST_ONE.fullmatch(name) else "it must be a whole number"
    return ""


def _ropes(fields: JsonObject) -> Iterator[tuple[str, JsonObject]]:
    """The rotations' parameters, also those by kind of layer."""
    for part in (fields, *(fields.get(name) for name in _TEXT_CONFIGS)):
        for name in ("rope_parameters", "rope_scaling"):
            rope = part.get(name) if isinstance(part, dict) else None
            if isinstance(rope, dict):
                yield name, rope
                yield from ((f"{name}.{kind}", inner) for kind, inner in rope.items() if isinstance(inner, dict))


def _rope_problem(name: str, value: object) -> str:
    numbers = value if isinstance(value, list) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if isinstance(number, float) and not math.isfinite(number):
            return "it must be a number"
        if name in _MOST_OF_ROPE and not 0 < number <= _MOST_OF_ROPE[name]:
            return f"it must be above 0 and at most {_MOST_OF_ROPE[name]:,.0f}"
        if name == _ROPE_LENGTH and not 1 <= number <= 1 << 31:
            return f"it must be between 1 and {1 << 31:,}"
        if name.endswith("_factor") and not abs(number) <= 1e6:
            return "it must be at most 1,000,000"
        if isinstance(value, list) and number < 0:
            return "none of its numbers may be negative"
    return ""


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
