"""Every kind of model on Triton's kernels, through the composition root: the tokens that torch's operations give."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading.dummy import byte_tokenizer
from engine.models.operations import load_operations
from engine.types import Request, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")
VOCAB_SIZE = 20
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": 1,
}
PARTIAL = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}
OWN_EXPERTS = {**EXPERTS, "moe_intermediate_size": 20}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=7),
    "qwen2 with biases": Qwen2Config(**SIZES),
    "qwen3 with norms of heads": Qwen3Config(**SIZES, head_dim=16),
    "smollm3 with layers without positions": SmolLM3Config(**SIZES, no_rope_layer_interval=2),
    "phi3 that rotates half of each head": Phi3Config(**SIZES, rope_parameters=PARTIAL),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=9),
    "qwen2-moe with a shared expert": Qwen2MoeConfig(
        **SIZES, **OWN_EXPERTS, shared_expert_intermediate_size=24, mlp_only_layers=[0]
    ),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **OWN_EXPERTS, norm_topk_prob=True),
    "olmoe with norms of whole projections": OlmoeConfig(**SIZES, **EXPERTS),
}
PROMPTS = [[*range(VOCAB_SIZE), 5, 9], [7, 3]]  # after the first, any token can be looked up


@pytest.fixture(params=MODELS)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint whose every weight matters: no norm is one, no bias zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[request.param]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    # families of models add up to two special tokens of their own
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer(VOCAB_SIZE - 2).tokenizer_json)
    return tmp_path


def build(path: Path, kernels: str, drafts: str) -> Engine:
    settings = {
        "model": {"path": str(path), "dtype": "float32", "quantization": "none", "implementation": "own"},
        "device": {"kernels": kernels, "num_threads": 1},
        "scheduler": {"max_num_batched_tokens": 9, "max_num_seqs": 4},  # prompts come in chunks
        "speculation": {"method": drafts, "depth": 3, "ngram_min": 1},
        "kv_cache": {"memory": "512tokens", "block_size": 4},
    }
    return build_engine(EngineConfig.model_validate(settings), lambda phase, detail: None)[0]


def outputs(engine: Engine) -> tuple[list[list[int]], int]:
    """Each prompt's tokens, and how many drafts were verified."""
    tokens: dict[str, list[int]] = {}
    num_drafts = 0
    for number, prompt in enumerate(PROMPTS):
        params = SamplingParams(seed=0, max_tokens=6, temperature=0.0)
        tokens[str(number)] = []
        engine.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params))
    while engine.has_work:
        step_outputs, _, stats = engine.step()
        num_drafts += stats.num_draft_tokens
        for output in step_outputs:
            assert output.error is None
            tokens[output.request_id] += output.token_ids
    return list(tokens.values()), num_drafts


def test_a_model_says_the_same_on_triton_as_on_torch(directory: Path) -> None:
    triton_engine = build(directory, "triton", "ngram")
    assert triton_engine.executor.runner.model.operations == load_operations("triton")
    found, num_drafts = outputs(triton_engine)
    assert num_drafts > 0
    assert (found, 0) == outputs(build(directory, "torch", "none"))
    assert [len(tokens) for tokens in found] == [6, 6]
    assert len({token for tokens in found for token in tokens}) > 1
