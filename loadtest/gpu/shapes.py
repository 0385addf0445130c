"""The models whose shapes are measured on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from loadtest.micro.shapes import QWEN_600M, Shape

LLAMA_8B = Shape(
    "Llama-3.1-8B", "LlamaForCausalLM", hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, vocab_size=128256, ties_output=False, rope_theta=500000.0,
)  # fmt: skip
TINY = Shape(
    "tiny", "LlamaForCausalLM", hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, vocab_size=300, ties_output=False, rope_theta=10000.0,
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What end-to-end measurements are made of: lengths in tokens."""

    shapes: list[Shape]
    batches: list[int]
    contexts: list[int]
    num_outputs: int

    @property
    def max_length(self) -> int:
        return max(self.contexts) + 3 * self.num_outputs


def load_of(*, is_rehearsal: bool) -> Load:
    if is_rehearsal:
        return Load([TINY], batches=[2], contexts=[24], num_outputs=6)
    return Load([LLAMA_8B, QWEN_600M], batches=[1, 8, 32, 128], contexts=[1024, 4096], num_outputs=64)
