"""Smaller steps, for when a step ran out of memory."""

from __future__ import annotations

from engine.types import Scheduled


def halve_chunks(batch: list[Scheduled]) -> bool:
    """Leaves out half of the prompt tokens of a step, in place. False where only tokens are left that cannot wait.

    What is left out is not computed yet, as far as anybody knows, so that a later step takes it up. The chunks that
    come first keep theirs; a chunk of which nothing is left leaves the batch.
    """
    chunks = [item for item in batch if _num_verified(item) > 1]
    budget = sum(map(_num_verified, chunks)) // 2
    for item in chunks:
        num_tokens = min(_num_verified(item), budget)
        budget -= num_tokens
        if num_tokens:
            _cut(item, num_tokens)
        else:
            batch.remove(item)
    return bool(chunks)


def _num_verified(item: Scheduled) -> int:
    return item.num_new_tokens - item.num_drafts


def _cut(item: Scheduled, num_tokens: int) -> None:
    """Keeps the first rows; those that score prompt tokens come before the one that samples."""
    item.samples = item.samples and num_tokens == _num_verified(item)
    item.num_new_tokens, item.num_drafts = num_tokens, 0
    item.num_scored = min(item.num_scored, num_tokens)
