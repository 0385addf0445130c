"""What a proposer is shown of a step that is over."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from torch import Tensor

from engine.arrays import Ints
from engine.types import Sampled, Scheduled, Sequence

MAX_DEPTH = 64  # of drafts, whatever is configured


class Place(NamedTuple):
    """Where a sequence lay while the step ran: one that ended with it owns nothing any more.

    Until the next step is scheduled, nobody else writes there, and what the prefix cache knows is found there after it.
    """

    block_tables: list[list[int]]
    num_released_blocks: list[int]
    num_computed_tokens: int


class KeptTokens(NamedTuple):
    """Tokens of a sequence whose keys and values a step computed, and which stay: `seq.token_ids[first : first + n]`.

    Those of a prompt chunk, or the newest token and the accepted drafts behind it.
    """

    seq: Sequence
    first: int  # position in the text
    rows: Ints  # [n] of the step, in which each of them was computed
    block_tables: list[list[int]]  # as of `Sequence`, also of one that has ended
    num_released_blocks: list[int]


def places_of(batch: list[Scheduled]) -> list[Place]:
    """Take them before the step's tokens are appended."""
    return [
        Place(seq.block_tables, seq.num_released_blocks, seq.num_computed_tokens)
        for seq in (item.seq for item in batch)
    ]


class VerifiedStep:
    """A step whose tokens were appended, as a proposer sees it. Nothing here is computed before somebody asks.

    A proposer may not see every step: of one that ran in parts, after it had failed or memory had run out, there are
    no hidden states. What it lacks it finds in the sequences, whose tokens are always whole.
    """

    def __init__(
        self,
        batch: list[Scheduled],
        sampled: list[Sampled],
        hidden: Tensor | None,
        *,
        places: list[Place] | None = None,
        left_out: Collection[Sequence] = (),
    ) -> None:
        """hidden: as the proposer's `needs.hidden` ask for it. places: of each item, where all of them are asked for
        left_out: sequences that no drafts are asked for

        max_depth: the longest run of drafts that is worth making now, 0 for none; what the proposer keeps of a text it
        brings up to date all the same
        num_wanted: drafts of a sequence, the likeliest, that may be verified: a tree need not have more
        """
        self.max_depth = self.num_wanted = MAX_DEPTH
        self.seconds_catching_up = 0.0  # that the proposer took for texts that it had not kept up with
        self._batch, self._sampled, self._hidden = batch, sampled, hidden
        self._places, self._left_out = places, left_out

    @cached_property
    def drafting(self) -> list[Sequence]:
        """Sequences that got tokens and go on: those whose drafts are asked for, in the order of the step."""
        pairs = zip(self._batch, self._sampled, strict=True)
        return [item.seq for item, sampled in pairs if self._is_drafted(item, sampled)]

    @cached_property
    def ended(self) -> list[Sequence]:
        """Sequences whose text is complete, without an error."""
        return [item.seq for item in self._batch if item.seq.finish_reason in ("stop", "length")]

    def kept(self) -> list[KeptTokens]:
        """Of every sequence of the step, with prompts that are not complete yet and texts that have just ended."""
        kept = []
        start = 0
        for index, (item, sampled) in enumerate(zip(self._batch, self._sampled, strict=True)):
            seq, num_verified = item.seq, item.num_new_tokens - item.num_drafts
            if sampled.error is None and (not seq.finish_reason or self._places is not None):
                drafts = start + num_verified + np.array(sampled.accepted, dtype=np.int64)
                rows = np.concatenate((np.arange(start, start + num_verified), drafts))
                kept.append(self._kept(index, seq, rows))
            start += item.num_new_tokens
        return kept

    def _kept(self, index: int, seq: Sequence, rows: Ints) -> KeptTokens:
        if not seq.finish_reason:
            return KeptTokens(seq, seq.num_computed_tokens - len(rows), rows, seq.block_tables, seq.num_released_blocks)
        assert self._places is not None
        tables, released, first = self._places[index]
        return KeptTokens(seq, first, rows[: seq.num_tokens - first], tables, released)  # drafts behind a stop are gone

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
            if self._is_drafted(item, sampled)
        ]
        return self._hidden[rows]

    def _is_drafted(self, item: Scheduled, sampled: Sampled) -> bool:
        return bool(sampled.token_ids) and not item.seq.finish_reason and item.seq not in self._left_out
