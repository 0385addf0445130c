"""What is wanted of a GPU, as fractions of the floor, and which timings show it: the rows of the README's table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """timing: the name that its section gives it; fraction: of the floor; peer: whom it has to be as fast as"""

    title: str
    timing: str
    fraction: float
    peer: str | None = None


GOALS = [
    Goal("decode attention, 32 x 4,096 tokens", "decode attention, 32 x 4096", 0.90, "FlashAttention-3"),
    Goal("decode attention, 128 x 1,024 tokens", "decode attention, 128 x 1024", 0.90, "FlashAttention-3"),
    Goal("prefill attention, 4,096 tokens", "prefill attention, 1 x 4096", 0.75, "FlashAttention-3"),
    *(
        Goal(
            f"{name}, decode, batch {batch}, context {length:,}",
            f"decode, {name}, {batch} x {length}",
            goal,
            "transformers",
        )
        for name in ("Llama-3.1-8B", "Qwen3-0.6B")
        for batch, goal in ((1, 0.85), (8, 0.85), (32, 0.80), (128, 0.80))
        for length in (1024, 4096)
    ),
    Goal("Llama-3.1-8B, prefill of 4,096 tokens", "prefill, Llama-3.1-8B, 1 x 4096", 0.80, "transformers"),
    Goal("Qwen3-0.6B, prefill of 4,096 tokens", "prefill, Qwen3-0.6B, 1 x 4096", 0.80, "transformers"),
]
