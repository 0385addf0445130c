"""What bounds a step, and a sequence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """The budgets of a step, and what bounds a sequence.

    max_num_batched_tokens: tokens that a step computes, at most. max_num_logits: rows of logits among them; None: one
    for each. headroom: output tokens per sequence for which room is kept free when another is admitted.

    min_prompt_share: prompt tokens that a step computes even while others decode; None: as many as the budget allows.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_num_logits: int | None = None
    min_prompt_share: int | None = None
    num_lookahead_tokens: int = 0
    headroom: int = 64

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"scheduler.max_num_batched_tokens is {self.max_num_batched_tokens}, but scheduler.max_num_seqs is "
                f"{self.max_num_seqs}: each running request needs a token per step; raise the first or lower the second"
            )
        if self.max_num_logits is not None and self.max_num_logits < self.max_num_seqs:
            raise ValueError(f"{self.max_num_logits} rows of logits are too few for {self.max_num_seqs} requests")

    @property
    def num_logits_rows(self) -> int:
        """Rows of logits that a step may have."""
        return self.max_num_batched_tokens if self.max_num_logits is None else self.max_num_logits
