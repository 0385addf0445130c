"""What the token ids of a draft model are to its target: the same, but for special tokens that one of them lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MAX_DIFFERENT = 0.01  # of the tokens: more, and it is another vocabulary


@dataclass(frozen=True, slots=True)
class TokenMap:
    """Ids that differ; all others are alike. Negative ones have no counterpart.

    vocab_size: of the draft model
    """

    vocab_size: int
    to_draft: Mapping[int, int]
    to_target: Mapping[int, int]

    def of_draft(self, token_ids: list[int]) -> list[int]:
        """Tokens of the target as the draft model's. One that it lacks is its token 0, after which it guesses badly."""
        if self.to_draft:
            token_ids = [self.to_draft.get(token_id, token_id) for token_id in token_ids]
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            return [token_id if 0 <= token_id < self.vocab_size else 0 for token_id in token_ids]
        return list(token_ids)


def map_tokens(target: Mapping[str, int], draft: Mapping[str, int], vocab_size: int, *, target_size: int) -> TokenMap:
    """From what each tokeniser calls its tokens. ValueError where more than a few differ.

    vocab_size: ids that the draft model can compute; target_size: those of its target. Models compute more than there
    are tokens, and not the same number
    """
    to_draft = {number: draft.get(text, -1) for text, number in target.items() if draft.get(text, -1) != number}
    to_target = {number: target.get(text, -1) for text, number in draft.items() if target.get(text, -1) != number}
    num_shared = len(target) - sum(other < 0 for other in to_draft.values())
    most = MAX_DIFFERENT * len(target)
    if len(to_draft) > most or len(to_target) > most:
        raise ValueError(
            f"the draft model has another vocabulary: of the target's {len(target):,} tokens and its {len(draft):,}, "
            f"{num_shared:,} are the same text and {len(target) - len(to_draft):,} have the same id; choose a draft "
            "model of the target's own family"
        )
    computed = {number: to_target.get(number, number) for number in range(target_size, vocab_size)} | to_target
    to_target = {number: other if other < target_size else -1 for number, other in computed.items()}
    return TokenMap(vocab_size, to_draft, to_target)
