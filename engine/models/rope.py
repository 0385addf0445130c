"""Rotary position frequencies of every scaling that transformers knows, and the angles of a step's rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.models.checkpoint_config import BareConfig, CheckpointConfig
from kernels.reference.rope import rope_factors

_FIRST_POSITIONS = 1024  # of a new `RotationTable`


@dataclass(frozen=True, slots=True)
class Rope:
    """One rotation: pair i of the first `2 * len(inverse_frequencies)` dimensions turns by position * frequency i."""

    inverse_frequencies: tuple[float, ...]  # radians per token
    scale: float = 1.0  # of cosine and sine (YaRN section 3.4, LongRoPE section 3.3)


def rope_parameters(config: CheckpointConfig) -> dict[str | None, dict[str, object]]:
    """`config.rope_parameters` by layer type; a single set of parameters stands under None."""
    parameters: dict[str, object] = getattr(config, "rope_parameters", None) or {}
    nested: dict[str | None, dict[str, object]] = {k: v for k, v in parameters.items() if isinstance(v, dict)}
    if nested or not parameters:
        return nested
    return {None: parameters}


def default_rope(theta: float, rotary_dim: int) -> Rope:
    """The unscaled frequencies theta^(-2i / rotary_dim) (Su et al., 2021, section 3.2.2), in float32."""
    frequencies = 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim)
    return Rope(tuple(frequencies.tolist()))


def scaled_rope(config: CheckpointConfig, rope_type: str, *, layer_type: str | None, max_model_len: int) -> Rope:
    """The frequencies of a scaling (linear, dynamic, yarn, longrope, llama3, ...) for contexts of `max_model_len`.

    Scalings that depend on the length of the text (dynamic, longrope) are held at the longest one served: were they to
    follow each text, its cached keys would change their meaning as it grows.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # a second, which most models do not need

    if isinstance(config, BareConfig):
        config = config.for_transformers()
    if rope_type not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"rope_type {rope_type!r} is unknown; known are default, {', '.join(ROPE_INIT_FUNCTIONS)}")
    init = ROPE_INIT_FUNCTIONS[rope_type]
    with torch.device("cpu"):  # a model may be built on the meta device, where there are no values
        frequencies, scale = init(config, torch.device("cpu"), seq_len=max_model_len, layer_type=layer_type)
    return Rope(tuple(frequencies.float().tolist()), float(scale))


class RotaryEmbedding(nn.Module):
    """The factors that `apply_rope` takes for each row of a step.

    They are computed once per step and shared by all layers.
    """

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.scale = rope.scale
        frequencies = torch.tensor(rope.inverse_frequencies, dtype=torch.float32)
        self.inverse_frequencies: Tensor
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: [num_tokens]. The angles are float32 whatever `dtype` the factors have."""
        angles = positions[:, None] * self.inverse_frequencies
        cos, sin = rope_factors(angles, dtype, scale=self.scale)
        return cos, sin


class RotationTable:
    """The float32 factors of a rotation for every position up to the last that a text has reached, and a quarter more.

    A CPU reads a row of it for next to nothing, while each of the small operations that make a row costs some 30
    microseconds in a step that has just streamed all weights through the caches.
    """

    def __init__(self, rope: RotaryEmbedding) -> None:
        self._rope = rope
        self.cos = self.sin = torch.empty(0, 0)

    def reach(self, num_positions: int) -> None:
        """Makes the rows of positions 0 to num_positions - 1. `cos` and `sin` may be other tensors afterwards."""
        known = self.cos.shape[0]
        if num_positions <= known:
            return
        positions = torch.arange(known, max(num_positions, known + known // 4, _FIRST_POSITIONS))
        cos, sin = self._rope(positions, torch.float32)
        if known:
            cos, sin = torch.cat((self.cos, cos)), torch.cat((self.sin, sin))
        self.cos, self.sin = cos, sin
