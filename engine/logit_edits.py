"""Bias and bans on a GPU: a few index writes over the rows of all requests."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.candidates import Ints
from engine.penalties import banned_tokens
from engine.sampled_rows import SampledRow
from engine.transfer import to_device


def bias_and_ban_rows(logits: Tensor, rows: list[SampledRow]) -> None:
    """What `engine.penalties.bias_and_ban` does to one row, to all of them. In place.

    logits: [num_rows, vocab_size], contiguous. A place may be written twice, then with the same value.
    """
    vocab_size, device = logits.shape[1], logits.device
    flat = logits.view(-1)
    biased = [(row * vocab_size, one.params.logit_bias) for row, one in enumerate(rows) if one.params.logit_bias]
    if biased:
        places = [start + token for start, bias in biased for token in bias]
        values = np.array([value for _, bias in biased for value in bias.values()])
        flat.index_add_(0, to_device(np.array(places), device), to_device(values, device).float())
    allowed = [(row, one.params.allowed_token_ids) for row, one in enumerate(rows)]
    restricted = [(row, tokens) for row, tokens in allowed if tokens is not None]
    if restricted:
        kept = to_device(np.concatenate([row * vocab_size + _ints(tokens) for row, tokens in restricted]), device)
        values_kept = flat.index_select(0, kept)
        logits.index_fill_(0, to_device(_ints([row for row, _ in restricted]), device), -torch.inf)
        flat.index_copy_(0, kept, values_kept)
    banned = [row * vocab_size + _ints(banned_tokens(one, vocab_size)) for row, one in enumerate(rows)]
    places_banned = np.concatenate(banned)
    if len(places_banned):
        flat.index_fill_(0, to_device(places_banned, device), -torch.inf)


def _ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int64)
