"""The sampler of a CPU on which Numba compiles."""

from engine.sampling.numba_sampler import NumbaSampler
from tests.support.conformance.sampler import SamplerConformance


class TestNumbaSampler(SamplerConformance):
    def make(self, vocab_size: int) -> NumbaSampler:
        return NumbaSampler(vocab_size)
