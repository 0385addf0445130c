"""Which drafts turned out to be the tokens that were sampled anyway."""

from __future__ import annotations

from engine.types import Scheduled

NO_TOKEN = -1  # instead of a sampled token, where the bans leave none
NOT_FINITE = -2  # instead of a sampled token, where the model's own logits are no numbers


def accept(sampled: list[int], item: Scheduled) -> list[int]:
    """Walks down the tree of drafts as long as a child carries the sampled token. Returns the drafts passed, in order.

    sampled: [1 + num_drafts] the token sampled at the root and after each draft. A draft after which nothing could be
    sampled is not accepted: what is wrong there shows when it is the root, as it would without drafts.
    """
    seq = item.seq
    accepted: list[int] = []
    newest = -1
    # Parents come before their children, so one pass goes all the way down.
    for draft, parent in enumerate(seq.draft_parents[: item.num_drafts]):
        is_next = parent == newest and seq.draft_token_ids[draft] == sampled[newest + 1]
        if is_next and sampled[draft + 1] >= 0:
            accepted.append(draft)
            newest = draft
    return accepted
