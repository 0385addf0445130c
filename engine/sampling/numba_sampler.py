"""The sampler of a CPU on which Numba compiles: the host's, with most rows in one compiled pass, dealt to threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from engine.arrays import Bools, Floats, Ints
from engine.batch.grammar_masks import GrammarMasks
from engine.batch.step_inputs import RowFacts, SamplingInputs
from engine.sampling.gumbel import TIME_OF_GAP, GumbelRace
from engine.sampling.host_sampler import HostSampler
from engine.sampling.noise import Words, noise_key
from engine.sampling.truncation import Limits, gaps_below, keep_of_first, surely_inside
from kernels.numba.ops.sampling import (
    BLOCK_TOKENS,
    LISTED,
    MAX_LISTED,
    NOT_DECIDED,
    draw_noise,
    mask_rows,
    sample_rows,
    sum_weights,
)

SHARED_LOGITS = 1 << 19  # of a step, from which on threads share its rows: of fewer, waking a thread takes as long


class NumbaRace(GumbelRace):
    """The same race, started in one pass over the vocabulary instead of thirteen."""

    def total_weight(self, gaps: Floats) -> float:
        return float(sum_weights(gaps))

    def _start(self, gaps: Floats, key: Words) -> None:
        draw_noise(gaps, self.words, key[0], key[1], TIME_OF_GAP, self._bits, self._times)


class NumbaSampler(HostSampler):
    """A `HostSampler` whose rows without edits are sampled by compiled code, by all threads.

    What is left to the host: edits, the end of top-k, a very large one, and the second looks of top-p.
    """

    race_class = NumbaRace

    def __init__(self, vocab_size: int, *, num_threads: int = 1) -> None:
        super().__init__(vocab_size)
        self._num_threads = num_threads
        self._facts: _CompiledFacts | None = None
        self._helpers = ThreadPoolExecutor(max(num_threads - 1, 1), thread_name_prefix="sampler")
        self._masked: Floats = np.empty((0, vocab_size), dtype=np.float32)  # kept between steps
        num_blocks = -(-vocab_size // BLOCK_TOKENS)
        self._scratch = [
            (np.empty((2, vocab_size), dtype=np.float32), np.empty(num_blocks, dtype=np.float32))
            for _ in range(num_threads)
        ]

    def _mask(self, logits: Floats, masks: GrammarMasks) -> tuple[Floats, Bools]:
        num_rows = len(logits)
        if len(self._masked) < num_rows:
            self._masked = np.empty((num_rows, self.vocab_size), dtype=np.float32)
        masked, are_finite = self._masked[:num_rows], np.zeros(len(masks.rows), dtype=np.int64)
        places = np.full(num_rows, -1, dtype=np.int64)
        places[masks.rows] = np.arange(len(masks.rows))
        words = masks.words()

        def work(_: int, first: int, last: int) -> None:
            mask_rows(first, last, logits, places, words, masked, are_finite)

        self._share(logits, work)
        return masked, are_finite > 0

    def _share(self, logits: Floats, work: Callable[[int, int, int], None]) -> None:
        """Has each thread, by its number, work on a part of the rows, where there are enough for several."""
        num_threads = self._num_threads if logits.size >= SHARED_LOGITS else 1
        ends = [len(logits) * thread // num_threads for thread in range(num_threads + 1)]
        helping = [
            self._helpers.submit(work, thread, first, last)
            for thread, (first, last) in enumerate(pairwise(ends))
            if thread
        ]
        work(0, *ends[:2])
        for helper in helping:
            helper.result()

    def _sample_rows(self, logits: Floats, inputs: SamplingInputs, newest: Ints) -> Ints:
        facts = self._facts_of(inputs.facts)
        if not facts.has_random:
            return super()._sample_rows(logits, inputs, newest)
        tokens = facts.undecided.copy()
        tokens[[edits.row for edits in inputs.edits]] = NOT_DECIDED
        if not (facts.is_random & (tokens != NOT_DECIDED)).any():
            return super()._sample_rows(logits, inputs, newest)
        num_rows = len(logits)
        keys = np.zeros((num_rows, 2), dtype=np.uint32)
        for row in np.flatnonzero(facts.is_random).tolist():
            keys[row] = noise_key(int(inputs.facts.seeds[row]), int(inputs.positions[row]))
        out = _Rows(num_rows, has_lists=bool(facts.has_list.any()))
        columns = facts.columns

        def work(thread: int, first: int, last: int) -> None:
            scratch, lows = self._scratch[thread]
            logits[first:last].argmax(-1, out=out.best[first:last])
            sample_rows(
                first, last, logits, out.best, self._race.words, keys, columns, TIME_OF_GAP, scratch, lows, tokens,
                out.weights, out.lists, out.counts,
            )  # fmt: skip

        self._share(logits, work)
        for row in np.flatnonzero(tokens == LISTED).tolist():
            tokens[row] = self._among(logits[row], out, row, inputs, keys[row])
        is_left = tokens == NOT_DECIDED
        if facts.has_top_p.any():
            is_left |= (
                facts.has_top_p
                & (tokens >= 0)
                & ~surely_inside(out.weights[:, 0], out.weights[:, 1], inputs.facts.top_ps)
            )
        self._decide(logits, np.flatnonzero(is_left).tolist(), tokens, inputs, newest)
        return tokens

    def _among(self, logits: Floats, out: _Rows, row: int, inputs: SamplingInputs, key: Words) -> int:
        """The sampled token of a row of which the first tokens are listed."""
        facts, listed = inputs.facts, out.lists[row, : out.counts[row]]
        gaps = gaps_below(logits[out.best[row]], logits[listed], facts.temperatures[row])
        limits = Limits(facts.max_gaps[row], int(facts.top_ks[row]), float(facts.top_ps[row]))
        order = gaps.argsort(kind="stable")[: limits.top_k]
        order = order[gaps[order] < np.inf]
        kept = keep_of_first(listed[order], gaps[order], limits)
        return self._race.winner_among(kept, gaps[listed.searchsorted(kept)], key)

    def _facts_of(self, facts: RowFacts) -> _CompiledFacts:
        if self._facts is None or self._facts.facts is not facts:
            self._facts = _CompiledFacts(facts, self.vocab_size)
        return self._facts


class _Rows:
    """What `sample_rows` fills in. Lists only where a row has a top-k."""

    def __init__(self, num_rows: int, *, has_lists: bool) -> None:
        self.best, self.counts = np.empty(num_rows, dtype=np.int64), np.zeros(num_rows, dtype=np.int64)
        self.weights = np.zeros((num_rows, 2), dtype=np.float32)
        self.lists = np.empty((num_rows if has_lists else 1, MAX_LISTED), dtype=np.int64)


class _CompiledFacts:
    """`RowFacts` as `sample_rows` takes them, kept while the sequences of a step stay the same."""

    def __init__(self, facts: RowFacts, vocab_size: int) -> None:
        self.facts = facts
        self.is_random = facts.temperatures > 0
        self.has_random = bool(self.is_random.any())
        has_top_k = self.is_random & (facts.top_ks < vocab_size)
        self.has_list = has_top_k & (facts.top_ks <= -(-vocab_size // BLOCK_TOKENS) // 2)
        self.has_top_p = self.is_random & (facts.top_ps < 1.0) & ~has_top_k
        top_ks = np.where(self.has_list, facts.top_ks, 0)
        columns = (facts.temperatures, facts.max_gaps, self.has_top_p, top_ks)
        self.columns = np.stack(columns, axis=1).astype(np.float32)
        self.undecided = np.where(has_top_k & ~self.has_list, NOT_DECIDED, 0)
