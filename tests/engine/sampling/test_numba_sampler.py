"""The sampler of a CPU on which Numba compiles."""

import numpy as np
import pytest
import torch

from engine.sampling import numba_sampler
from engine.sampling.numba_sampler import NumbaSampler
from engine.sampling.truncation import token_weights
from tests.support.conformance.sampler import SamplerConformance
from tests.support.sampling_cases import chosen_fast, make_item, make_params
from tests.support.stepping import sample


class TestNumbaSampler(SamplerConformance):
    def make(self, vocab_size: int) -> NumbaSampler:
        return NumbaSampler(vocab_size)


class TestNumbaSamplerOnThreads(SamplerConformance):
    """Threads share the rows of every step, however small it is."""

    @pytest.fixture(autouse=True)
    def _share(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(numba_sampler, "SHARED_LOGITS", 0)

    def make(self, vocab_size: int) -> NumbaSampler:
        return NumbaSampler(vocab_size, num_threads=3)


@pytest.mark.usefixtures("one_thread_and_seed")
def test_top_p_that_ends_at_a_winner_among_many_equals_keeps_it_or_not_as_defined() -> None:
    """The compiled sums over equal weights must be as good as what `surely_inside` takes for granted of them."""
    vocab_size = 1 << 17
    sampler = NumbaSampler(vocab_size)
    for seed in range(100):
        logits = torch.full((1, vocab_size), -0.5 - seed / 30)
        logits[0, 5] = 0.0
        (result,) = sample(sampler, logits, [make_item(make_params(seed=seed), prompt=[1])])
        winner, weights = result.token_ids[0], token_weights(-logits[0].numpy())
        share = float((int(weights[:winner].sum()) + (int(weights[5]) if winner < 5 else 0)) / weights.sum())
        for top_p in np.clip([share * 0.9999, share * 0.99995, share * 1.00005], 1e-9, 1.0).tolist():
            item = make_item(make_params(seed=seed, top_p=top_p), prompt=[1])
            assert sample(sampler, logits, [item])[0].token_ids == [chosen_fast(logits[0].numpy(), item)]
