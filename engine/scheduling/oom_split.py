"""The retry of a step that ran out of memory with a smaller batch."""

from __future__ import annotations

from engine.types import Scheduled


def halve_chunks(batch: list[Scheduled]) -> bool:
    """Removes half of the prompt tokens from a batch, in place. False if it has no prompt chunks to shorten.

    The removed tokens stay uncomputed, so that a later step computes them. The first chunks keep theirs; a chunk
    without tokens leaves the batch.
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


def drop_drafts(batch: list[Scheduled]) -> bool:
    """Removes all drafts from a batch, in place: a guess must not cost its request. False if it has none."""
    drafting = [item for item in batch if item.num_drafts]
    for item in drafting:
        _cut(item, _num_verified(item))
    return bool(drafting)


def _num_verified(item: Scheduled) -> int:
    return item.num_new_tokens - item.num_drafts


def _cut(item: Scheduled, num_tokens: int) -> None:
    """Shortens an item to its first rows: rows that score prompt tokens come before the one that samples."""
    item.samples = item.samples and num_tokens == _num_verified(item)
    item.num_new_tokens, item.num_drafts = num_tokens, 0
    item.num_scored = min(item.num_scored, num_tokens)
