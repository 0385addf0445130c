"""The batch of a step while the scheduler makes it, and what is left of the step's budgets."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.scheduling.prompt_pacing import StepPace
from engine.types import Scheduled, Sequence

MAX_NUM_HASHES = 2048  # KV blocks that a step hashes to find prefixes, while others run who wait for it: about 2 ms


@dataclass(slots=True)
class StepPlan:
    """What runs, and what there is room for."""

    budget: int  # tokens that are left
    num_logits: int  # rows of logits that are left
    num_to_come: int  # sequences that run, or may start, and have had no turn yet: a row of logits is kept for each
    num_spare_blocks: int | None = None  # free ones that drafts may take; None: nobody has asked yet
    num_hashes: int = MAX_NUM_HASHES  # blocks that may still be hashed
    items: dict[int, Scheduled] = field(default_factory=dict)  # by arrival
    pace: StepPace | None = None  # of prompts; None: the budget alone bounds them

    def room_for(self, seq: Sequence) -> int:
        """Tokens of a prompt for which there is room. Where it lacks more, none is left for others."""
        if self.pace is None or self.budget <= 0 or not seq.block_tables:
            return self.budget
        most = min(seq.num_tokens - seq.num_computed_tokens, self.budget)
        room = self.pace.room(seq, seq.num_computed_tokens, most)
        if room < most:
            self.budget = room
        return self.budget

    def add(self, item: Scheduled) -> None:
        self.items[item.seq.arrival] = item
        self.budget -= item.num_new_tokens
        self.num_logits -= item.num_logits

    def drop(self, seq: Sequence) -> None:
        item = self.items.pop(seq.arrival, None)
        if item is not None:
            self.budget += item.num_new_tokens
            self.num_logits += item.num_logits
