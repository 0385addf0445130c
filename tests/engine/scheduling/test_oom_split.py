"""A step that needs more memory than there is: smaller steps, and no request fails that could be computed in them."""

import random
from collections import defaultdict

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from engine.attention.torch_backend import TorchAttention
from engine.batch.step_inputs import StepInputs
from engine.engine import Engine
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.manager import KVCacheManager
from engine.kv_cache.storage import KVCache
from engine.models.registry import build_model
from engine.runner.model_runner import ModelRunner
from engine.sampling.host_sampler import HostSampler
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.oom_split import drop_drafts, halve_chunks
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_stats import ModelCost
from engine.speculation.ngram import NgramProposer
from engine.speculation.no_proposer import NoProposer
from engine.types import Request, SamplingParams, Scheduled, Sequence
from tests.support.stepping import engine_of

VOCAB_SIZE = 32
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=128,
)
COST = ModelCost(weight_bytes=1, flops_per_token=1, kv_bytes_per_token=1, attention_flops_per_pair=1)
BIG = 31  # a token that takes all the memory
BAD = 30  # one that cannot be computed
NO_MEMORY = [  # a GPU's, numpy's and torch's on the host
    torch.OutOfMemoryError("no memory left"),
    MemoryError("Unable to allocate 2 PiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes"),
]


class SmallMemoryRunner(ModelRunner):
    """Runs out of memory above `max_num_rows` rows, and wherever the token BIG is among them; fails with token BAD."""

    max_num_rows = 1000
    num_releases = num_failures = 0

    def forward(self, inputs: StepInputs, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if BAD in inputs.input_ids:
            raise RuntimeError("on order")
        if inputs.num_tokens > self.max_num_rows or BIG in inputs.input_ids:
            self.num_failures += 1
            raise NO_MEMORY[self.num_failures % len(NO_MEMORY)]
        return super().forward(inputs, tokens)

    def release_memory(self) -> None:
        self.num_releases += 1
        super().release_memory()


def _make_engine(*, max_num_rows: int, overlap: bool = False, has_drafts: bool = False) -> Engine:
    model = build_model(CONFIG, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    cache = KVCache(model.attention_layers, num_blocks=200, block_size=4, codec=DenseCodec(torch.float32))
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=100)
    runner = SmallMemoryRunner(model, cache, TorchAttention(cache))
    runner.max_num_rows = max_num_rows
    proposer = NgramProposer(num_drafts=3, ngram_min=1, ngram_max=2) if has_drafts else NoProposer()
    kv = KVCacheManager(200, 4)
    return engine_of(runner, Scheduler(kv, limits), HostSampler(VOCAB_SIZE), proposer, COST, overlap=overlap)


def _run(engine: Engine, prompts: list[list[int]], **fields: object) -> tuple[dict[str, list[int]], dict[str, str]]:
    """(output tokens, errors) by request"""
    outputs: dict[str, list[int]] = defaultdict(list)
    errors: dict[str, str] = {}
    for i, prompt in enumerate(prompts):
        bias = {BIG: -100.0, BAD: -100.0}  # only a prompt has them
        params = SamplingParams(seed=i, max_tokens=8, temperature=0.8, logit_bias=bias, **fields)
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    while engine.has_work:
        for output in engine.step()[0]:
            outputs[output.request_id] += output.token_ids
            if output.error:
                errors[output.request_id] = output.error
    assert engine.scheduler.kv.pool.num_owned == 0
    return outputs, errors


def _prompts(count: int = 6) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(BAD) for _ in range(rng.randrange(5, 60))] for _ in range(count)]


@pytest.mark.parametrize("kind", ["plain", "overlap", "drafts"])
@pytest.mark.parametrize("max_num_rows", [1, 3, 4, 7, 40])
def test_output_is_the_same_in_a_small_memory(max_num_rows, kind):
    overlap, has_drafts = kind == "overlap", kind == "drafts"
    expected, _ = _run(_make_engine(max_num_rows=1000), _prompts())
    engine = _make_engine(max_num_rows=max_num_rows, overlap=overlap, has_drafts=has_drafts)
    outputs, errors = _run(engine, _prompts())
    assert errors == {}
    assert outputs == expected
    assert engine.executor.runner.num_releases > 0


def test_steps_stay_as_small_as_was_needed():
    """Or else every prompt would run out of memory again."""
    engine = _make_engine(max_num_rows=40)
    _run(engine, _prompts())
    assert engine.scheduler.limits.max_num_batched_tokens == 32
    assert engine.executor.runner.num_releases == 1
    engine = _make_engine(max_num_rows=1)
    _run(engine, _prompts())
    assert engine.scheduler.limits.max_num_batched_tokens == 4  # one for each request that may run


def test_steps_are_whole_again_after_many_that_had_memory_enough():
    engine = _make_engine(max_num_rows=40)
    _run(engine, _prompts())
    assert engine.degraded_modes == ["token_budget"]
    engine.executor.runner.max_num_rows = 1000  # whoever had the memory has given it back
    stats = []
    while engine.degraded_modes and len(stats) < 1000:
        engine.add(Request(request_id="a", prompt_token_ids=[1, 2], params=SamplingParams(seed=0, max_tokens=90)))
        while engine.has_work:
            stats.append(engine.step()[2])
    assert engine.scheduler.limits.max_num_batched_tokens == 64
    assert 100 < sum(one.degraded_modes == ["token_budget"] for one in stats) < 1000
    assert stats[-1].degraded_modes == []


def test_prompts_are_scored_in_smaller_steps_too():
    expected = _make_engine(max_num_rows=1000)
    engine = _make_engine(max_num_rows=5)
    scores = {}
    for each in (expected, engine):
        params = SamplingParams(seed=0, max_tokens=2, temperature=0.0, prompt_logprobs=0)
        each.add(Request(request_id="a", prompt_token_ids=_prompts()[0], params=params))
        found = []
        while each.has_work:
            for output in each.step()[0]:
                found += [(entry.token_id, round(entry.logprob, 3)) for entry in output.prompt_logprobs or []]
        scores[each] = found
    assert scores[engine] == scores[expected]
    assert len(scores[engine]) == len(_prompts()[0]) - 1


def test_a_request_that_fits_into_no_step_fails_alone_and_says_why():
    prompts = [*_prompts()[:3], [1, 2, BIG]]
    expected, _ = _run(_make_engine(max_num_rows=1000), prompts[:3])
    outputs, errors = _run(_make_engine(max_num_rows=1000), prompts)
    assert list(errors) == ["3"]
    assert "not enough memory" in errors["3"]
    assert "kv_cache.memory" in errors["3"]
    assert {key: outputs[key] for key in "012"} == expected


def test_beside_one_that_fails_others_are_computed_in_smaller_steps_too():
    prompts = [[1, 2, BAD], *_prompts()[:3]]
    expected, _ = _run(_make_engine(max_num_rows=1000), prompts)
    outputs, errors = _run(_make_engine(max_num_rows=7), prompts)
    assert list(errors) == ["0"]
    assert outputs == expected


def _scheduled(num_new_tokens: int, *, num_drafts: int = 0, num_scored: int = 0, samples: bool = True) -> Scheduled:
    token_ids = [1] * num_new_tokens
    params = SamplingParams(seed=0, max_tokens=1)
    seq = Sequence(Request(request_id="a", prompt_token_ids=token_ids, params=params), token_ids)
    return Scheduled(seq, num_new_tokens, num_drafts, samples, num_scored)


def test_a_halved_step_keeps_decoding_rows_and_the_chunks_that_came_first():
    decoding, drafting = _scheduled(1), _scheduled(4, num_drafts=3)
    first, second, third = _scheduled(6), _scheduled(9, num_scored=8), _scheduled(7)
    batch = [decoding, drafting, first, second, third]
    assert halve_chunks(batch)
    assert batch == [decoding, drafting, first, second]
    assert (decoding.num_new_tokens, drafting.num_new_tokens, drafting.num_drafts) == (1, 4, 3)
    assert (first.num_new_tokens, first.samples) == (6, True)
    assert (second.num_new_tokens, second.num_scored, second.samples) == (5, 5, False)
    assert not halve_chunks([decoding, drafting])
    lone = [_scheduled(3, num_drafts=1)]
    assert halve_chunks(lone)
    assert (lone[0].num_new_tokens, lone[0].num_drafts, lone[0].samples) == (1, 0, False)
    assert not halve_chunks(lone)


def test_drafts_leave_a_step_before_any_request_does():
    decoding, drafting, scoring = _scheduled(1), _scheduled(4, num_drafts=3), _scheduled(1, num_scored=1, samples=False)
    batch = [decoding, drafting, scoring]
    assert drop_drafts(batch)
    assert [(item.num_new_tokens, item.num_drafts, item.samples, item.num_scored) for item in batch] == [
        (1, 0, True, 0),
        (1, 0, True, 0),
        (1, 0, False, 1),
    ]
    assert not drop_drafts(batch)
