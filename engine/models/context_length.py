"""How long a context a model was made for, and how far the scaling of its rotations stretches that."""

from __future__ import annotations

from typing import cast

from engine.models.checkpoint_config import CheckpointConfig
from engine.models.rope import rope_parameters

_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
_MOST = 1 << 31  # tokens
_OVERRIDABLE = ("linear", "dynamic")


def read_trained_context(config: CheckpointConfig) -> int:
    """Longest context the model was made for, in tokens: max_position_embeddings, or what stands for it.

    With yarn, the length that its rotations were stretched to (YaRN, section 3.1): the original one times the factor,
    which a config names beside a `max_position_embeddings` that some makers multiply and others do not.
    """
    stretched = [
        int(_number(rope, "original_max_position_embeddings") * _number(rope, "factor"))
        for rope in rope_parameters(config).values()
        if rope.get("rope_type") == "yarn"
    ]
    if stretched and min(stretched) >= 1:
        return min(*stretched, _MOST)
    return _read_positions(config)


def read_longest_context(config: CheckpointConfig) -> int:
    """The longest context that may be asked for, in tokens; most models have none beyond the trained one.

    The factor of linear and dynamic scaling is in `max_position_embeddings` of some files and not of others, and
    nothing tells which: up to both together, the user decides.
    """
    trained = read_trained_context(config)
    factors = [
        _number(rope, "factor")
        for rope in rope_parameters(config).values()
        if rope.get("rope_type") in _OVERRIDABLE and _number(rope, "factor") > 1
    ]
    return min(int(trained * max(factors, default=1)), _MOST)


def length_where_rope_changes(config: CheckpointConfig) -> int | None:
    """The context length beyond which transformers computes other rotations for the whole batch, or None."""
    lengths = []
    for rope in rope_parameters(config).values():
        if "dynamic" in str(rope.get("rope_type")):
            lengths.append(_read_positions(config))
        elif rope.get("rope_type") == "longrope":
            lengths.append(int(cast(int, rope["original_max_position_embeddings"])))
    return min(lengths, default=None)


def _read_positions(config: CheckpointConfig) -> int:
    for field in _FIELDS:
        length = getattr(config, field, None)
        if isinstance(length, int) and length > 0:
            return length
    raise ValueError(f"{config.model_type}'s config names no longest context; set model.max_model_len")


def _number(rope: dict[str, object], name: str) -> float:
    """0 where it is not there: what then is meant, only the family's code knows."""
    value = rope.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
