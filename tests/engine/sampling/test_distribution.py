"""What is sampled has the distribution that the parameters ask for, over many seeds and over many positions."""

import math

import numpy as np
import pytest
import torch

from engine.sampling.host_sampler import HostSampler
from engine.types import Request, SamplingParams, Scheduled, Sequence
from tests.support.stepping import sample

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, -3.0, 2.0, 1.0, -0.5, 0.7])
NUM_SAMPLES = 12_000
PROMPTS = [[0] * length for length in range(1001)]


def _item(seed: int, prompt_length: int, drafts: list[int], **fields: object) -> Scheduled:
    params = SamplingParams(seed=seed, max_tokens=50, **fields)
    request = Request(request_id="r", prompt_token_ids=PROMPTS[prompt_length], params=params)
    seq = Sequence(request, PROMPTS[prompt_length], num_computed_tokens=prompt_length - 1)
    seq.draft_token_ids, seq.draft_parents = drafts, list(range(-1, len(drafts) - 1))
    return Scheduled(seq, 1 + len(drafts), len(drafts), samples=True)


def _assert_distributed(tokens: list[int], probabilities: np.ndarray) -> None:
    counts = np.bincount(tokens, minlength=len(probabilities))
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * len(tokens)
    degrees = max(1, possible.sum() - 1)
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    # Wilson and Hilferty's cube root, which makes chi-square nearly normal: in standard deviations.
    spread = 2 / (9 * degrees)
    assert ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 4.5


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _filtered(*, temperature: float = 1.0, keep: list[int] | None = None) -> np.ndarray:
    logits = LOGITS.numpy().astype(np.float64) / temperature
    if keep is not None:
        logits[[token for token in range(len(logits)) if token not in keep]] = -math.inf
    return _softmax(logits)


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize(
    ("fields", "probabilities"),
    [
        ({}, _filtered()),
        ({"temperature": 0.5}, _filtered(temperature=0.5)),
        ({"temperature": 2.0}, _filtered(temperature=2.0)),
        ({"top_k": 4}, _filtered(keep=[0, 6, 3, 7])),
        ({"top_p": 0.6}, _filtered(keep=[0, 6, 3])),  # 0.28 + 0.28 < 0.6 <= 0.28 + 0.28 + 0.17
        ({"min_p": 0.2}, _filtered(keep=[0, 6, 3, 7, 9, 2])),  # exp(0.5 - 2) = 0.22, exp(0 - 2) = 0.14
        ({"top_k": 4, "top_p": 0.8}, _filtered(keep=[0, 6, 3])),  # of the four: 0.33 + 0.33 + 0.20 = 0.86
        ({"allowed_token_ids": [1, 5, 8]}, _filtered(keep=[1, 5, 8])),
    ],
)
def test_samples_follow_the_filtered_softmax(vary: str, fields: dict[str, object], probabilities: np.ndarray) -> None:
    sampler = HostSampler(len(LOGITS))
    tokens: list[int] = []
    for start in range(0, NUM_SAMPLES, 2000):
        numbers = range(start, start + 2000)
        if vary == "seed":
            items = [_item(n, 1, [], **fields) for n in numbers]
        else:  # a thousand positions, then the same under another seed
            items = [_item(4 + n // 1000, 1 + n % 1000, [], **fields) for n in numbers]
        tokens += [result.token_ids[0] for result in sample(sampler, LOGITS.repeat(2000, 1), items)]
    _assert_distributed(tokens, probabilities)


def test_drafts_leave_every_token_its_distribution() -> None:
    """With drafts that are accepted now and then: the first token, and the second given the first."""
    sampler = HostSampler(len(LOGITS))
    drafts = [0, 3]
    rows = torch.stack((LOGITS, LOGITS.flip(0), LOGITS))  # what follows token 0 differs from what comes first
    first, second = [], []
    num_accepted = 0
    for start in range(0, NUM_SAMPLES, 1000):
        items = [_item(start + i, 3, drafts) for i in range(1000)]
        for result in sample(sampler, rows.repeat(1000, 1), items):
            first.append(result.token_ids[0])
            second += result.token_ids[1:2]
            num_accepted += len(result.accepted)
    _assert_distributed(first, _filtered())
    _assert_distributed(second, _filtered()[::-1])
    flipped = _filtered()[::-1]
    expected = _filtered()[0] * (1 + flipped[3])  # the acceptance rate of rejection sampling for certain drafts
    assert num_accepted / NUM_SAMPLES == pytest.approx(expected, abs=0.02)
