"""Log-probabilities of tokens under the model's untouched logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.arrays import Floats, Ints
from engine.sampling.gumbel import float_weights
from engine.sampling.truncation import gaps_below, most_likely
from engine.types import Scheduled, TokenLogprobs

_ONE = np.float32(1.0)


class LogprobQuery(NamedTuple):
    """One row to report on, and how many of the most likely tokens beside the one that came."""

    row: int  # in the step's logits
    num_top: int


def logprob_queries(batch: list[Scheduled]) -> list[LogprobQuery]:
    """What the items ask: of their scored rows, then, where log-probabilities are wanted, of their sampled rows."""
    queries: list[LogprobQuery] = []
    first = 0
    for item in batch:
        params = item.seq.params
        if item.num_scored:
            queries += [LogprobQuery(first + i, params.prompt_logprobs or 0) for i in range(item.num_scored)]
        if params.logprobs is not None:
            queries += [LogprobQuery(first + i, params.logprobs) for i in range(item.num_scored, item.num_logits)]
        first += item.num_logits
    return queries


def scored_tokens(batch: list[Scheduled]) -> Ints:
    """The prompt token that comes after each scored row of the logits, and 0 for sampled rows. [num_logits]"""
    tokens: list[int] = []
    for item in batch:
        first = item.seq.num_computed_tokens + item.num_new_tokens - item.num_logits + 1
        tokens += item.seq.token_ids[first : first + item.num_scored] + [0] * item.num_sampled_rows
    return np.array(tokens, dtype=np.int64)


def ask_logprobs(logits: Floats, token_ids: Ints, queries: list[LogprobQuery]) -> Tensor:
    """What `read_logprobs` makes answers of: [num_queries, 3 + 2 * num_top] float64

    Of each query the token, its rank, its log-probability, those of the most likely tokens, and their ids; float64
    holds token ids and ranks exactly too. Minus infinity fills up where fewer tokens are possible.

    logits: [num_rows, vocab_size]; token_ids: [num_rows] the token that came after each row
    """
    num_top = min(logits.shape[1], max(query.num_top for query in queries))
    answers = np.full((len(queries), 3 + 2 * num_top), -np.inf)
    for answer, (row, num_wanted) in zip(answers, queries, strict=True):
        _answer(logits[row], int(token_ids[row]), num_wanted, answer)
    return torch.from_numpy(answers)


def read_logprobs(answers: Tensor, queries: list[LogprobQuery]) -> Iterator[TokenLogprobs]:
    """The answers in the order of the queries. A row whose logits are not finite has NaN for log-probabilities.

    The rank is 1 plus the number of tokens that are strictly more likely. Of equally likely tokens the lowest ids
    come first among the most likely, and impossible tokens (a logit of minus infinity) are not among them.
    """
    for query, (token_id, rank, logprob, *tops) in zip(queries, answers.tolist(), strict=True):
        num_listed = len(tops) // 2
        top_logprobs = [value for value in tops[: min(query.num_top, num_listed)] if value != -torch.inf]
        ids = [int(token) for token in tops[num_listed : num_listed + len(top_logprobs)]]
        yield TokenLogprobs(int(token_id), logprob, int(rank), ids, top_logprobs)


def _answer(logits: Floats, token_id: int, num_top: int, answer: npt.NDArray[np.float64]) -> None:
    peak = logits[logits.argmax()]
    if not np.isfinite(peak):
        answer[:3] = token_id, 0.0, np.nan
        return
    gaps = gaps_below(peak, logits, _ONE)
    log_total = np.log(float_weights(gaps).sum(dtype=np.float64))
    gap = gaps[token_id]
    answer[:3] = token_id, np.count_nonzero(gaps < gap) + 1, -gap - log_total
    if num_top:
        top = most_likely(gaps, min(num_top, len(gaps)))
        answer[3 : 3 + len(top)] = -gaps[top] - log_total
        answer[3 + (len(answer) - 3) // 2 :][: len(top)] = top
