"""Changes to the logits that a request asks for: penalties here, bias and bans in `engine.logit_edits`.

Applied in this order, each to what the one before left:

1. repetition penalty, over the tokens of prompt and output: a positive logit is divided by it, a negative one
   multiplied (Keskar et al. 2019, "CTRL", section 4.1, with the sign handled as all servers do);
2. frequency penalty times the number of occurrences, plus presence penalty, over the output, subtracted;
3. logit bias, added;
4. bans: every token but the allowed ones, the last token of a bad word whose other tokens have just been written
   (the end of the prompt counts), stop tokens before min_tokens.

For a row behind drafts, the drafts on its path count as output.
"""

from __future__ import annotations

import numpy as np

from engine.candidates import Floats
from engine.sampled_rows import SampledRow
from engine.token_history import TokenHistory
from engine.types import SamplingParams, Scheduled

_LARGEST = np.finfo(np.float32).max


def edits_logits(row: SampledRow) -> bool:
    """Whether the row's request may change any of its logits."""
    return edits_every_step(row.params) or row.params.min_tokens > row.num_output_tokens


def edits_every_step(params: SamplingParams) -> bool:
    """Whether a request may change a logit after its min_tokens too."""
    is_restricted = params.allowed_token_ids is not None or bool(params.bad_words)
    return is_penalised(params) or is_restricted or bool(params.logit_bias)


def is_penalised(params: SamplingParams) -> bool:
    """Whether tokens count that the text already has."""
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def needs_token_history(item: Scheduled) -> bool:
    """Whether a step of this request can only be sampled when the host knows all tokens before it."""
    params = item.seq.params
    return is_penalised(params) or any(len(word) > 1 for word in params.bad_words)


def penalise(logits: Floats, row: SampledRow, history: TokenHistory) -> None:
    """Applies the penalties of a row's request, in place. logits: [vocab_size]"""
    params = row.params
    token_ids, counts = history.counts(row.path)
    found = logits[token_ids]
    if params.repetition_penalty != 1.0:
        penalty = np.float32(params.repetition_penalty)
        found = np.where(found > 0, found / penalty, found * penalty)
        np.minimum(found, _LARGEST, out=found)  # a penalty near 0 may overflow
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        subtracted = params.frequency_penalty * counts + params.presence_penalty
        found -= np.where(counts > 0, subtracted, 0.0).astype(np.float32)
    logits[token_ids] = found
