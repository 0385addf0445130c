"""Log-probabilities of sampled and of scored tokens, against torch's log_softmax."""

import math
import random

import pytest
import torch

from engine.sampling.host_sampler import HostSampler
from engine.types import Request, SamplingParams, Scheduled, Sequence, TokenLogprobs

VOCAB_SIZE = 200


def _params(**fields: object) -> SamplingParams:
    return SamplingParams(**{"seed": 1, "max_tokens": 50, "temperature": 0.0, **fields})


def _expected(logits: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    logprobs = logits.log_softmax(-1).tolist()
    order = sorted(range(len(logprobs)), key=lambda token: (-logits[token].item(), token))
    top = [token for token in order[:num_top] if logprobs[token] > -math.inf]
    rank = 1 + sum(value > logits[token_id].item() for value in logits.tolist())
    return TokenLogprobs(token_id, logprobs[token_id], rank, top, [logprobs[token] for token in top])


def _assert_close(found: list[TokenLogprobs] | None, expected: list[TokenLogprobs]) -> None:
    assert found is not None
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.token_id, one.rank, one.top_token_ids) == (other.token_id, other.rank, other.top_token_ids)
        assert [one.logprob, *one.top_logprobs] == pytest.approx([other.logprob, *other.top_logprobs], abs=1e-5)


def _item(params: SamplingParams, prompt: list[int], output: list[int], *, num_scored: int = 0) -> Scheduled:
    seq = Sequence(Request(request_id="r", prompt_token_ids=prompt, params=params), prompt + output)
    seq.num_computed_tokens = seq.num_tokens - 1 - num_scored
    return Scheduled(seq, 1 + num_scored, 0, samples=True, num_scored=num_scored)


@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_logprobs_are_those_of_the_untouched_logits_whatever_changes_the_choice(scale: float) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(30, VOCAB_SIZE) * scale).bfloat16().float()  # with equal values
    logits[:10, 50:] = -math.inf
    fields = {"temperature": 0.8, "logit_bias": {7: 2.0}, "repetition_penalty": 1.3, "top_k": 30, "bad_words": [[9]]}
    items = [_item(_params(logprobs=n % 21, seed=n, **fields), [1, 2], [3]) for n in range(30)]
    for n, (item, result) in enumerate(zip(items, HostSampler(VOCAB_SIZE)(logits, items), strict=True)):
        _assert_close(result.logprobs, [_expected(logits[n], result.token_ids[0], item.seq.params.logprobs)])
        assert result.prompt_logprobs is None


def test_every_emitted_token_has_its_own_and_others_have_none() -> None:
    torch.manual_seed(1)
    sampler = HostSampler(VOCAB_SIZE)
    logits = torch.randn(5, VOCAB_SIZE)
    best = logits.argmax(-1).tolist()
    drafts, parents = [0, best[0], 1, best[2]], [-1, -1, 1, 1]  # the root's second child and then its second child
    item = _item(_params(logprobs=3), [5, 6], [])
    item.seq.draft_token_ids, item.seq.draft_parents = drafts, parents
    item.num_drafts, item.num_new_tokens = 4, 5
    other = _item(_params(), [5], [])
    result, quiet = sampler(torch.cat((logits, logits[:1])), [item, other])
    assert result.accepted == [1, 3]
    assert result.token_ids == [best[0], best[2], best[4]]
    _assert_close(result.logprobs, [_expected(logits[row], best[row], 3) for row in (0, 2, 4)])
    assert quiet.logprobs is None


def test_more_most_likely_tokens_than_there_are_tokens_are_all_tokens() -> None:
    logits = torch.randn(1, 5)
    result = HostSampler(5)(logits, [_item(_params(logprobs=20), [1], [])])[0]
    _assert_close(result.logprobs, [_expected(logits[0], result.token_ids[0], 5)])


@pytest.mark.parametrize("num_top", [0, 4])
def test_a_prompt_in_chunks_is_scored_once_from_its_second_token_on(num_top: int) -> None:
    """Row i of the whole prompt predicts token i + 1; where the chunks end must not show."""
    rng = random.Random(num_top)
    torch.manual_seed(num_top)
    sampler = HostSampler(VOCAB_SIZE)
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(150)]
    logits = torch.randn(len(prompt), VOCAB_SIZE)
    expected = [_expected(logits[i - 1], prompt[i], num_top) for i in range(1, len(prompt))]
    other = _item(_params(logprobs=2), [5], [])
    request = Request(request_id="r", prompt_token_ids=prompt, params=_params(prompt_logprobs=num_top))
    for chunk_size in (150, 70, 3):
        seq = Sequence(request, list(prompt))
        found: list[TokenLogprobs] = []
        while seq.num_computed_tokens < len(prompt):
            start = seq.num_computed_tokens
            end = min(len(prompt), start + chunk_size)
            samples = end == len(prompt)
            item = Scheduled(seq, end - start, 0, samples, num_scored=end - start - samples)
            rows = torch.cat((logits[:1], logits[start:end], logits[:1]))
            result = sampler(rows, [other, item, other])[1]
            assert result.token_ids == ([int(logits[-1].argmax())] if samples else [])
            found += result.prompt_logprobs or []
            seq.num_computed_tokens = end
        _assert_close(found, expected)


def test_a_scored_row_that_is_not_finite_fails_its_request_alone() -> None:
    logits = torch.randn(4, VOCAB_SIZE)
    items = [_item(_params(prompt_logprobs=0), [1, 2], [], num_scored=1) for _ in range(2)]
    logits[2, 5] = math.nan
    good, bad = HostSampler(VOCAB_SIZE)(logits, items)
    assert good.error is None
    assert len(good.prompt_logprobs) == len(good.token_ids) == 1
    assert "not finite" in bad.error
    assert bad.prompt_logprobs is None
