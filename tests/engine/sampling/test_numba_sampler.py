"""The sampler of a CPU on which Numba compiles."""

import pytest

from engine.sampling import numba_sampler
from engine.sampling.numba_sampler import NumbaSampler
from tests.support.conformance.sampler import SamplerConformance


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
