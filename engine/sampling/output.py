"""Sampled tokens between the device, where the next step may use them, and the host, which learns them later."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from engine.batch.step_inputs import StepInputs
from engine.sampling.acceptance import NO_TOKEN, NOT_FINITE, accept
from engine.sampling.logprobs import read_logprobs
from engine.sampling.typical import accept_typical
from engine.types import Sampled, TokenLogprobs

_NOT_FINITE = (
    "the model's logits are not finite (NaN or infinity) at position {position}, so no token can be chosen; "
    "this prompt overflows the model's arithmetic: try dtype float32 or bfloat16"
)
_NOTHING_ALLOWED = (
    "no token is allowed at position {position}: allowed_token_ids, bad_words, logit_bias and min_tokens together, "
    "and the grammar if there is one, exclude the whole vocabulary; loosen one of them"
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


class SamplerOutput:
    """A step's tokens, decided but not yet known to the host.

    tokens: the token of each sampled row, on the device of the logits. [num_sampled] int64; NO_TOKEN or NOT_FINITE,
    which are negative, where none can be chosen
    """

    def __init__(self, tokens: Tensor, answers: Tensor | None, is_typical: Tensor | None = None) -> None:
        """answers: those of `ask_logprobs`; is_typical: of `are_typical`; None where nobody asked"""
        self.tokens = tokens
        self._copy = HostCopy(tokens if is_typical is None else torch.cat((tokens, is_typical.long())), answers)

    def finish(self, inputs: StepInputs) -> list[Sampled]:
        """Waits for the tokens; decides on drafts and errors. One `Sampled` per sequence."""
        sampled, answers = self._copy.read()
        typical = inputs.sampling.typical
        is_typical = {}
        if typical is not None:
            is_typical = dict(zip(typical.drafts.tolist(), sampled[inputs.sampling.num_rows :], strict=True))
            del sampled[inputs.sampling.num_rows :]
        if answers is None and inputs.is_decoding and len(sampled) == inputs.num_seqs and min(sampled) >= 0:
            return [Sampled([token]) for token in sampled]
        seqs = inputs.seqs
        logprobs: Iterator[TokenLogprobs] = iter(())
        if answers is not None:
            assert inputs.sampling.logprobs is not None
            logprobs = read_logprobs(answers, inputs.sampling.logprobs)
        input_ids, draft_parents = inputs.input_ids.tolist(), seqs.draft_parents.tolist()
        positions = inputs.sampling.positions.tolist()
        results: list[Sampled] = []
        first = first_draft = 0
        columns = (seqs.num_scored, seqs.num_sampled, seqs.wants_logprobs, inputs.query_starts[1:])
        for seq, numbers in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            num_scored, num_sampled, wants_logprobs, end = numbers
            rows, num_drafts = sampled[first : first + num_sampled], max(num_sampled - 1, 0)
            accepted: list[int] = []
            if num_drafts and rows[0] >= 0:
                parents = draft_parents[first_draft : first_draft + num_drafts]
                tokens = input_ids[end - num_drafts : end]
                if first + 1 in is_typical:
                    flags = [bool(is_typical[first + 1 + draft]) for draft in range(num_drafts)]
                    accepted = accept_typical(rows, tokens, parents, flags)
                    for draft, parent in zip(accepted, [-1, *accepted], strict=False):
                        rows[parent + 1] = tokens[draft]  # what is kept there
                else:
                    accepted = accept(rows, tokens, parents)
            if answers is None and rows and rows[0] >= 0:  # most of them
                results.append(Sampled([rows[0], *[rows[1 + draft] for draft in accepted]], accepted))
            else:
                scored = list(islice(logprobs, num_scored))
                of_rows = list(islice(logprobs, num_sampled)) if wants_logprobs else None
                position = positions[first] if rows else int(inputs.seq_lens[seq])
                results.append(_result(position, rows, accepted, scored=scored, of_rows=of_rows))
            first += num_sampled
            first_draft += num_drafts
        return results


def _result(
    position: int,
    sampled: list[int],
    accepted: list[int],
    *,
    scored: list[TokenLogprobs],
    of_rows: list[TokenLogprobs] | None,
) -> Sampled:
    """sampled: of a sequence's rows; of_rows: their log-probabilities, if it wants them; position: of the first"""
    if any(math.isnan(one.logprob) for one in scored) or (sampled and sampled[0] == NOT_FINITE):
        return Sampled([], error=_NOT_FINITE.format(position=position))
    if not sampled:
        return Sampled([], prompt_logprobs=scored or None)
    if sampled[0] == NO_TOKEN:
        return Sampled([], error=_NOTHING_ALLOWED.format(position=position), error_kind="constraints")
    emitted = [0, *(draft + 1 for draft in accepted)]
    return Sampled(
        [sampled[row] for row in emitted],
        accepted,
        logprobs=None if of_rows is None else [of_rows[row] for row in emitted],
        prompt_logprobs=scored or None,
    )
