"""The config of a common family without transformers' class for it: importing one takes seconds, reading JSON does not.

A class adds defaults for what config.json leaves out, and rules of its family. Only a file that leaves nothing out and
in which no rule applies is read here; all others, and whatever looks odd, are left to transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

from engine.models.checkpoint_config import BareConfig

Fields = dict[str, object]

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_FAMILY_FIELDS = {  # by model_type: what else its class would fill in
    "llama": (),
    "mistral": ("sliding_window",),
    "qwen2": ("use_sliding_window",),
    "qwen3": ("use_sliding_window", "head_dim"),
}
_ROPE_TYPES = ("default", "llama3")


def read_plain_config(directory: Path) -> BareConfig | None:
    """The config in `directory`, or None where transformers must read it. Never raises for a file's content."""
    try:
        fields: object = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or not _is_plain(fields):
        return None
    rope = _rope_parameters(fields)
    if rope is None:
        return None
    if str(fields["model_type"]).startswith("qwen"):
        fields["sliding_window"] = None  # the class drops a window that `use_sliding_window` turns off
    left_out = ("rope_theta", "rope_scaling", "layer_types", "_name_or_path", "quantization_config")
    kept = {name: value for name, value in fields.items() if name not in left_out}
    return BareConfig(**kept | {"rope_parameters": rope, "name_or_path": str(directory)})


def _is_plain(fields: Fields) -> bool:
    family, kinds = str(fields.get("model_type")), fields.get("layer_types", ["full_attention"])
    if family not in _FAMILY_FIELDS or any(name not in fields for name in _FAMILY_FIELDS[family]):
        return False
    if fields.get("use_sliding_window", False) is not False or (family == "llama" and "sliding_window" in fields):
        return False
    if kinds is not None and not (isinstance(kinds, list) and kinds and all(k == "full_attention" for k in kinds)):
        return False
    if fields.get("auto_map"):
        return False
    return (
        all(type(fields.get(name)) is int for name in _COUNTS)
        and type(fields.get("head_dim", 1)) is int
        and type(fields.get("tie_word_embeddings")) is bool
        and type(fields.get("rms_norm_eps")) is float
        and fields.get("hidden_act") == "silu"
    )


def _rope_parameters(fields: Fields) -> Fields | None:
    """One set of parameters, as transformers 5 writes it or as earlier releases did; None where it is another kind."""
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(given, dict):
        return None
    rope: Fields = {"rope_type": "default", "rope_theta": fields.get("rope_theta")} | given
    is_known = rope["rope_type"] in _ROPE_TYPES and "type" not in rope and not rope.get("partial_rotary_factor")
    return rope if is_known and isinstance(rope.get("rope_theta"), int | float) else None
