"""Token counts of one request, as its answer, the log and the metrics give them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_accepted_drafts: int = 0
    num_rejected_drafts: int = 0
