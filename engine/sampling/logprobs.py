"""Log-probabilities of tokens under the model's untouched logits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.arrays import Floats, Ints
from engine.batch.step_inputs import LogprobInputs
from engine.sampling.gumbel import float_weights
from engine.sampling.truncation import gaps_below, most_likely
from engine.types import TokenLogprobs

_ONE = np.float32(1.0)


def ask_logprobs(logits: Floats, token_ids: Ints, queries: LogprobInputs) -> Tensor:
    """What `read_logprobs` makes answers of: [num_queries, 3 + 2 * num_top] float64

    Of each query the token, its rank, its log-probability, those of the most likely tokens, and their ids; float64
    holds token ids and ranks exactly too. Minus infinity fills up where fewer tokens are possible.

    logits: [num_rows, vocab_size]; token_ids: [num_rows] the token that came after each row
    """
    num_top = min(logits.shape[1], int(queries.num_top.max()))
    answers = np.full((len(queries.rows), 3 + 2 * num_top), -np.inf)
    for answer, row, num_wanted in zip(answers, queries.rows.tolist(), queries.num_top.tolist(), strict=True):
        _answer(logits[row], int(token_ids[row]), num_wanted, answer)
    return torch.from_numpy(answers)


def read_logprobs(answers: Tensor, queries: LogprobInputs) -> Iterator[TokenLogprobs]:
    """The answers in the order of the queries. A row whose logits are not finite has NaN for log-probabilities.

    The rank is 1 plus the number of tokens that are strictly more likely. Of equally likely tokens the lowest ids
    come first among the most likely, and impossible tokens (a logit of minus infinity) are not among them.
    """
    entries = []
    for num_wanted, (token_id, rank, logprob, *tops) in zip(queries.num_top.tolist(), answers.tolist(), strict=True):
        num_listed = len(tops) // 2
        top_logprobs = [value for value in tops[: min(num_wanted, num_listed)] if value != -torch.inf]
        ids = [int(token) for token in tops[num_listed : num_listed + len(top_logprobs)]]
        entries.append(TokenLogprobs(int(token_id), logprob, int(rank), ids, top_logprobs))
    return iter(entries)


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
