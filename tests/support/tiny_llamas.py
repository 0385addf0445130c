"""What tests of whole engines share: small models of random weights, without a sliding window, with one, with both.

Heads have 16 dimensions, the fewest that Triton multiplies.
"""

from __future__ import annotations

import random

import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from engine.engine import Engine
from engine.models.model import Model
from engine.models.registry import build_model
from engine.scheduling.step_stats import ModelCost
from engine.types import Request, SamplingParams

VOCAB_SIZE = 40
_SIZES = {
    "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 128,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "full": LlamaConfig(**_SIZES),
    "window": MistralConfig(**_SIZES, sliding_window=10, head_dim=16),
    "mixed": Qwen2Config(
        **_SIZES | {"num_hidden_layers": 3},
        head_dim=16,
        use_sliding_window=True,
        sliding_window=10,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
COST = ModelCost(weight_bytes=1, flops_per_token=1, kv_bytes_per_token=1, attention_flops_per_pair=1)


def make_model(name: str) -> Model:
    """One of `CONFIGS`, in float32, always with the same weights."""
    model = build_model(CONFIGS[name], dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def answer_three(engine: Engine) -> dict[str, list[int]]:
    """The tokens of three requests, by their ids: a short prompt that is answered at random, a long one, another."""
    rng = random.Random(1)
    for i, length in enumerate((3, 30, 9)):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(length)]
        params = SamplingParams(seed=i, max_tokens=5 + 2 * i, temperature=0.8 if i == 0 else 0.0)
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    outputs: dict[str, list[int]] = {"0": [], "1": [], "2": []}
    while engine.has_work:
        for output in engine.step()[0]:
            assert output.error is None
            outputs[output.request_id] += output.token_ids
    assert [len(tokens) for tokens in outputs.values()] == [5, 7, 9]
    return outputs
