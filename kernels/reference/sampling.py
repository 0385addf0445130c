"""Sampling one token per row, defined in plain torch by sorting the vocabulary.

A row's *gaps* say how far each logit lies below the row's largest, in units of the temperature. Tokens are ordered by
(gap, token id). Of that order, min-p keeps the tokens whose gap is at most `max_gap`, top-k the first k of these, top-p
a token while those before it weigh less than p of what is left; weights are integers, exp(-gap) in units of 2^-40, so
that their sums have no rounding. Among what is kept, the largest of Gumbel noise - gap is a sample (Gumbel-max;
Maddison et al. 2014, "A* sampling", section 2). The noise is counter based, a hash of a key per row and the token id:
31 bits v, and -log(-log(1 - (v + 1/2) / 2^31)) in float64, rounded to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_TOKEN = -1  # where the largest logit is not finite
GREEDY_BELOW = 1e-5  # a lower temperature takes the largest logit
_MULTIPLIERS = 0x7FEB352D, 0x846CA68B  # of "lowbias32" (Chris Wellons, hash-prospector)
_WORD = (1 << 32) - 1


def sample_tokens(
    logits: Tensor,
    temperatures: Tensor,
    keys: Tensor,
    max_gaps: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    *,
    none: int = NO_TOKEN,
    is_random: bool = True,
    is_truncated: bool = True,
) -> Tensor:
    """One token per row. [num_rows] int64; the lowest id among equals; `none` where the largest is not finite.

    logits: [num_rows, vocab_size] float32; keys: [num_rows, 2] int32
    temperatures: [num_rows] float32; max_gaps: [num_rows] float32, infinity is off
    top_ks: [num_rows] int64, the vocabulary's size is off; top_ps: [num_rows] float64, 1 is off
    is_random: whether any row has a temperature; is_truncated: whether any of these has top-k or top-p. Where they are
        False, an implementation may skip work; here they change nothing
    """
    assert is_random or not bool((temperatures >= GREEDY_BELOW).any()), "a row has a temperature"
    row_maxima = logits.amax(-1, keepdim=True)
    gaps = (row_maxima + 0.0 - logits) / temperatures.clamp_min(GREEDY_BELOW)[:, None]
    scores = token_noise(keys, logits.shape[1]) - gaps
    scores = scores.masked_fill(~is_kept(gaps, max_gaps, top_ks, top_ps), -torch.inf)
    tokens = torch.where(temperatures < GREEDY_BELOW, logits.argmax(-1), scores.argmax(-1))
    return tokens.masked_fill(~row_maxima[:, 0].isfinite(), none)


def is_kept(gaps: Tensor, max_gaps: Tensor, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    """Which tokens may be sampled. gaps: [num_rows, vocab_size]; returns the same shape, bool"""
    order = gaps.argsort(dim=-1, stable=True)
    ordered = gaps.gather(1, order)
    rank = torch.arange(gaps.shape[1], device=gaps.device)
    is_left = (ordered <= max_gaps[:, None]) & (rank < top_ks[:, None])
    weights = ((-ordered.double()).exp() * 2.0**40).round().long().masked_fill(~is_left, 0)
    before = weights.cumsum(-1) - weights
    limits = (weights.sum(-1).double() * top_ps).ceil().long().clamp_min(1)
    is_left &= (before < limits[:, None]) | (top_ps >= 1.0)[:, None]
    return torch.zeros_like(is_left).scatter_(1, order, is_left)


def token_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise of every token of each row. [num_rows, vocab_size] float32; keys: [num_rows, 2] int32"""
    words = torch.arange(vocab_size, device=keys.device)[None]  # int64 holds unsigned 32-bit words
    first, second = (keys.long() & _WORD).split(1, dim=1)  # type: ignore[no-untyped-call]
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


def apply_masks(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """Makes the logits of tokens that a mask does not allow minus infinity, in place. Other rows are not read.

    logits: [num_rows, vocab_size] float32; rows: [num_masked] int64, each once
    words: [num_masked, at least vocab_size / 32] int32: bit i of word j says whether token 32 j + i is allowed
    """
    bits = (words[:, :, None] >> torch.arange(32, device=words.device, dtype=torch.int32)) & 1
    is_allowed = bits.flatten(1)[:, : logits.shape[1]] > 0
    logits[rows] = logits[rows].masked_fill(~is_allowed, -torch.inf)


def penalise(
    logits: Tensor,
    counts: Tensor,
    is_in_prompt: Tensor,
    states: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Penalises, in place, tokens that a row's text already has.

    First the repetition penalty, over prompt and output: it divides a positive logit and multiplies a negative one
    (Keskar et al. 2019, "CTRL", section 4.1). Then frequency times the number of occurrences in the output plus
    presence, subtracted. Penalties of 1 and 0 leave a row as it is.

    logits: [num_rows, vocab_size] float32
    counts: [num_states, vocab_size] int32, occurrences in the output; is_in_prompt: the same shape, bool
    states: [num_rows], which state is each row's; repetition: [num_rows] float32
    frequency, presence: [num_rows] float64, so that their sum is rounded once
    """
    in_output = counts[states]
    penalty = torch.where(is_in_prompt[states] | (in_output > 0), repetition[:, None], 1.0)
    logits.copy_(torch.where(logits > 0, logits / penalty, logits * penalty).clamp_max(torch.finfo(torch.float32).max))
    subtracted = (in_output * frequency[:, None] + presence[:, None]).float()
    logits.sub_(torch.where(in_output > 0, subtracted, 0.0))


def score_tokens(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ranks of one token per row: (float64, int64), [num_rows] each.

    The rank is 1 plus the number of tokens that are strictly more likely.

    logits: [num_rows, vocab_size] float32; tokens: [num_rows] int64
    """
    gaps = logits.amax(-1, keepdim=True) - logits
    gap = gaps.gather(1, tokens[:, None])
    log_totals = gaps.neg().exp().sum(-1, dtype=torch.float64).log()
    return -gap[:, 0].double() - log_totals, (gaps < gap).sum(-1) + 1
