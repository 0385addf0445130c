"""How many drafts are worth proposing."""

from __future__ import annotations

from engine.types import Sequence


def draft_budget(seq: Sequence, configured: int) -> int:
    """The longest run of drafts for a sequence: what is configured, or fewer where its request asks for fewer.

    Never more than configured, which memory and kernels were planned for. Never more than max_tokens leaves room for,
    given that the step that verifies adds a token of its own.
    """
    asked = configured if seq.params.num_drafts is None else min(seq.params.num_drafts, configured)
    return max(0, min(asked, seq.params.max_tokens - seq.num_output_tokens - 1))
