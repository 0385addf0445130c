"""Log-probabilities of tokens under the model's untouched logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.candidates import gaps_below_best, most_likely
from engine.gumbel import float_weights
from engine.types import TokenLogprobs

_ROWS_PER_PASS = 64  # bounds the scratch memory: prompts may be scored by the thousand rows


@dataclass(frozen=True, slots=True)
class LogprobQuery:
    """One row to report on: the token that came, and how many of the most likely tokens beside it."""

    row: int  # in the step's logits
    token_id: int
    num_top: int


def token_logprobs(logits: Tensor, queries: list[LogprobQuery]) -> Iterator[TokenLogprobs]:
    """Answers the queries in order. logits: [num_rows, vocab_size] float32

    The rank is 1 plus the number of tokens that are strictly more likely. Of equally likely tokens the lowest ids
    come first among the most likely, and impossible tokens (a logit of minus infinity) are not among them.
    """
    for start in range(0, len(queries), _ROWS_PER_PASS):
        yield from _answer(logits, queries[start : start + _ROWS_PER_PASS])


def _answer(logits: Tensor, queries: list[LogprobQuery]) -> Iterator[TokenLogprobs]:
    rows = logits.index_select(0, torch.tensor([query.row for query in queries], device=logits.device))
    token_ids = torch.tensor([query.token_id for query in queries], device=logits.device)[:, None]
    num_top = min(rows.shape[1], max(1, *(query.num_top for query in queries)))
    gaps = gaps_below_best(rows, rows.amax(-1, keepdim=True))
    log_total = float_weights(gaps).sum(-1, keepdim=True, dtype=torch.float64).log_()
    gap = gaps.gather(1, token_ids)
    rank = torch.lt(gaps, gap, out=torch.empty_like(gaps)).sum(-1, keepdim=True) + 1.0  # float32 counts to 2^24
    top_gaps, top_tokens = most_likely(gaps, num_top)
    # The one copy to the host: floats as float64, which holds token ids and ranks exactly too.
    logprobs = torch.cat((-gap - log_total, -top_gaps - log_total), dim=1)
    answers = torch.cat((rank.double(), logprobs, top_tokens.double()), dim=1).tolist()
    for query, (rank_of, logprob, *tops) in zip(queries, answers, strict=True):
        top_logprobs = [value for value in tops[: min(query.num_top, num_top)] if value != -torch.inf]
        ids = [int(token) for token in tops[num_top : num_top + len(top_logprobs)]]
        yield TokenLogprobs(query.token_id, logprob, int(rank_of), ids, top_logprobs)
