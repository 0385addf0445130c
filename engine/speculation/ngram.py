"""Drafts copied from the text itself: what followed the last time that the newest tokens were seen.

Prompt lookup decoding (Saxena 2023); the idea of copying from a reference text is that of LLMA (Yang et al. 2023,
"Inference with reference", section 3). It needs no model, and pays where the output repeats the input: editing,
summarising, code, retrieval.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from engine.config import SpeculationConfig
from engine.speculation.proposer import ProposerContext, ProposerNeeds, TargetShape, draft_budget, most_drafts
from engine.speculation.verified_step import VerifiedStep
from engine.types import Sequence

MAX_INDEXED_PER_STEP = 2048  # tokens of all sequences together: five milliseconds; long prompts take several steps


class NgramProposer:
    """Looks up the newest n tokens, longest n first, and copies what followed their most recent earlier occurrence.

    Where the copy reaches the end of the text it goes on with what it has copied, so that text with a period, however
    short, is drafted in full.
    """

    def __init__(self, *, num_drafts: int, ngram_min: int, ngram_max: int) -> None:
        assert 1 <= ngram_min <= ngram_max
        self.needs = ProposerNeeds(num_drafts=num_drafts)
        self._num_drafts = num_drafts
        self._lengths = range(ngram_max, ngram_min - 1, -1)
        self._indices: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()

    @classmethod
    def from_config(cls, config: SpeculationConfig, context: ProposerContext) -> NgramProposer:
        return cls(num_drafts=most_drafts(config), ngram_min=config.ngram_min, ngram_max=config.ngram_max)

    @classmethod
    def needs_of(cls, config: SpeculationConfig, target: TargetShape) -> ProposerNeeds:
        return ProposerNeeds(num_drafts=most_drafts(config))

    def propose(self, step: VerifiedStep) -> None:
        self._index([seq for seq in step.drafting if draft_budget(seq, self._num_drafts)])
        for seq in step.drafting:
            drafts, length = self._drafts(seq, min(self._num_drafts, step.max_depth))
            seq.draft_run(drafts, [length / (length + 1)] * len(drafts))

    def _index(self, seqs: list[Sequence]) -> None:
        """Indexes what a step has time for, of those first who lack least: a long prompt keeps nobody waiting."""
        indices = [(self._index_of(seq), seq) for seq in seqs]
        num_left = MAX_INDEXED_PER_STEP
        for index, seq in sorted(indices, key=lambda pair: pair[1].num_tokens - pair[0].num_indexed_tokens):
            num_left -= index.extend(seq.token_ids, num_left)

    def _index_of(self, seq: Sequence) -> NgramIndex:
        index = self._indices.get(seq)
        if index is None or index.num_indexed_tokens > seq.num_tokens:
            index = self._indices[seq] = NgramIndex(self._lengths)
        return index

    def _drafts(self, seq: Sequence, num_drafts: int) -> tuple[list[int], int]:
        """The copy, and the length of the n-gram that it follows."""
        budget = draft_budget(seq, num_drafts)
        found = self._indices[seq].find_continuation(seq.token_ids) if budget else None
        if found is None:
            return [], 0
        start, length = found
        copied = seq.token_ids[start : start + budget]
        period = seq.num_tokens - start
        for i in range(len(copied), budget):
            copied.append(copied[i - period])
        return copied, length


class NgramIndex:
    """Where each n-gram of a growing text was seen last. Every token is indexed once, whatever the text's length."""

    def __init__(self, lengths: range) -> None:
        """lengths: the n of the n-grams, in the order in which they are tried"""
        self._continuations: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in lengths}
        self.num_indexed_tokens = 0

    def find_continuation(self, token_ids: list[int]) -> tuple[int, int] | None:
        """The index of the token that followed the last occurrence of the newest tokens, and how many they are. None:
        they are new, as far as the text is indexed."""
        for length, continuations in self._continuations.items():
            if (found := continuations.get(tuple(token_ids[-length:]))) is not None:
                return found, length
        return None

    def extend(self, token_ids: list[int], max_num_tokens: int) -> int:
        """Indexes every n-gram that some token follows, of at most so many tokens more; returns of how many.

        token_ids: what was given the last time, and any number of tokens more.
        """
        num_before = self.num_indexed_tokens
        num_tokens = min(len(token_ids), num_before + max(max_num_tokens, 0))
        for length, continuations in self._continuations.items():
            for end in range(max(self.num_indexed_tokens, length), num_tokens):
                continuations[tuple(token_ids[end - length : end])] = end
        self.num_indexed_tokens = num_tokens
        return num_tokens - num_before
