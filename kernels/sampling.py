"""Sampling one token per row, defined in plain torch by sorting the vocabulary.

A row's *gaps* say how far each logit lies below the row's largest, in units of the temperature. Tokens are ordered by
(gap, token id). Of that order, min-p keeps the tokens whose gap is at most `max_gap`, top-k the first k of these, top-p
a token while those before it weigh less than p of what is left; weights are integers, exp(-gap) in units of 2^-40, so
that their sums have no rounding. Among what is kept, the largest of Gumbel noise - gap is a sample (Gumbel-max;
Maddison et al. 2014, "A* sampling", section 2). The noise is a hash of a key per row and the token id: 31 bits v, and
-log(-log(1 - (v + 1/2) / 2^31)) in float64, rounded to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_TOKEN = -1  # where the largest logit is not finite
GREEDY_BELOW = 1e-5  # a lower temperature takes the largest logit
_MULTIPLIERS = 0x7FEB352D, 0x846CA68B  # of "lowbias32" (Chris Wellons, hash-prospector)
_WORD = (1 << 32) - 1


def sample_tokens(
    logits: Tensor, temperatures: Tensor, keys: Tensor, max_gaps: Tensor, top_ks: Tensor, top_ps: Tensor
) -> Tensor:
    """One token per row. [num_rows] int64; the lowest id among equals; NO_TOKEN where the largest is not finite.

    logits: [num_rows, vocab_size] float32; keys: [num_rows, 2] int32
    temperatures: [num_rows] float32; max_gaps: [num_rows] float32, infinity is off
    top_ks: [num_rows] int64, the vocabulary's size is off; top_ps: [num_rows] float64, 1 is off
    """
    peaks = logits.amax(-1, keepdim=True)
    gaps = (peaks + 0.0 - logits) / temperatures.clamp_min(GREEDY_BELOW)[:, None]
    order = gaps.argsort(dim=-1, stable=True)
    ordered = gaps.gather(1, order)
    rank = torch.arange(logits.shape[1], device=logits.device)
    is_kept = (ordered <= max_gaps[:, None]) & (rank < top_ks[:, None])
    weights = ((-ordered.double()).exp() * 2.0**40).round().long().masked_fill(~is_kept, 0)
    before = weights.cumsum(-1) - weights
    limits = (weights.sum(-1).double() * top_ps).ceil().long()
    is_kept &= (before < limits[:, None]) | (top_ps >= 1.0)[:, None]
    is_kept[:, 0] = True
    noise = token_noise(keys, logits.shape[1]).gather(1, order)
    scores = (noise - ordered).masked_fill(~is_kept, -torch.inf)
    is_best = scores == scores.amax(-1, keepdim=True)
    sampled = order.masked_fill(~is_best, logits.shape[1]).amin(-1)
    tokens = torch.where(temperatures < GREEDY_BELOW, logits.argmax(-1), sampled)
    return tokens.masked_fill(~peaks[:, 0].isfinite(), NO_TOKEN)


def token_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise of every token of each row. [num_rows, vocab_size] float32; keys: [num_rows, 2] int32"""
    words = torch.arange(vocab_size, device=keys.device)[None]  # int64 holds unsigned 32-bit words
    first, second = (keys.long() & _WORD).split(1, dim=1)
    words = words ^ (words >> 16)
    words = words * _MULTIPLIERS[0] & _WORD
    words = words ^ (words >> 15)
    words = _wrapped_product(words, _MULTIPLIERS[1]) ^ first
    words = words ^ (words >> 16)
    words = words * _MULTIPLIERS[0] & _WORD
    words = ((words ^ (words >> 15)) + second) & _WORD
    bits = _wrapped_product(words, _MULTIPLIERS[1]) & (_WORD >> 1)
    return -(-(1.0 - (bits.double() + 0.5) * 2.0**-31).log()).log().float()


def _wrapped_product(words: Tensor, multiplier: int) -> Tensor:
    """The low 32 bits, by a multiplier so large that the whole product would not fit into a signed 64-bit word."""
    return (words * (multiplier & 0xFFFF) + ((words * (multiplier >> 16) & 0xFFFF) << 16)) & _WORD
