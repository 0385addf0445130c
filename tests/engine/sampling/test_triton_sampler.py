"""The sampler of a GPU against the sampler of the host: everything a request can ask for, in the same batches."""

import math
import random

import pytest
import torch

from engine.sampling.host_sampler import HostSampler
from engine.sampling.triton_sampler import TritonSampler
from engine.types import Request, Sampled, SamplingParams, Scheduled, Sequence
from kernels.triton.sampling import grammar_masks, token_scores
from kernels.triton.sampling import sample_tokens as sampling
from tests.support.stepping import sample

pytestmark = [
    pytest.mark.usefixtures("one_thread_and_seed"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # to infinity, as it should
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # where logits are no numbers
]
VOCAB_SIZE = 90


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_TOKENS_AT_ONCE", 64)
    monkeypatch.setattr(token_scores, "_TOKENS_AT_ONCE", 64)
    monkeypatch.setattr(grammar_masks, "_TOKENS_AT_ONCE", 64)


def _tokens(rng: random.Random, least: int, most: int) -> list[int]:
    return [rng.randrange(12) for _ in range(rng.randint(least, most))]


def _params(rng: random.Random) -> SamplingParams:
    def maybe(probability: float, value: object, otherwise: object) -> object:
        return value if rng.random() < probability else otherwise

    return SamplingParams(
        seed=rng.getrandbits(63),
        max_tokens=100,
        temperature=rng.choice([0.0, 0.7, 1.0, 3.0]),
        top_p=maybe(0.4, rng.choice([0.3, 0.9]), 1.0),
        top_k=maybe(0.4, rng.choice([1, 5, 40]), 0),
        min_p=maybe(0.3, 0.05, 0.0),
        frequency_penalty=maybe(0.4, rng.uniform(-2, 2), 0.0),
        presence_penalty=maybe(0.4, rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(0.4, rng.uniform(0.5, 2), 1.0),
        logit_bias=maybe(0.3, {3: 2.5, 7: -100.0, 80: 4.0}, {}),
        allowed_token_ids=maybe(0.2, list(range(0, VOCAB_SIZE, 3)), None),
        bad_words=maybe(0.3, [[4], [3, 5], [1, 2, 0]], []),
        stop_token_ids=maybe(0.5, [0, 6, VOCAB_SIZE + 5], []),
        min_tokens=maybe(0.5, 5, 0),
        logprobs=maybe(0.5, rng.choice([0, 4]), None),
        prompt_logprobs=maybe(0.3, rng.choice([0, 2]), None),
    )


def _sequence(rng: random.Random) -> Sequence:
    prompt = _tokens(rng, 4, 9)
    request = Request(request_id="r", prompt_token_ids=prompt, params=_params(rng))
    return Sequence(request, prompt + _tokens(rng, 0, 4))


def _scheduled(rng: random.Random, seq: Sequence) -> Scheduled:
    """A step of the sequence: with drafts or without, sometimes with prompt tokens to score."""
    seq.draft_token_ids = [rng.randrange(3) for _ in range(rng.choice([0, 1, 3]))]
    seq.draft_parents = [rng.randrange(-1, i) for i in range(len(seq.draft_token_ids))]
    num_drafts = len(seq.draft_token_ids)
    num_scored = 2 if seq.params.prompt_logprobs is not None and not seq.num_output_tokens else 0
    seq.num_computed_tokens = seq.num_tokens - 1 - num_scored
    return Scheduled(seq, 1 + num_scored + num_drafts, num_drafts, samples=True, num_scored=num_scored)


def _assert_same(found: list[Sampled], expected: list[Sampled]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.accepted, one.error) == (other.token_ids, other.accepted, other.error)
        for found_logprobs, expected_logprobs in (
            (one.logprobs, other.logprobs),
            (one.prompt_logprobs, other.prompt_logprobs),
        ):
            assert (found_logprobs is None) == (expected_logprobs is None)
            for a, b in zip(found_logprobs or [], expected_logprobs or [], strict=True):
                assert (a.token_id, a.rank, a.top_token_ids) == (b.token_id, b.rank, b.top_token_ids)
                assert [a.logprob, *a.top_logprobs] == pytest.approx([b.logprob, *b.top_logprobs], abs=1e-5)


def test_sequences_that_grow_step_by_step_get_the_host_s_tokens(device: torch.device) -> None:
    """Sequences come and go, so that states of penalties are made, grown and used again."""
    rng = random.Random(0)
    on_device, on_host = TritonSampler(VOCAB_SIZE), HostSampler(VOCAB_SIZE)
    seqs = [_sequence(rng) for _ in range(4)]
    num_accepted = 0
    for _ in range(5):
        batch = [_scheduled(rng, seq) for seq in seqs]
        logits = 2 * torch.randn(sum(item.num_logits for item in batch), VOCAB_SIZE)
        logits[:, :12] += 2.0  # where the history is
        logits[:, :3] += 3.0  # and the drafts
        before = logits.to(device, copy=True)
        found = sample(on_device, before, batch)
        assert torch.equal(before.cpu(), logits)
        expected = sample(on_host, logits, batch)
        _assert_same(found, expected)
        for seq, result in zip(seqs, expected, strict=True):
            seq.token_ids += result.token_ids
            num_accepted += len(result.accepted)
        del batch
        seqs[rng.randrange(len(seqs))] = _sequence(rng)
        seqs.append(_sequence(rng))
        seqs = rng.sample(seqs, len(seqs))[:5]
    assert num_accepted > 4


def test_what_cannot_be_sampled_fails_alone_and_says_why(device: torch.device) -> None:
    def item(**fields: object) -> Scheduled:
        params = SamplingParams(**{"seed": 1, "max_tokens": 9, "temperature": 0.0, "logprobs": 1, **fields})
        return Scheduled(
            Sequence(Request(request_id="r", prompt_token_ids=[1], params=params), [1]), 1, 0, samples=True
        )

    plain = [item() for _ in range(4)]
    logits = torch.randn(4, VOCAB_SIZE)
    logits[1, 3], logits[2, 5], logits[3] = math.nan, math.inf, -math.inf
    nowhere = item(allowed_token_ids=[3], bad_words=[[3]])
    hidden = item(bad_words=[[5]])  # the ban hides the infinity, not that the model is broken
    for batch, rows in ((plain, [0, 1, 2, 3]), ([*plain, nowhere, hidden], [0, 1, 2, 3, 0, 2])):
        found = sample(TritonSampler(VOCAB_SIZE), logits[rows].to(device), batch)
        _assert_same(found, sample(HostSampler(VOCAB_SIZE), logits[rows], batch))
        assert [result.error is None for result in found] == [True] + [False] * (len(batch) - 1)
    assert "no token is allowed" in found[4].error


def test_chunks_that_do_not_sample_get_nothing(device: torch.device) -> None:
    params = SamplingParams(seed=1, max_tokens=9)
    chunk = Scheduled(
        Sequence(Request(request_id="r", prompt_token_ids=[1, 2, 3], params=params), [1, 2, 3]), 2, 0, False
    )
    assert sample(TritonSampler(VOCAB_SIZE), torch.empty(0, VOCAB_SIZE, device=device), [chunk]) == [Sampled([])]


def test_a_batch_that_goes_on_unchanged_takes_new_noise_each_step(device: torch.device) -> None:
    params = SamplingParams(seed=3, max_tokens=9)
    seq = Sequence(Request(request_id="r", prompt_token_ids=[1], params=params), [1])
    sampler, logits = TritonSampler(VOCAB_SIZE), torch.zeros(1, VOCAB_SIZE)
    tokens = []
    for step in range(6):
        seq.num_computed_tokens = step
        batch = [Scheduled(seq, 1, 0, samples=True)]
        tokens += sample(sampler, logits.to(device), batch)[0].token_ids
        assert tokens[-1:] == sample(HostSampler(VOCAB_SIZE), logits, batch)[0].token_ids
        seq.token_ids.append(tokens[-1])
    assert len(set(tokens)) > 3


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8])
def test_any_number_of_rows_is_sampled_by_the_same_compiled_kernel(
    device: torch.device, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton compiles one more for addresses that are no multiples of 16 bytes: for a second, while requests wait."""
    addresses: list[int] = []

    def record(*arguments: torch.Tensor, **settings: int) -> torch.Tensor:
        addresses.extend(argument.data_ptr() for argument in arguments)
        return torch.zeros(num_rows, dtype=torch.int64, device=device)

    monkeypatch.setattr("engine.sampling.triton_sampler.sample_tokens", record)
    params = SamplingParams(seed=3, max_tokens=9, presence_penalty=0.5)
    seqs = [Sequence(Request(request_id="r", prompt_token_ids=[1], params=params), [1]) for _ in range(num_rows)]
    batch = [Scheduled(seq, 1, 0, samples=True) for seq in seqs]
    sample(TritonSampler(VOCAB_SIZE), torch.zeros(num_rows, VOCAB_SIZE, device=device), batch)
    assert len(addresses) == 6
    assert all(address % 16 == 0 for address in addresses)
