"""The inputs of one step: arrays on the host, and nothing else.

A step is *plan -> inputs -> executor -> result*. The scheduler's plan names sequences; these inputs do not, so that
an executor can run in another process, on several devices, or from a file (`engine.replay`). What stays the same from
step to step is the same object (`RowFacts`, `TokenEdits`): its identity is its version, and an executor keeps what it
made of it.

Shapes use: num_tokens (rows of the model), num_seqs, num_logits (rows whose logits are wanted), num_sampled (rows
of logits that a token is sampled from: of each sequence that samples the root, then one per draft).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.arrays import Bools, Floats, Ints
from engine.batch.grammar_masks import GrammarMasks

KNOWN = -1  # as a token's source: the host knows the token


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What does not change about the sampled rows while the sequences stay the same. [num_sampled] each

    edits_before: the position before which a row's logits are edited (penalties, bias, bans); infinity: always
    seq_of_row: the row's sequence, as its place among those that sample
    """

    seeds: NDArray[np.uint64]
    temperatures: Floats  # 0 is greedy
    max_gaps: Floats  # of min-p, infinity is off: see `engine.sampling.truncation`
    top_ks: Ints  # the vocabulary's size is off
    top_ps: NDArray[np.float64]  # 1 is off
    edits_before: NDArray[np.float64]
    seq_of_row: Ints


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class TokenEdits:
    """Bias and allowed tokens of one request, made once.

    biased, biases: [num_biased] token ids, and what is added to their logits
    forbidden: [vocab_size] every token but the allowed ones; None where all are allowed
    """

    biased: Ints
    biases: Floats
    forbidden: Bools | None


@dataclass(frozen=True, slots=True)
class PenaltyInputs:
    """The penalties of one row.

    token_ids, counts: the distinct tokens of the text and their occurrences in the output; None where an executor
    counts itself (`CountChanges`)
    """

    repetition: float
    frequency: float
    presence: float
    token_ids: Ints | None = None
    counts: Ints | None = None


@dataclass(frozen=True, slots=True)
class RowEdits:
    """How the logits of one sampled row change before its token is chosen, in this order.

    banned: token ids that must not come. banned_after: [num, 2] (token, banned): the second must not come if the text's
    newest token, which the step before samples in its row `source`, is the first
    """

    row: int  # among the sampled rows
    penalties: PenaltyInputs | None
    tokens: TokenEdits
    banned: Ints
    banned_after: Ints | None = None
    source: int = KNOWN


@dataclass(frozen=True, slots=True)
class CountChanges:
    """What a step changes in the token counts that an executor keeps, in this order, before penalties are applied.

    A *state* is a row of counts, one per token of the vocabulary; state 0 is of all rows without penalties, and is not
    read. `fresh` states begin with nothing. Prompt and output tokens are pairs (state, token), and `newest` pairs
    (state, sampled row of the step before) of tokens that only the device knows. Rows behind drafts read a copy
    (`copies`: pairs of source and target), to which `behind_drafts` adds the drafts on their path.
    """

    states: Ints  # [num_sampled] the state of each row
    num_states: int  # that there are now
    fresh: Ints  # [n]
    in_prompt: Ints  # [n, 2]
    in_output: Ints
    newest: Ints
    copies: Ints
    behind_drafts: Ints


@dataclass(frozen=True, slots=True)
class LogprobInputs:
    """Which rows of logits are reported on, in the order of the sequences: those that score prompts, then the sampled.

    tokens: [num_logits] the prompt token that follows each row, 0 for sampled rows, whose token is the sampled one
    """

    rows: Ints  # [num_queries]
    num_top: Ints  # [num_queries] most likely tokens that are listed beside the one that came
    tokens: Ints


@dataclass(frozen=True, slots=True)
class TypicalInputs:
    """Drafts that are kept if they are likely enough (`engine.sampling.typical`), whatever is sampled.

    rows: [num_rows] the sampled rows that they are judged by, each once. Of each draft, [num_drafts]: the place in
    `rows` of the one that it follows; the sampled row behind it; its token
    """

    rows: Ints
    places: Ints
    drafts: Ints
    tokens: Ints
    threshold: float
    alpha: float


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """What decides the tokens of a step's sampled rows."""

    logits_rows: Ints  # [num_sampled] among the step's logits
    positions: Ints  # [num_sampled] the index in its sequence that the row's token will have
    facts: RowFacts
    edits: tuple[RowEdits, ...] = ()
    counts: CountChanges | None = None
    logprobs: LogprobInputs | None = None
    typical: TypicalInputs | None = None
    masks: GrammarMasks | None = None  # of the rows that follow a grammar

    @property
    def num_rows(self) -> int:
        return len(self.logits_rows)


@dataclass(frozen=True, slots=True)
class SequenceInputs:
    """What the result of a step is told by. [num_seqs] each

    draft_parents: of the drafts of all sequences, one after the other: the index of the draft that it follows in its
    sequence, or -1. The draft tokens are the sequence's last input ids
    """

    num_scored: Ints  # rows of logits that only score prompt tokens
    num_sampled: Ints  # rows of logits that are sampled: none, or 1 + drafts
    wants_logprobs: Bools
    draft_parents: Ints

    @property
    def num_drafts(self) -> Ints:
        """Rows behind the root of each sequence."""
        drafts: Ints = np.maximum(self.num_sampled - 1, 0)
        return drafts


@dataclass(frozen=True, slots=True)
class PoolingInputs:
    """Sequences whose hidden states are summed, each to one vector: a part of an embedding. [num_pooled] each

    Sums are what chunks of a prompt can be added up by. `StepInputs.hidden_rows` then has all rows.

    seqs: places in the step. firsts, ends: the rows of the model from the first one up to the end
    shown: among the rows, those that whoever else looks at hidden states is shown; None: all
    """

    seqs: Ints
    firsts: Ints
    ends: Ints
    shown: Ints | None


@dataclass(frozen=True, slots=True)
class TableChanges:
    """Block-table entries to set before a step, in this order: tables are kept by the executor.

    entries: [n, 3] (row, column, block). num_rows, num_columns: what the tables must have room for
    """

    entries: Ints
    num_rows: int
    num_columns: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's rows, sequence after sequence.

    Sequence b owns rows query_starts[b]:query_starts[b + 1]; they are the last tokens of a context of seq_lens[b]
    tokens, and its blocks of the layers of group g (`AttentionLayer.group`) stand in row table_rows[g, b] of the
    executor's tables, in the first `table_width` columns.
    Whoever changes those for the same `table_rows` makes another array: identity is the version.
    """

    input_ids: Ints  # [num_tokens]; anything where `sources` says where the token is
    positions: Ints  # [num_tokens]; a draft's position is its depth, siblings share one
    slots: Ints  # [num_groups, num_tokens] block * block_size + offset: where each token's key and value go
    query_starts: Ints  # [num_seqs + 1]
    seq_lens: Ints  # [num_seqs] context length, new tokens and drafts included
    table_rows: Ints  # [num_groups, num_seqs]
    table_width: int
    table_changes: TableChanges
    logits_rows: Ints  # [num_logits] rows whose logits are wanted, in order
    tree_mask: Bools | None  # [num_tokens, max_query_len] whether the row sees the sequence's j-th row; None: causal
    seqs: SequenceInputs
    sampling: SamplingInputs
    sources: Ints | None = None  # [num_tokens] the sampled row of the step before that gives it, or KNOWN; None: all
    hidden_rows: Ints | None = None  # rows of the model whose hidden states somebody wants; None: those of the logits
    adapters: Ints | None = None  # [num_seqs] adapter of each sequence's rows; none in use yet
    pooled: PoolingInputs | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens)

    @property
    def is_decoding(self) -> bool:
        """Whether every row is sampled from: no prompt chunk and no scored prompt is among them."""
        return self.num_tokens == self.sampling.num_rows == len(self.logits_rows)


NO_INTS: Ints = np.empty(0, dtype=np.int64)
NO_ENTRIES: Ints = np.empty((0, 3), dtype=np.int64)
