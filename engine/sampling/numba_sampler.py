"""The sampler of a CPU on which Numba compiles: the host's, with its two longest passes in one loop each."""

from __future__ import annotations

from engine.arrays import Floats
from engine.sampling.gumbel import TIME_OF_GAP, GumbelRace
from engine.sampling.host_sampler import HostSampler
from engine.sampling.noise import Words
from kernels.numba.ops.sampling import draw_noise, sum_weights


class NumbaRace(GumbelRace):
    """The same race, started in one pass over the vocabulary instead of thirteen."""

    def total_weight(self, gaps: Floats) -> float:
        return float(sum_weights(gaps))

    def _start(self, gaps: Floats, key: Words) -> None:
        draw_noise(gaps, self._words, key[0], key[1], TIME_OF_GAP, self._bits, self._times)


class NumbaSampler(HostSampler):
    """A `HostSampler` that runs this race."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size, NumbaRace(vocab_size))
