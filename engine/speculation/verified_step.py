"""What a proposer is shown of a step that is over."""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from torch import Tensor

from engine.arrays import Ints
from engine.types import Sampled, Scheduled, Sequence

MAX_DEPTH = 64  # of drafts, whatever is configured


class KeptTokens(NamedTuple):
    """Tokens of a sequence whose keys and values a step computed, and which stay: `seq.token_ids[first : first + n]`.

    Those of a prompt chunk, or the newest token and the accepted drafts behind it.
    """

    seq: Sequence
    first: int  # position in the text
    rows: Ints  # [n] of the step, in which each of them was computed


class VerifiedStep:
    """A step whose tokens were appended, as a proposer sees it. Nothing here is computed before somebody asks.

    A proposer may not see every step: of one that ran in parts, after it had failed or memory had run out, there are
    no hidden states. What it lacks it finds in the sequences, whose tokens are always whole.
    """

    def __init__(self, batch: list[Scheduled], sampled: list[Sampled], hidden: Tensor | None) -> None:
        """hidden: as the proposer's `needs.hidden` ask for it

        max_depth: the longest run of drafts that is worth making now, 0 for none; what the proposer keeps of a text it
        brings up to date all the same
        num_wanted: drafts of a sequence, the likeliest, that may be verified: a tree need not have more
        """
        self.max_depth = self.num_wanted = MAX_DEPTH
        self.seconds_catching_up = 0.0  # that the proposer took for texts that it had not kept up with
        self._batch, self._sampled, self._hidden = batch, sampled, hidden

    @cached_property
    def drafting(self) -> list[Sequence]:
        """Sequences that got tokens and go on: those whose drafts are asked for, in the order of the step."""
        return [
            item.seq
            for item, sampled in zip(self._batch, self._sampled, strict=True)
            if sampled.token_ids and not item.seq.finish_reason
        ]

    def kept(self) -> list[KeptTokens]:
        """Of every sequence of the step that goes on, prompts that are not complete yet among them."""
        kept = []
        start = 0
        for item, sampled in zip(self._batch, self._sampled, strict=True):
            num_verified = item.num_new_tokens - item.num_drafts
            if not item.seq.finish_reason and sampled.error is None:
                drafts = start + num_verified + np.array(sampled.accepted, dtype=np.int64)
                rows = np.concatenate((np.arange(start, start + num_verified), drafts))
                kept.append(KeptTokens(item.seq, item.seq.num_computed_tokens - len(rows), rows))
            start += item.num_new_tokens
        return kept

    def hidden(self) -> Tensor:
        """The target's hidden states in all rows of the step. [num_tokens, features], as of `Model.forward`"""
        assert self._hidden is not None, "the proposer's needs say `all`"
        return self._hidden

    def newest_hidden(self) -> Tensor:
        """Those in the rows that the newest tokens of `drafting` were sampled from. [len(drafting), features]"""
        assert self._hidden is not None, "the proposer's needs say `newest`"
        ends = accumulate((item.num_logits for item in self._batch), initial=0)
        rows = [
            start + item.num_scored + (sampled.accepted[-1] + 1 if sampled.accepted else 0)
            for start, item, sampled in zip(ends, self._batch, self._sampled, strict=False)
            if sampled.token_ids and not item.seq.finish_reason
        ]
        return self._hidden[rows]
