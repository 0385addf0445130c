"""The most likely tokens of each row, without sorting the vocabulary.

A row of *gaps* says how far each token's logit lies below the row's largest, in units of the temperature: 0 for the
best token, infinity for one that must not be chosen. Tokens are ordered by (gap, token id), so there are no ties.

Both this file and `engine.gumbel` look at *blocks* first: of the vocabulary, block b holds tokens b, b + num_blocks,
b + 2 * num_blocks, ... Its minimum costs one pass over memory, and tells which few blocks are worth a second look.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAX_FINITE = torch.finfo(torch.float32).max
_TOKEN_BITS = 32


def gaps_below_best(logits: Tensor, best: Tensor) -> Tensor:
    """How far each logit lies below its row's largest. logits: [num_rows, vocab_size]; best: [num_rows, 1]"""
    return best + 0.0 - logits  # a best of -0.0 would make gaps of -0.0, whose bits sort elsewhere


def block_minima(values: Tensor, num_blocks: int) -> Tensor:
    """The smallest value of each block. values: [num_rows, vocab_size]; returns [num_rows, num_blocks]"""
    num_full = values.shape[1] // num_blocks
    whole, rest = values[:, : num_full * num_blocks], values[:, num_full * num_blocks :]
    minima: Tensor = torch.unflatten(whole, 1, (num_full, num_blocks)).amin(1)
    if rest.shape[1]:
        head = minima[:, : rest.shape[1]]
        torch.minimum(head, rest, out=head)
    return minima


def block_tokens(blocks: Tensor, *, num_blocks: int, vocab_size: int) -> Tensor:
    """The token ids of blocks, at least `vocab_size` where a block has fewer. [..., tokens per block]"""
    offsets = torch.arange(0, vocab_size, num_blocks, device=blocks.device)
    return blocks[..., None] + offsets


def most_likely(gaps: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The first tokens of each row in the order (gap, token id): their gaps and ids. [num_rows, num_tokens] each

    gaps: [num_rows, vocab_size], none NaN, at least 0 (and not -0). Where a row has fewer finite gaps, infinite
    ones fill it up, with ids that mean nothing.

    The num_tokens-th smallest block minimum is an upper bound of the num_tokens-th smallest gap, so only blocks
    whose minimum does not exceed it can hold a wanted token.
    """
    vocab_size = gaps.shape[1]
    num_blocks = -(-vocab_size // max(1, math.isqrt(vocab_size // num_tokens)))
    minima = block_minima(gaps, num_blocks)
    bound = minima.topk(num_tokens, largest=False, sorted=False).values.amax(-1, keepdim=True)
    num_hits = int((minima <= bound.clamp_max(_MAX_FINITE)).sum(-1).max())
    blocks = minima.topk(max(1, num_hits), largest=False, sorted=False).indices
    tokens = block_tokens(blocks, num_blocks=num_blocks, vocab_size=vocab_size).flatten(1)
    return _first_in_order(gaps, tokens, num_tokens)


def _first_in_order(gaps: Tensor, tokens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The first of the tokens listed for each row. tokens: [num_rows, num_listed], ids past the vocabulary are void"""
    vocab_size = gaps.shape[1]
    listed = gaps.gather(1, tokens.clamp_max(vocab_size - 1))
    listed = listed.masked_fill(tokens >= vocab_size, torch.inf)
    # Floats that are not negative sort as their bits do: one integer holds the gap above the id.
    order = (listed.view(torch.int32).long() << _TOKEN_BITS) | tokens
    if order.shape[1] < num_tokens:
        order = torch.nn.functional.pad(order, (0, num_tokens - order.shape[1]), value=_infinite_gap_key(vocab_size))
    order = order.topk(num_tokens, largest=False, sorted=True).values
    return (order >> _TOKEN_BITS).int().view(torch.float32), order & ((1 << _TOKEN_BITS) - 1)


def _infinite_gap_key(token: int) -> int:
    bits = int(torch.tensor(torch.inf).view(torch.int32))
    return (bits << _TOKEN_BITS) | token
