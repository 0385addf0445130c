"""Gumbel-max sampling: the token with the largest score = noise - gap is a sample of softmax(-gap).

(Gumbel 1954; Maddison, Tarlow and Minka 2014, "A* sampling", section 2.) The score is a float32 difference of the
float32 noise of `engine.noise` and the float32 gap; among equal scores the lowest token id wins. That is the whole
definition: `largest_score` finds the winner without taking two logarithms for every token, and always the same one.

How: noise -log(-log(1 - v)) never exceeds -log(v), so a token whose score is at least s has v / exp(-gap) <= exp(-s).
The left side is cheap in float32; the token where it is smallest gives a good s, and only blocks that hold a token
within that bound (a few of them, whatever the distribution) are scored exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.candidates import block_minima, block_tokens
from engine.noise import NUM_NOISE_BITS, gumbel, noise_bits

_FARTHEST_GAP = 80.0  # noise makes up for 26 at most; exponentials that underflow take many times as long
_TOKENS_PER_BLOCK = 64
_SLACK = 1.0 + 1e-4  # far more than the rounding of v / weight and of scores, all of them in float32
_CPU_PASS, _GPU_PASS = 1 << 20, 1 << 25  # logits: scratch memory that stays in the CPU's cache; under 1 GB on a GPU


def float_weights(gaps: Tensor) -> Tensor:
    """exp(-gap), not normalised, never 0. float32"""
    return gaps.clamp_max(_FARTHEST_GAP).neg_().exp_()


def largest_score(gaps: Tensor, weights: Tensor, keys: Tensor, words: Tensor) -> Tensor:
    """The sampled token of each row. [num_rows] int64

    gaps: [num_rows, vocab_size]; weights: the same shape, `float_weights` or 0 where a token is excluded; some token
    with a gap of 0 is not; keys: [num_rows, 2] of `noise_keys`; words: [vocab_size] of `token_words`.
    """
    rows_per_pass = max(1, (_CPU_PASS if gaps.is_cpu else _GPU_PASS) // gaps.shape[1])
    passes = [slice(start, start + rows_per_pass) for start in range(0, gaps.shape[0], rows_per_pass)]
    return torch.cat([_largest_score(gaps[some], weights[some], keys[some], words) for some in passes])


def largest_score_listed(gaps: Tensor, tokens: Tensor, keys: Tensor, words: Tensor) -> Tensor:
    """The same where only listed tokens can be sampled. [num_rows] int64

    gaps, tokens: [num_rows, num_listed]; an infinite gap excludes a token, whose id may then be anything.
    """
    score = _scores(gaps, tokens, keys, words)
    return _lowest_winner(score, tokens, score.amax(-1, keepdim=True))


def _largest_score(gaps: Tensor, weights: Tensor, keys: Tensor, words: Tensor) -> Tensor:
    num_rows, vocab_size = gaps.shape
    num_blocks = -(-vocab_size // _TOKENS_PER_BLOCK)
    race = noise_bits(words[None], keys).float().add_(0.5).div_(weights)
    minima = block_minima(race, num_blocks)

    every_row = torch.arange(num_rows, device=gaps.device)
    first_block = minima.argmin(-1)
    tokens = block_tokens(first_block, num_blocks=num_blocks, vocab_size=vocab_size)
    reached = _scores(_gaps_at(gaps, weights, every_row, tokens), tokens, keys, words).amax(-1, keepdim=True)
    bound = (-reached).exp() * (_SLACK * 2.0**NUM_NOISE_BITS)
    rows, blocks = (minima <= bound).nonzero(as_tuple=True)

    tokens = block_tokens(blocks, num_blocks=num_blocks, vocab_size=vocab_size)
    score = _scores(_gaps_at(gaps, weights, rows, tokens), tokens, keys[rows], words)
    best = torch.full((num_rows,), -torch.inf, device=gaps.device).scatter_reduce_(0, rows, score.amax(-1), "amax")
    winners = _lowest_winner(score, tokens, best[rows, None])
    return torch.full_like(first_block, vocab_size).scatter_reduce_(0, rows, winners, "amin")


def _gaps_at(gaps: Tensor, weights: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """The gaps of tokens [n, num_tokens] of rows [n]; infinity for what is excluded or past the vocabulary."""
    last = gaps.shape[1] - 1
    places = rows[:, None], tokens.clamp_max(last)
    return gaps[places].masked_fill((tokens > last) | (weights[places] == 0.0), torch.inf)


def _scores(gaps: Tensor, tokens: Tensor, keys: Tensor, words: Tensor) -> Tensor:
    return gumbel(noise_bits(words[tokens.clamp_max(words.shape[0] - 1)], keys)) - gaps


def _lowest_winner(score: Tensor, tokens: Tensor, best: Tensor) -> Tensor:
    """The lowest token id whose score is the best; an id above all others where a row has none."""
    return tokens.masked_fill(score != best, torch.iinfo(torch.int64).max).amin(-1)
