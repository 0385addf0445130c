"""Shapes of published models, and what one step of them must at least read and compute."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """A dense decoder. Sizes as Hugging Face's configs name them."""

    name: str
    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    ties_output: bool
    rope_theta: float

    @property
    def num_linear_parameters(self) -> int:
        """Parameters of all matrices that a token is multiplied by, without the output layer's."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return self.num_layers * self.hidden_size * (heads + 3 * self.intermediate_size)

    @property
    def num_output_parameters(self) -> int:
        return self.hidden_size * self.vocab_size

    def kv_bytes(self, num_tokens: int, *, value_size: int = 2) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * value_size * num_tokens

    def decode_bytes(self, batch: int, context: int) -> int:
        """Bytes that a decoding step reads, in bfloat16: each weight once, each sequence's keys and values once."""
        return 2 * (self.num_linear_parameters + self.num_output_parameters) + self.kv_bytes(batch * context)

    def decode_flops(self, batch: int, context: int) -> int:
        return batch * (2 * (self.num_linear_parameters + self.num_output_parameters) + self._pair_flops * context)

    def prefill_flops(self, length: int) -> int:
        """Operations for one prompt: a token sees half of it on average, and only the last one has logits."""
        attention = self._pair_flops * length * (length + 1) // 2
        return 2 * self.num_linear_parameters * length + 2 * self.num_output_parameters + attention

    @property
    def _pair_flops(self) -> int:
        """Operations per pair of a token and one that it sees: products with its key and its value, in all layers."""
        return 4 * self.num_layers * self.num_heads * self.head_dim

    def config(self, *, max_length: int) -> dict[str, object]:
        """The fields of its config.json."""
        return {
            "architectures": [self.architecture],
            "model_type": self.architecture.removesuffix("ForCausalLM").lower(),
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.ties_output,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "max_position_embeddings": max_length,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    @contextmanager
    def folder(self, *, max_length: int) -> Iterator[Path]:
        """With a config.json, which is all that a model with random weights needs."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(self.config(max_length=max_length), indent=1) + "\n")
            yield Path(folder)


LLAMA_1B = Shape(
    "Llama-3.2-1B", "LlamaForCausalLM", hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32,
    num_kv_heads=8, head_dim=64, vocab_size=128256, ties_output=True, rope_theta=500000.0,
)  # fmt: skip
QWEN_600M = Shape(
    "Qwen3-0.6B", "Qwen3ForCausalLM", hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16,
    num_kv_heads=8, head_dim=128, vocab_size=151936, ties_output=True, rope_theta=1000000.0,
)  # fmt: skip
QWEN_1700M = Shape(
    "Qwen3-1.7B", "Qwen3ForCausalLM", hidden_size=2048, intermediate_size=6144, num_layers=28, num_heads=16,
    num_kv_heads=8, head_dim=128, vocab_size=151936, ties_output=True, rope_theta=1000000.0,
)  # fmt: skip
