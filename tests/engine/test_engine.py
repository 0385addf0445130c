"""The whole engine on a tiny model: its output against transformers, and against itself in every other situation."""

import random
from collections import defaultdict
from collections.abc import Callable

import msgspec
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from engine.attention.torch_backend import TorchAttention
from engine.engine import Engine
from engine.kv_cache.codec import DenseCodec
from engine.kv_cache.manager import KVCacheManager
from engine.kv_cache.storage import KVCache
from engine.models.registry import build_model
from engine.runner.model_runner import ModelRunner
from engine.sampling.host_sampler import HostSampler
from engine.scheduling.limits import SchedulerLimits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_stats import ModelCost
from engine.speculation.ngram import NgramProposer
from engine.speculation.no_proposer import NoProposer
from engine.speculation.proposer import ProposerNeeds
from engine.speculation.verified_step import VerifiedStep
from engine.types import Request, SamplingParams, StepOutput
from tests.support.stepping import engine_of

VOCAB_SIZE = 64
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
}
COST = ModelCost(weight_bytes=1, flops_per_token=1, kv_bytes_per_token=1, attention_flops_per_pair=1)
POISON = VOCAB_SIZE - 1


class TreeProposer:
    """Guesses trees: some branches follow what the request will really say, others are wrong."""

    needs = ProposerNeeds(num_drafts=9)

    def __init__(self, answers: dict[str, list[int]], seed: int = 0) -> None:
        self.answers, self.rng = answers, random.Random(seed)

    def propose(self, step: VerifiedStep) -> None:
        for seq in step.drafting:
            truth = self.answers[seq.request.request_id][seq.num_output_tokens :][:3]
            tokens, parents, trunk = [], [], -1
            for token in truth:
                wrong = self.rng.randrange(VOCAB_SIZE - 1)
                tokens += [wrong, token, wrong]
                parents += [trunk, trunk, len(tokens) - 3]
                trunk = len(tokens) - 2
            seq.draft_token_ids, seq.draft_parents = tokens, parents


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return _randomised(LlamaForCausalLM(LlamaConfig(**SIZES)))


@pytest.fixture(scope="module")
def mistral() -> PreTrainedModel:
    return _randomised(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=10, head_dim=8)))


def _randomised(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.25
    return model.eval()


def _make_engine(
    hf_model: PreTrainedModel,
    *,
    num_blocks: int = 300,
    budget: int = 64,
    max_num_logits: int | None = None,
    proposer: NoProposer | NgramProposer | TreeProposer | None = None,
    window: int | None = None,
) -> Engine:
    model = build_model(hf_model.config, dtype=torch.float32)
    model.load_weights(hf_model.state_dict().items())
    block_size = 4
    cache = KVCache(
        model.attention_layers, num_blocks=num_blocks, block_size=block_size, codec=DenseCodec(torch.float32)
    )
    kv = KVCacheManager(num_blocks, block_size, windows=[window])
    rows = {"max_num_batched_tokens": budget, "max_num_logits": max_num_logits}
    limits = SchedulerLimits(max_num_seqs=8, max_model_len=80, headroom=1, **rows)
    runner = ModelRunner(model, cache, TorchAttention(cache))
    return engine_of(runner, Scheduler(kv, limits), HostSampler(VOCAB_SIZE), proposer or NoProposer(), COST)


def _run(engine: Engine, requests: list[Request], stagger: int = 2) -> dict[str, list[int]]:
    """Adds a few requests per step and runs until all are done. Returns the output tokens by request id."""
    outputs: dict[str, list[int]] = defaultdict(list)
    finished: set[str] = set()
    pending = list(requests)
    for _ in range(5000):
        for request in pending[:stagger]:
            engine.add(request)
        del pending[:stagger]
        for output in engine.step()[0]:
            assert output.error is None
            assert output.request_id not in finished
            outputs[output.request_id] += output.token_ids
            if output.finish_reason:
                finished.add(output.request_id)
        if not pending and not engine.has_work:
            break
    assert finished == {request.request_id for request in requests}
    assert engine.scheduler.kv.pool.num_owned == 0
    return outputs


def _prompts(count: int = 16, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(POISON) for _ in range(13)]
    tails = [[rng.randrange(POISON) for _ in range(rng.randrange(1, 14))] for _ in range(count)]
    return [shared + tail if i % 3 == 0 else tail for i, tail in enumerate(tails)]


def _requests(prompts: list[list[int]], **fields: object) -> list[Request]:
    base = {"max_tokens": 15, "temperature": 0.0, **fields}
    return [
        Request(request_id=str(i), prompt_token_ids=prompt, params=SamplingParams(seed=i * 77, **base))
        for i, prompt in enumerate(prompts)
    ]


def _greedy(hf_model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(hf_model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def greedy(llama: PreTrainedModel) -> dict[str, list[int]]:
    """What transformers says after each of `_prompts`."""
    return {str(i): _greedy(llama, prompt, 15) for i, prompt in enumerate(_prompts())}


PROPOSERS: dict[str, Callable[[dict[str, list[int]]], NoProposer | NgramProposer | TreeProposer]] = {
    "none": lambda answers: NoProposer(),
    "ngram": lambda answers: NgramProposer(num_drafts=3, ngram_max=3, ngram_min=1),
    "tree": TreeProposer,
}


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("budget", [9, 64])
@pytest.mark.parametrize("num_blocks", [22, 300])
def test_greedy_output_equals_transformers(llama, greedy, num_blocks, budget, proposer):
    engine = _make_engine(llama, num_blocks=num_blocks, budget=budget, proposer=PROPOSERS[proposer](greedy))
    assert _run(engine, _requests(_prompts())) == greedy
    if proposer != "tree":  # which finishes before memory runs out
        assert (engine.scheduler.num_preemptions > 0) == (num_blocks == 22)


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_greedy_output_equals_transformers_with_a_sliding_window(mistral, proposer):
    answers = {str(i): _greedy(mistral, prompt, 15) for i, prompt in enumerate(_prompts())}
    engine = _make_engine(mistral, num_blocks=40, budget=9, window=10, proposer=PROPOSERS[proposer](answers))
    assert _run(engine, _requests(_prompts())) == answers


SAMPLED = {"temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.4, "repetition_penalty": 1.1, "min_tokens": 3}


@pytest.fixture(scope="module")
def alone(llama: PreTrainedModel) -> dict[str, list[int]]:
    """Sampled output of each request when it has the engine for itself."""
    results = {}
    for request in _requests(_prompts(), **SAMPLED):
        results |= _run(_make_engine(llama), [request])
    return results


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize(("num_blocks", "budget"), [(300, 64), (300, 9), (22, 9)])
def test_sampled_output_is_the_same_in_any_batch(llama, alone, num_blocks, budget, proposer):
    """Alone or not, cold or warm prefix, preempted or not, with drafts or without: the same bits."""
    engine = _make_engine(llama, num_blocks=num_blocks, budget=budget, proposer=PROPOSERS[proposer](alone))
    assert _run(engine, _requests(_prompts(), **SAMPLED), stagger=5) == alone
    if num_blocks == 300:
        assert engine.scheduler.num_prefix_hits > 0
        assert _run(engine, _requests(_prompts(), **SAMPLED), stagger=16) == alone  # every prefix is warm now
    elif proposer == "none":
        assert engine.scheduler.num_preemptions > 0


def test_sampled_output_goes_on_after_a_crash_as_if_nothing_had_happened(llama, alone):
    replayed = [
        msgspec.structs.replace(request, output_token_ids=alone[request.request_id][: i % 14])
        for i, request in enumerate(_requests(_prompts(), **SAMPLED))
    ]
    outputs = _run(_make_engine(llama, proposer=NgramProposer(num_drafts=3, ngram_max=3, ngram_min=1)), replayed)
    for request in replayed:
        assert request.output_token_ids + outputs[request.request_id] == alone[request.request_id]


def test_seeds_change_the_output(llama, alone):
    request = _requests(_prompts(), **SAMPLED)[3]
    other = msgspec.structs.replace(request, params=msgspec.structs.replace(request.params, seed=5))
    assert _run(_make_engine(llama), [other])["3"] != alone["3"]


def test_drafts_save_steps(llama, greedy):
    def num_steps(proposer: NoProposer | TreeProposer) -> int:
        engine = _make_engine(llama, proposer=proposer)
        engine.add(_requests(_prompts())[0])
        return sum(1 for _ in iter(lambda: engine.has_work and engine.step(), False))

    assert num_steps(TreeProposer(greedy)) <= num_steps(NoProposer()) / 2


class PoisonedSampler(HostSampler):
    """Fails whenever the request of this seed is in the batch."""

    def launch(self, logits, inputs, newest=None):
        if POISON in inputs.facts.seeds:
            raise RuntimeError("poison")
        return super().launch(logits, inputs, newest)


def test_a_poisoned_request_fails_alone(llama, greedy):
    engine = _make_engine(llama)
    engine.executor.sampler = PoisonedSampler(VOCAB_SIZE)
    poisoned = Request(request_id="bad", prompt_token_ids=[1, 2, 3], params=SamplingParams(seed=POISON, max_tokens=5))
    for request in [*_requests(_prompts())[:4], poisoned]:
        engine.add(request)
    results: dict[str, list[int]] = defaultdict(list)
    errors: dict[str, str] = {}
    while engine.has_work:
        for output in engine.step()[0]:
            results[output.request_id] += output.token_ids
            if output.error:
                errors[output.request_id] = output.error
    assert list(errors) == ["bad"]
    assert "bad" in errors["bad"]
    assert {key: results[key] for key in "0123"} == {key: greedy[key] for key in "0123"}
    assert engine.scheduler.kv.pool.num_owned == 0


class BrokenProposer(NoProposer):
    def propose(self, step):
        raise RuntimeError("no guess today")


def test_a_broken_proposer_costs_no_request(llama, greedy):
    assert _run(_make_engine(llama, proposer=BrokenProposer()), _requests(_prompts())) == greedy


def test_aborted_requests_stop_costing_work_at_once(llama):
    engine = _make_engine(llama, num_blocks=40)
    requests = _requests(_prompts(), max_tokens=60)
    for request in requests:
        engine.add(request)
    for _ in range(5):
        engine.step()
    for request in requests:
        engine.abort(request.request_id)
        engine.abort(request.request_id)  # twice, as a careless caller would
    assert not engine.has_work
    outputs, started, stats = engine.step()
    assert (outputs, started, stats.num_tokens, stats.num_owned_blocks) == ([], [], 0, 0)


def test_prompt_logprobs_are_the_models_whatever_the_chunks_and_rows(llama):
    prompt = _prompts()[0]
    with torch.inference_mode():
        expected = llama(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for num_blocks, budget, rows in ((300, 64, None), (300, 64, 8), (300, 64, 11), (300, 8, None), (22, 8, 8)):
        engine = _make_engine(llama, num_blocks=num_blocks, budget=budget, max_num_logits=rows)
        for request in _requests(_prompts()[1:], max_tokens=30):
            engine.add(request)
        params = SamplingParams(seed=0, max_tokens=3, temperature=0.0, prompt_logprobs=2)
        engine.add(Request(request_id="scored", prompt_token_ids=prompt, params=params))
        scored: list[StepOutput] = []
        while engine.has_work:
            scored += [output for output in engine.step()[0] if output.request_id == "scored"]
        logprobs = [entry for output in scored for entry in output.prompt_logprobs or []]
        assert [entry.token_id for entry in logprobs] == prompt[1:]
        for row, entry in enumerate(logprobs):
            assert entry.logprob == pytest.approx(float(expected[row, prompt[row + 1]]), abs=1e-4)


def test_the_timing_of_a_request_sums_up(llama):
    engine = _make_engine(llama)
    engine.add(_requests(_prompts())[0])
    outputs = []
    while engine.has_work:
        outputs += engine.step()[0]
    timing = outputs[-1].timing
    assert outputs[0].timing.decode == 0
    assert [output.timing for output in outputs[1:-1]] == [None] * (len(outputs) - 2)
    assert timing.queued >= 0
    assert timing.prefill > 0
    assert timing.decode > 0
    assert timing.num_prefill_chunks == 1


@pytest.mark.parametrize("proposer", sorted(PROPOSERS))
@pytest.mark.parametrize(("num_blocks", "budget"), [(300, 64), (300, 9), (24, 64)])
def test_steps_count_the_tokens_that_requests_get_and_the_prompts_behind_a_first_one(
    llama, greedy, num_blocks, budget, proposer
):
    """Whatever the chunks, preemptions and drafts are; a prompt counts once, without what was cached of it."""
    engine = _make_engine(llama, num_blocks=num_blocks, budget=budget, proposer=PROPOSERS[proposer](greedy))
    pending = _requests(_prompts())
    begun: set[str] = set()
    while pending or engine.has_work:
        for request in pending[:2]:
            engine.add(request)
        del pending[:2]
        outputs, _, stats = engine.step()
        assert stats.num_output_tokens == sum(len(output.token_ids) for output in outputs)
        firsts = [output for output in outputs if output.token_ids and output.request_id not in begun]
        begun |= {output.request_id for output in firsts}
        prompts = [len(_prompts()[int(output.request_id)]) - output.num_cached_tokens for output in firsts]
        assert stats.num_first_prompt_tokens == sum(prompts)
    assert len(begun) == len(_prompts())


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_ids_that_have_no_row_in_the_embedding_are_refused_by_the_engine_itself(llama, token_id: int) -> None:
    engine = _make_engine(llama)
    params = SamplingParams(seed=0, max_tokens=1)
    with pytest.raises(ValueError, match="beyond the vocabulary"):
        engine.add(Request(request_id="a", prompt_token_ids=[1, token_id], params=params))
    assert not engine.has_work
