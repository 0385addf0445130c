"""Strict determinism: the same request has the same tokens and the same bits of log-probabilities, whatever happens."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from engine.attention.torch_backend import TorchAttention
from engine.engine import Engine
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.layer_spec import windows_of
from engine.kv_cache.manager import KVCacheManager
from engine.kv_cache.storage import KVCache
from engine.models.registry import build_model
from engine.runner.model_runner import ModelRunner
from engine.runner.strict_runner import OneTokenRunner
from engine.sampling.host_sampler import HostSampler
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_stats import ModelCost
from engine.speculation.ngram import NgramProposer
from engine.speculation.no_proposer import NoProposer
from engine.types import Request, SamplingParams, TokenLogprobs
from tests.support.answers import answer_all
from tests.support.stepping import engine_of

VOCAB_SIZE = 150
BLOCK_SIZE = 4
SIZES = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
}
COST = ModelCost(weight_bytes=1, flops_per_token=1, kv_bytes_per_token=1, attention_flops_per_pair=1)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=10, head_dim=10)),
}
Answers = dict[str, tuple[list[int], list[TokenLogprobs], list[TokenLogprobs]]]  # as `run` gives them


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return model


def _make_engine(
    hf_model: PreTrainedModel, *, num_blocks: int = 300, budget: int = 64, drafts: bool = False, strict: bool = True
) -> Engine:
    model = build_model(hf_model.config, dtype=torch.float32)
    model.load_weights(hf_model.state_dict().items())
    cache = KVCache(
        model.attention_layers, num_blocks=num_blocks, block_size=BLOCK_SIZE, codec=DenseCodec(torch.float32)
    )
    kv = KVCacheManager(num_blocks, BLOCK_SIZE, windows=windows_of(model.attention_layers))
    limits = SchedulerLimits(max_num_seqs=16, max_num_batched_tokens=budget, max_model_len=80, headroom=1)
    runner_class = OneTokenRunner if strict else ModelRunner
    runner = runner_class(model, cache, TorchAttention(cache))
    proposer = NgramProposer(num_drafts=3, ngram_max=2, ngram_min=1) if drafts else NoProposer()
    return engine_of(runner, Scheduler(kv, limits), HostSampler(VOCAB_SIZE), proposer, COST)


def _requests() -> list[Request]:
    rng = random.Random(1)
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(13)]
    requests = []
    for i in range(14):
        tail = [rng.randrange(6) for _ in range(rng.randint(1, 25))]  # with repetition, for n-grams
        params = SamplingParams(
            seed=i,
            max_tokens=10,
            temperature=0.0 if i % 2 else 0.8,
            logprobs=3,
            prompt_logprobs=2 if i % 4 == 0 else None,
        )
        prompt = shared + tail if i % 3 == 0 else tail
        requests.append(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    return requests


@pytest.fixture(scope="module")
def alone(model: PreTrainedModel) -> Answers:
    """Each request in an engine of its own."""
    answers: Answers = {}
    for request in _requests():
        answers |= answer_all(_make_engine(model), [request]).answers
    return answers


def test_a_request_is_the_same_alone_and_in_a_batch(model: PreTrainedModel, alone: Answers) -> None:
    assert answer_all(_make_engine(model, budget=400), _requests(), at_once=14).answers == alone


def test_a_request_is_the_same_cold_and_warm(model: PreTrainedModel, alone: Answers) -> None:
    engine = _make_engine(model)
    assert answer_all(engine, _requests(), at_once=2).answers == alone
    assert answer_all(engine, _requests(), at_once=3).answers == alone
    assert engine.scheduler.num_prefix_hits > 0


@pytest.mark.parametrize("budget", [16, 17, 33])
def test_a_request_is_the_same_in_any_chunks(model: PreTrainedModel, alone: Answers, budget: int) -> None:
    requests = _requests()
    random.Random(budget).shuffle(requests)
    assert answer_all(_make_engine(model, budget=budget), requests, at_once=5).answers == alone


def test_a_request_is_the_same_after_preemption(model: PreTrainedModel, alone: Answers) -> None:
    has_window = model.config.model_type == "mistral"  # and gives blocks back
    engine = _make_engine(model, num_blocks=14 if has_window else 24, budget=32 if has_window else 64)
    assert answer_all(engine, _requests(), at_once=14).answers == alone
    assert engine.scheduler.num_preemptions > 0


def test_a_request_is_the_same_with_drafts(model: PreTrainedModel, alone: Answers) -> None:
    answered = answer_all(_make_engine(model, drafts=True), _requests(), at_once=4)
    assert answered.answers == alone
    assert answered.num_accepted_drafts > 5


def test_without_it_the_last_bits_depend_on_the_company(model: PreTrainedModel, alone: Answers) -> None:
    """Else the tests above would prove nothing. Tokens are the same in both modes."""
    answered = answer_all(_make_engine(model, drafts=True, budget=33, strict=False), _requests(), at_once=4)
    assert answered.answers != alone
    assert answered.tokens == {name: tokens for name, (tokens, _, _) in alone.items()}
