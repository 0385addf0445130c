"""The whole engine on Triton's kernels: the same tokens as on torch's."""

import random
from collections import defaultdict

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from engine.attention import AttentionBackend, TorchAttention
from engine.attention_triton import TritonAttention
from engine.engine import Engine
from engine.kv_cache import KVCache
from engine.kv_manager import KVCacheManager
from engine.model_runner import ModelRunner
from engine.models.registry import build_model
from engine.proposers.ngram import NgramProposer
from engine.proposers.none import NoProposer
from engine.sampler import Sampler
from engine.scheduler import Scheduler, SchedulerLimits
from engine.step_stats import ModelCost
from engine.types import Request, SamplingParams, Scheduled

VOCAB_SIZE = 40
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
}
COST = ModelCost(weight_bytes=1, flops_per_token=1, kv_bytes_per_token=1, attention_flops_per_pair=1)


class TreeProposer:
    """Guesses two tokens after the newest, and one after the first of them."""

    num_lookahead_tokens = 0

    def propose(self, batch: list[Scheduled], hidden_states: torch.Tensor) -> None:
        for item in batch:
            newest = item.seq.token_ids[-1]
            item.seq.draft_token_ids = [newest, (newest + 1) % VOCAB_SIZE, newest]
            item.seq.draft_parents = [-1, -1, 0]


PROPOSERS = {
    "none": NoProposer,
    "ngram": lambda: NgramProposer(num_drafts=3, ngram_max=3, ngram_min=1),
    "tree": TreeProposer,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9, head_dim=16)),
}


def _outputs(
    hf_model: PreTrainedModel, attention: type[AttentionBackend], device: torch.device, proposer: str
) -> dict[str, list[int]]:
    model = build_model(hf_model.config, dtype=torch.float32)
    model.load_weights(hf_model.state_dict().items())
    window = getattr(hf_model.config, "sliding_window", None)
    cache = KVCache(model.attention_layers, num_blocks=60, block_size=4, dtype=torch.float32, device=device)
    kv = KVCacheManager(60, 4, window=window)
    limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=24, max_model_len=60, headroom=4)
    runner = ModelRunner(model.to(device), cache, attention(cache), block_size=4)
    engine = Engine(runner, Scheduler(kv, limits), Sampler(VOCAB_SIZE), PROPOSERS[proposer](), COST)
    rng = random.Random(1)
    for i, length in enumerate((3, 30, 9)):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(length)]
        params = SamplingParams(seed=i, max_tokens=8, temperature=0.8 if i == 0 else 0.0)
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    outputs: dict[str, list[int]] = defaultdict(list)
    while engine.has_work:
        for output in engine.step()[0]:
            assert output.error is None
            outputs[output.request_id] += output.token_ids
    return outputs


@pytest.mark.parametrize(("model", "proposer"), [("llama", "none"), ("llama", "tree"), ("mistral", "ngram")])
def test_the_engine_says_the_same_on_triton_as_on_torch(device: torch.device, model: str, proposer: str) -> None:
    hf_model = MODELS[model]().eval()
    for parameter in hf_model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    found = _outputs(hf_model, TritonAttention, device, proposer)
    assert found == _outputs(hf_model, TorchAttention, torch.device("cpu"), proposer)
    assert [len(found[str(i)]) for i in range(3)] == [8, 8, 8]
