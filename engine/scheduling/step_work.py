"""What a step computes, counted: of steps that run, and of those that are being planned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from engine.types import Scheduled


class StepWork(NamedTuple):
    """num_kv_tokens: that are in the cache when the step is over; num_pairs: of a new token and one that it sees;
    drafts: of the sequences that have any; num_prompt_tokens: of sequences that lack more than their newest token"""

    num_tokens: int
    num_logits: int
    num_kv_tokens: int
    num_pairs: int
    drafts: list[int]
    num_prompt_tokens: int = 0

    def with_chunk(self, num_computed: int, num_new_tokens: int, num_logits: int = 0) -> StepWork:
        """The same with a chunk of a prompt beside it, of which so many tokens were computed before."""
        return StepWork(
            self.num_tokens + num_new_tokens,
            self.num_logits + num_logits,
            self.num_kv_tokens + num_computed + num_new_tokens,
            self.num_pairs + num_pairs(num_computed, num_new_tokens),
            self.drafts,
            self.num_prompt_tokens + num_new_tokens,
        )


def num_pairs(num_computed: int, num_new_tokens: int) -> int:
    """Pairs of one of a sequence's new tokens and one that it sees, itself included; half a token's worth too many."""
    return num_new_tokens * (num_computed + (num_new_tokens + 1) // 2)


def count_work(batch: Iterable[Scheduled]) -> StepWork:
    """Counts what a step will compute. To be called before the step changes the sequences."""
    num_tokens = num_logits = num_kv_tokens = num_all_pairs = num_prompt_tokens = 0
    drafts: list[int] = []
    for item in batch:
        num_new_tokens, computed = item.num_new_tokens, item.num_computed_tokens
        num_tokens += num_new_tokens
        num_kv_tokens += computed + num_new_tokens
        num_all_pairs += num_pairs(computed, num_new_tokens)
        num_logits += item.num_scored + item.samples
        if item.num_drafts:
            drafts.append(item.num_drafts)
        num_own_tokens = num_new_tokens - item.num_drafts
        if num_own_tokens > 1 or not item.samples:
            num_prompt_tokens += num_own_tokens
    return StepWork(num_tokens, num_logits + sum(drafts), num_kv_tokens, num_all_pairs, drafts, num_prompt_tokens)
