"""Sampled tokens between the device, where the next step may use them, and the host, which learns them later."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from engine.arrays import Ints
from engine.sampling.acceptance import NO_TOKEN, NOT_FINITE, accept
from engine.sampling.logprobs import LogprobQuery, read_logprobs
from engine.sampling.rows import next_position
from engine.types import Sampled, Scheduled, TokenLogprobs

_NOT_FINITE = (
    "the model's logits are not finite (NaN or infinity) at position {position}, so no token can be chosen; "
    "this prompt overflows the model's arithmetic: try dtype float32 or bfloat16"
)
_NOTHING_ALLOWED = (
    "no token is allowed at position {position}: allowed_token_ids, bad_words, logit_bias and min_tokens together "
    "exclude the whole vocabulary; loosen one of them"
)


class HostCopy:
    """A step's tokens and the numbers beside them, on their way to the host.

    The copy is queued when this is made and waited for when it is read, so work that is queued in between delays
    nobody. From a GPU it is one copy into pinned memory.
    """

    def __init__(self, tokens: Tensor, answers: Tensor | None) -> None:
        """tokens: int64; answers: float64, whose bits travel as int64"""
        self._tokens, self._answers = tokens, answers
        self._arrived: torch.cuda.Event | None = None
        if tokens.is_cuda:
            whole = tokens if answers is None else torch.cat((tokens, answers.flatten().view(torch.int64)))
            landing = torch.empty(whole.shape, dtype=torch.int64, pin_memory=True)
            landing.copy_(whole, non_blocking=True)
            self._tokens = landing[: len(tokens)]
            if answers is not None:
                self._answers = landing[len(tokens) :].view(torch.float64).view(answers.shape)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> tuple[list[int], Tensor | None]:
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens: list[int] = self._tokens.tolist()
        return tokens, self._answers


class Pending:
    """A step's tokens, decided but not yet known to the host.

    Made by `launch` of a sampler. What `finish` needs of the sequences was noted then, so they may move on in between;
    only drafts must stay until they are accepted.

    tokens: the token of each sampled row, on the device of the logits, item after item: of each the root, then one row
    per draft. [num_sampled_rows] int64; NO_TOKEN or NOT_FINITE, which are negative, where none can be chosen
    """

    def __init__(
        self,
        batch: list[Scheduled],
        tokens: Tensor,
        queries: list[LogprobQuery],
        answers: Tensor | None,
        positions: Ints | None = None,
    ) -> None:
        """answers: those of `ask_logprobs` to the queries, None where there are no queries; positions: as `launch` of
        `engine.sampling.sampler.TokenSampler` takes them"""
        self.tokens = tokens
        self._batch, self._queries = batch, queries
        self._decodes = positions is not None  # a token per item
        self._positions = [next_position(item) for item in batch] if positions is None else positions.tolist()
        self._copy = HostCopy(tokens, answers)

    def finish(self) -> list[Sampled]:
        """Waits for the tokens, and decides: accepted drafts, errors, log-probabilities. One `Sampled` per item."""
        sampled, answers = self._copy.read()
        if self._decodes and answers is None and min(sampled) >= 0:
            return [Sampled([token]) for token in sampled]
        logprobs = iter(()) if answers is None else read_logprobs(answers, self._queries)
        results: list[Sampled] = []
        first = 0
        for item, position in zip(self._batch, self._positions, strict=True):
            end = first + item.num_sampled_rows
            rows = sampled[first:end]
            if answers is None and rows and rows[0] >= 0:  # most of them
                accepted = accept(rows, item) if item.num_drafts else []
                results.append(Sampled([rows[0], *[rows[1 + draft] for draft in accepted]], accepted))
            else:
                results.append(_result(item, position, rows, logprobs))
            first = end
        return results


def _result(item: Scheduled, position: int, sampled: list[int], logprobs: Iterator[TokenLogprobs]) -> Sampled:
    """sampled: [num_sampled_rows] of the item; logprobs: the next answers are the item's"""
    scored = list(islice(logprobs, item.num_scored))
    wants_logprobs = item.seq.params.logprobs is not None
    of_rows = list(islice(logprobs, len(sampled))) if wants_logprobs else []
    if any(math.isnan(one.logprob) for one in scored) or (sampled and sampled[0] == NOT_FINITE):
        return Sampled([], error=_NOT_FINITE.format(position=position))
    if not sampled:
        return Sampled([], prompt_logprobs=scored or None)
    if sampled[0] == NO_TOKEN:
        return Sampled([], error=_NOTHING_ALLOWED.format(position=position), error_kind="constraints")
    accepted = accept(sampled, item) if item.num_drafts else []
    emitted = [0, *(draft + 1 for draft in accepted)]
    return Sampled(
        [sampled[row] for row in emitted],
        accepted,
        logprobs=[of_rows[row] for row in emitted] if wants_logprobs else None,
        prompt_logprobs=scored or None,
    )
