"""Which drafts turned out to be the tokens that were sampled anyway."""

from __future__ import annotations

NO_TOKEN = -1  # instead of a sampled token, where the bans leave none
NOT_FINITE = -2  # instead of a sampled token, where the model's own logits are no numbers


def accept(sampled: list[int], tokens: list[int], parents: list[int]) -> list[int]:
    """Walks down the tree of drafts as long as a child carries the sampled token. Returns the drafts passed, in order.

    sampled: [1 + num_drafts] the token sampled at the root and after each draft; tokens, parents: [num_drafts]. A draft
    after which nothing could be sampled is not accepted: what is wrong there shows when it is the root, as it would
    without drafts.
    """
    accepted: list[int] = []
    newest = -1
    # Parents come before their children, so one pass goes all the way down.
    for draft, parent in enumerate(parents):
        if parent == newest and tokens[draft] == sampled[newest + 1] and sampled[draft + 1] >= 0:
            accepted.append(draft)
            newest = draft
    return accepted
