"""Tiny models of every architecture, and their logits: transformers' own, and ours in chunks of mixed batches."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
)

from engine.attention.torch_backend import TorchAttention
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.layer_spec import windows_of
from engine.kv_cache.storage import KVCache
from engine.models.model import Model
from engine.models.registry import build_model
from engine.types import Request, SamplingParams, Scheduled, Sequence
from tests.support.stepping import build_forward_batch

BLOCK_SIZE = 4
VOCAB_SIZE = 96
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
PHI3_HEAD = {"original_max_position_embeddings": 16, "tie_word_embeddings": False}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1],
    "long_factor": [1.5, 4.0],
    "partial_rotary_factor": 0.5,
}
PARTIAL = {"rope_type": "default", "rope_theta": 100.0}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}
OWN_EXPERTS = {**EXPERTS, "moe_intermediate_size": 24}
SHARED_EXPERT = {**OWN_EXPERTS, "shared_expert_intermediate_size": 40}
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 5,
    "head_dim": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 3.0,
    "pad_token_id": 0,
}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE}


@dataclass(frozen=True)
class Case:
    config: PreTrainedConfig
    lengths: tuple[int, ...] = (23, 9, 17)  # tokens of each sequence
    max_model_len: int | None = None


def sizes(**changes: object) -> dict[str, object]:
    return {**SIZES, **changes}


OWN = {
    "llama": Case(LlamaConfig(**sizes())),
    "llama with biases and tied embeddings": Case(
        LlamaConfig(**sizes(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=12))
    ),
    "llama 3 rope": Case(LlamaConfig(**sizes(rope_parameters=LLAMA3)), lengths=(40, 9)),
    "llama linear rope": Case(
        LlamaConfig(**sizes(rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}))
    ),
    "llama dynamic rope within the trained context": Case(LlamaConfig(**sizes(rope_parameters=DYNAMIC))),
    "llama dynamic rope beyond the trained context": Case(
        LlamaConfig(**sizes(rope_parameters=DYNAMIC, max_position_embeddings=16)),
        lengths=(24, 24),
        max_model_len=24,
    ),
    "mistral with a window smaller than the prompt": Case(MistralConfig(**sizes(sliding_window=5))),
    "qwen2": Case(Qwen2Config(**sizes())),
    "qwen2 with yarn": Case(Qwen2Config(**sizes(rope_parameters=YARN))),
    "qwen2 with some windowed layers": Case(
        Qwen2Config(**sizes(use_sliding_window=True, sliding_window=6, max_window_layers=1))
    ),
    "qwen3": Case(Qwen3Config(**sizes(head_dim=16, tie_word_embeddings=True))),
    "smollm3": Case(SmolLM3Config(**sizes(no_rope_layer_interval=2))),
    "smollm3 with windows": Case(
        SmolLM3Config(**sizes(no_rope_layer_interval=2, use_sliding_window=True, sliding_window=5))
    ),
    "phi3": Case(Phi3Config(**sizes(sliding_window=7, **PHI3_HEAD))),
    "phi3 longrope, short": Case(
        Phi3Config(**sizes(rope_parameters=dict(LONGROPE), **PHI3_HEAD)), lengths=(16, 9), max_model_len=16
    ),
    "phi3 longrope, long": Case(Phi3Config(**sizes(rope_parameters=dict(LONGROPE), **PHI3_HEAD)), lengths=(40, 17)),
    "mixtral": Case(MixtralConfig(**sizes(num_local_experts=4, num_experts_per_tok=2, sliding_window=6))),
    "qwen2-moe": Case(Qwen2MoeConfig(**sizes(**SHARED_EXPERT))),
    "qwen2-moe with windows, a layer without experts and no biases": Case(
        Qwen2MoeConfig(
            **sizes(
                **SHARED_EXPERT,
                norm_topk_prob=True,
                mlp_only_layers=[1],
                qkv_bias=False,
                use_sliding_window=True,
                sliding_window=6,
                max_window_layers=2,
            )
        )
    ),
    "qwen3-moe": Case(Qwen3MoeConfig(**sizes(**OWN_EXPERTS, head_dim=16, norm_topk_prob=True))),
    "qwen3-moe with experts in every other layer": Case(
        Qwen3MoeConfig(**sizes(**OWN_EXPERTS, head_dim=16, decoder_sparse_step=2))
    ),
    "olmoe": Case(OlmoeConfig(**sizes(**EXPERTS))),
}
FALLBACK = {
    "llama": Case(LlamaConfig(**sizes(rope_parameters=LLAMA3))),
    "llama with another activation": Case(LlamaConfig(**sizes(hidden_act="gelu"))),
    "gpt-neox": Case(GPTNeoXConfig(**sizes(rope_parameters={**PARTIAL, "partial_rotary_factor": 0.5}))),
    "phi3 longrope, short": Case(
        Phi3Config(**sizes(rope_parameters=dict(LONGROPE), **PHI3_HEAD)), lengths=(16, 9), max_model_len=16
    ),
    "llama dynamic rope within the trained context": Case(LlamaConfig(**sizes(rope_parameters=DYNAMIC))),
    "gpt-2 with a padding token": Case(
        GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0)
    ),
    "gpt-2": Case(GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "opt": Case(OPTConfig(**sizes(ffn_dim=48, word_embed_proj_dim=32, pad_token_id=1))),
    "gemma 2": Case(
        Gemma2Config(
            **sizes(
                head_dim=16,
                sliding_window=5,
                layer_types=WINDOWED,
                query_pre_attn_scalar=24,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
            )
        )
    ),
    "gemma 3": Case(
        Gemma3TextConfig(
            **sizes(
                head_dim=16,
                sliding_window=5,
                layer_types=WINDOWED,
                query_pre_attn_scalar=24,
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                },
            )
        )
    ),
    "gemma 4": Case(Gemma4TextConfig(**sizes(**GEMMA4))),
    "gemma 4 with keys of earlier layers": Case(
        Gemma4TextConfig(**sizes(**GEMMA4 | PER_LAYER, num_kv_shared_layers=2, use_double_wide_mlp=True))
    ),
    "gemma 4 whose keys are its values": Case(
        Gemma4TextConfig(**sizes(**GEMMA4, attention_k_eq_v=True, num_global_key_value_heads=1))
    ),
    "gemma 4 with experts": Case(
        Gemma4TextConfig(
            **sizes(**GEMMA4, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16)
        )
    ),
    "olmo 2": Case(Olmo2Config(**sizes())),
    "stablelm": Case(
        StableLmConfig(
            **sizes(
                use_qkv_bias=True,
                qk_layernorm=True,
                rope_parameters={**PARTIAL, "partial_rotary_factor": 0.25},
            )
        )
    ),
    "cohere": Case(CohereConfig(**sizes(logit_scale=0.25))),
    "granite": Case(
        GraniteConfig(
            **sizes(logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=3.0, attention_multiplier=0.1)
        )
    ),
    "mixtral": Case(MixtralConfig(**sizes(num_local_experts=4, num_experts_per_tok=2, sliding_window=6))),
    "qwen3-moe": Case(
        Qwen3MoeConfig(**sizes(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16))
    ),
}


def reference(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' model, with weights of a size that lets every part of it show in the logits."""
    torch.manual_seed(0)
    own_config = copy.deepcopy(config)
    model = AutoModelForCausalLM.from_config(own_config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            is_vector = parameter.ndim == 1  # norms and biases
            parameter.add_(torch.randn_like(parameter) * (0.3 if is_vector else 0.15))
    return model


def checkpoint(model: PreTrainedModel, path: Path) -> dict[str, Tensor]:
    """The weights under the names, and in the pieces, that a checkpoint has them."""
    model.save_pretrained(path)
    return {name: weight for file in path.glob("*.safetensors") for name, weight in load_file(file).items()}


def logits_of(model: Model, sequences: list[list[int]], *, num_decoded: int = 5, seed: int = 0) -> list[Tensor]:
    """Each sequence's logits at every position, computed in random chunks of mixed batches over scattered blocks."""
    rng = random.Random(seed)
    num_groups = len(windows_of(model.attention_layers))
    num_blocks = num_groups * sum(len(ids) // BLOCK_SIZE + 1 for ids in sequences) + 3
    dtype = next(model.parameters()).dtype
    cache = KVCache(
        model.attention_layers, num_blocks=num_blocks, block_size=BLOCK_SIZE, codec=DenseCodec(dtype), device="cpu"
    )
    attention = TorchAttention(cache)
    blocks = rng.sample(range(1, num_blocks), num_blocks - 1)
    seqs = []
    for i, ids in enumerate(sequences):
        request = Request(request_id=str(i), prompt_token_ids=ids, params=SamplingParams(seed=0, max_tokens=1))
        tables = [[blocks.pop() for _ in range(0, len(ids), BLOCK_SIZE)] for _ in range(num_groups)]
        seqs.append(Sequence(request, list(ids), block_tables=tables, num_released_blocks=[0] * num_groups))
    logits: list[list[Tensor]] = [[] for _ in seqs]
    while unfinished := [seq for seq in seqs if seq.num_tokens - seq.num_computed_tokens]:
        batch = []
        for seq in rng.sample(unfinished, rng.randint(1, len(unfinished))):
            left = seq.num_tokens - seq.num_computed_tokens
            chunk = 1 if left <= num_decoded else rng.randint(1, min(7, left - num_decoded))
            batch.append(Scheduled(seq, chunk, 0, samples=False, num_scored=chunk))
        forward_batch = build_forward_batch(batch, BLOCK_SIZE, torch.device("cpu"))
        with torch.inference_mode():
            attention.plan(forward_batch)
            hidden = model(forward_batch, attention)
            rows = model.compute_logits(hidden[forward_batch.logits_rows])
        for item, chunk_logits in zip(batch, rows.split([item.num_new_tokens for item in batch]), strict=True):
            logits[int(item.seq.request.request_id)].append(chunk_logits)
            item.seq.num_computed_tokens += item.num_new_tokens
    return [torch.cat(chunks) for chunks in logits]


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def assert_same_logits(
    case: Case, path: Path, implementation: Literal["own", "transformers"], tolerance: float = 1e-4
) -> None:
    hf = reference(case.config)
    model = build_model(
        case.config, dtype=torch.float32, implementation=implementation, max_model_len=case.max_model_len
    )
    model.load_weights(checkpoint(hf, path).items())
    sequences = prompts(case.lengths)
    for ids, ours in zip(sequences, logits_of(model, sequences), strict=True):
        with torch.inference_mode():
            theirs = hf(torch.tensor([ids]), use_cache=False).logits[0]
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        assert theirs.std() > 1e-3
        assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()
