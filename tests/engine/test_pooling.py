"""Requests for a vector instead of text: against transformers, and against themselves in every other situation."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.attention.torch_backend import TorchAttention
from engine.engine import Engine
from engine.kv_cache.codec import DenseCodec
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
from engine.types import Pooling, Request, SamplingParams, StepOutput
from tests.support.stepping import engine_of

VOCAB_SIZE, HIDDEN_SIZE = 64, 32
COST = ModelCost(weight_bytes=1, flops_per_token=1, kv_bytes_per_token=1, attention_flops_per_pair=1)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN_SIZE, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=VOCAB_SIZE, max_position_embeddings=256,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.25
    return model.eval()


def make_engine(
    llama: LlamaForCausalLM,
    *,
    num_blocks: int = 300,
    budget: int = 64,
    overlap: bool = False,
    runner_type: type[ModelRunner] = ModelRunner,
    proposer: NoProposer | NgramProposer | None = None,
) -> Engine:
    model = build_model(llama.config, dtype=torch.float32)
    model.load_weights(llama.state_dict().items())
    cache = KVCache(model.attention_layers, num_blocks=num_blocks, block_size=4, codec=DenseCodec(torch.float32))
    limits = SchedulerLimits(max_num_seqs=8, max_model_len=80, headroom=1, max_num_batched_tokens=budget)
    runner = runner_type(model, cache, TorchAttention(cache))
    scheduler = Scheduler(KVCacheManager(num_blocks, 4), limits)
    return engine_of(runner, scheduler, HostSampler(VOCAB_SIZE), proposer or NoProposer(), COST, overlap=overlap)


def pooled(name: str, prompt: list[int], pooling: Pooling) -> Request:
    return Request(
        request_id=name, prompt_token_ids=prompt, params=SamplingParams(seed=0, max_tokens=1), pooling=pooling
    )


def texting(name: str, prompt: list[int], **params: object) -> Request:
    return Request(request_id=name, prompt_token_ids=prompt, params=SamplingParams(seed=7, max_tokens=20, **params))


def run(engine: Engine, requests: list[Request], stagger: int = 3) -> dict[str, list[StepOutput]]:
    outputs: dict[str, list[StepOutput]] = {request.request_id: [] for request in requests}
    pending = list(requests)
    for _ in range(3000):
        for request in pending[:stagger]:
            engine.add(request)
        del pending[:stagger]
        for output in engine.step()[0]:
            outputs[output.request_id].append(output)
        if not pending and not engine.has_work:
            break
    assert all(told[-1].finish_reason for told in outputs.values())
    return outputs


def vector_of(outputs: list[StepOutput]) -> np.ndarray:
    [output] = outputs
    assert (output.finish_reason, output.token_ids) == ("stop", [])
    assert output.pooled is not None
    return np.frombuffer(output.pooled, dtype="<f4")


def expected(llama: LlamaForCausalLM, prompt: list[int], pooling: Pooling) -> np.ndarray:
    with torch.inference_mode():
        hidden = llama.model(torch.tensor([prompt])).last_hidden_state[0]
    return (hidden[-1] if pooling == "last" else hidden.mean(0)).numpy()


def prompts(seed: int, num: int) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(16)]
    lengths = [1, 2, 4, 5, 79, 80, *(rng.randrange(1, 80) for _ in range(num - 6))]
    return [
        (shared if number % 2 else [])[:length] + [rng.randrange(VOCAB_SIZE) for _ in range(max(length - 16, 1))]
        if length > 17
        else [rng.randrange(VOCAB_SIZE) for _ in range(length)]
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"budget": 9},
        {"num_blocks": 32, "budget": 16},
        {"overlap": True, "budget": 16},
        {"runner_type": OneTokenRunner},
    ],
    ids=["alone", "chunked", "scarce blocks", "run ahead", "one token at a time"],
)
def test_vectors_are_those_of_transformers_beside_texts_that_stay_the_same(llama, pooling, options) -> None:
    asked = prompts(1, 14)
    texts = [texting(f"text {number}", prompt[:40]) for number, prompt in enumerate(prompts(2, 8))]
    alone = run(make_engine(llama), texts)
    requests = [pooled(f"pooled {number}", prompt, pooling) for number, prompt in enumerate(asked)]
    mixed = [request for pair in zip(requests, texts, strict=False) for request in pair] + requests[len(texts) :]
    engine = make_engine(llama, **options)
    outputs = run(engine, mixed)
    for request in requests:
        vector = vector_of(outputs[request.request_id])
        assert vector.shape == (HIDDEN_SIZE,)
        np.testing.assert_allclose(vector, expected(llama, request.prompt_token_ids, pooling), rtol=2e-4, atol=2e-4)
    for request in texts:
        tokens = [token for output in outputs[request.request_id] for token in output.token_ids]
        assert tokens == [token for output in alone[request.request_id] for token in output.token_ids]
    assert engine.scheduler.kv.pool.num_owned == 0
    if "num_blocks" in options:
        assert engine.scheduler.num_preemptions > 0


def test_drafts_go_on_beside_vectors(llama) -> None:
    repeated = [1, 2, 3, 4, 5] * 6
    engine = make_engine(llama, proposer=NgramProposer(num_drafts=3, ngram_min=1, ngram_max=3))
    outputs = run(engine, [texting("text", repeated), pooled("pooled", repeated, "mean"), texting("other", repeated)])
    np.testing.assert_allclose(vector_of(outputs["pooled"]), expected(llama, repeated, "mean"), rtol=2e-4, atol=2e-4)


def test_only_the_last_state_may_follow_a_cached_prefix(llama) -> None:
    prompt = prompts(3, 7)[5]
    engine = make_engine(llama)
    first = run(engine, [pooled("first", prompt, "mean")])["first"]
    hits = engine.scheduler.num_prefix_hits
    again = run(engine, [pooled("again", prompt, "mean")])["again"]
    assert engine.scheduler.num_prefix_hits == hits == 0
    assert again[0].pooled == first[0].pooled
    last = run(engine, [pooled("last", prompt, "last")])["last"]
    assert last[0].num_cached_tokens == len(prompt) - 4
    np.testing.assert_allclose(vector_of(last), expected(llama, prompt, "last"), rtol=2e-4, atol=2e-4)


def test_states_that_are_no_numbers_fail_their_own_request_alone(llama) -> None:
    engine = make_engine(llama)
    poison = VOCAB_SIZE - 1
    embedding = engine.executor.runner.model.get_parameter("embed_tokens.weight")
    embedding.data[poison] = float("nan")
    requests = [
        pooled("bad", [1, 2, poison, 3], "mean"),
        pooled("good", [1, 2, 3], "mean"),
        texting("text", [5, 6], allowed_token_ids=list(range(poison))),
    ]
    outputs = run(engine, requests)
    assert outputs["bad"][-1].finish_reason == "error"
    assert "not finite" in outputs["bad"][-1].error
    assert outputs["bad"][-1].pooled is None
    np.testing.assert_allclose(vector_of(outputs["good"]), expected(llama, [1, 2, 3], "mean"), rtol=2e-4, atol=2e-4)
    assert outputs["text"][-1].finish_reason == "length"
    assert engine.scheduler.kv.pool.num_owned == 0
