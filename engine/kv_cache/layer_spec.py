"""What one attention layer keeps in the KV cache, and how it attends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What an attention layer asks of its back end."""

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None  # a query sees itself and the `window - 1` tokens before it
    soft_cap: float | None = None  # scores become soft_cap * tanh(score / soft_cap)
