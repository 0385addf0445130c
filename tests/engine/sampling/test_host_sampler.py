"""The sampler of a CPU."""

import random

import pytest

from engine.sampling.host_sampler import HostSampler
from tests.support.conformance.sampler import SamplerConformance
from tests.support.sampling_cases import make_item, make_params, random_logits
from tests.support.stepping import sample


class TestHostSampler(SamplerConformance):
    def make(self, vocab_size: int) -> HostSampler:
        return HostSampler(vocab_size)


@pytest.mark.usefixtures("one_thread_and_seed")
def test_a_top_k_of_many_tokens_keeps_the_same_ones_without_sorting_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(6)
    for _ in range(400):
        vocab_size = rng.choice([2, 7, 60, 300])
        fields = {
            "top_k": rng.randrange(1, vocab_size + 2),
            "top_p": rng.choice([1.0, 0.9, 0.5, 1e-9]),
            "min_p": rng.choice([0.0, 0.0, 0.1]),
            "temperature": rng.choice([0.3, 1.0, 2.0]),
        }
        items = [make_item(make_params(**fields, seed=rng.getrandbits(40)), prompt=[1]) for _ in range(4)]
        logits = random_logits(rng, 4, vocab_size)
        listed = sample(HostSampler(vocab_size), logits, items)
        with monkeypatch.context() as patch:
            patch.setattr("engine.sampling.host_sampler.FEW_TOKENS", 0)
            assert sample(HostSampler(vocab_size), logits, items) == listed
