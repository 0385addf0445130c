"""Penalties on logits before sampling, and log-probabilities and ranks of the sampled tokens, on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS_AT_ONCE = 4096
_LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32


def penalise(
    logits: Tensor,
    counts: Tensor,
    is_in_prompt: Tensor,
    states: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """As `kernels.reference.sampling.penalise`; rows with penalties of 1 and 0 are not read.

    frequency times the occurrences may be fused with what is added to it, and then rounds otherwise once in 10^8.
    """
    num_rows, vocab_size = logits.shape
    assert counts.shape == is_in_prompt.shape == (counts.shape[0], vocab_size), f"{tuple(counts.shape)}"
    assert logits.stride(1) == 1, "rows are contiguous"
    assert counts.is_contiguous(), "a state's counts are contiguous"
    assert is_in_prompt.is_contiguous(), "a state's marks are contiguous"
    for column in (states, repetition, frequency, presence):
        assert column.shape == (num_rows,), f"{tuple(column.shape)} for {num_rows} rows"
    if num_rows:
        penalise_kernel[(num_rows, triton.cdiv(vocab_size, _TOKENS_AT_ONCE))](
            logits,
            counts,
            is_in_prompt.view(torch.uint8),
            states,
            repetition,
            frequency,
            presence,
            vocab_size,
            logits.stride(0),
            TOKENS=_TOKENS_AT_ONCE,
            num_warps=8,
        )


def score_tokens(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels.reference.sampling.score_tokens`."""
    num_rows, vocab_size = logits.shape
    assert tokens.shape == (num_rows,), f"{tuple(tokens.shape)} tokens for {num_rows} rows"
    assert logits.stride(1) == 1, "rows are contiguous"
    logprobs = torch.empty(num_rows, dtype=torch.float64, device=logits.device)
    ranks = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        arguments = (logits, tokens, logprobs, ranks, vocab_size, logits.stride(0))
        score_kernel[(num_rows,)](*arguments, TOKENS=_TOKENS_AT_ONCE, num_warps=8)
    return logprobs, ranks


@triton.jit
def penalise_kernel(
    logits_ptr,
    counts_ptr,
    is_in_prompt_ptr,
    states_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    vocab_size,
    stride_row,
    TOKENS: tl.constexpr,
):
    # grid: [num_rows, cdiv(vocab_size, TOKENS)]; one program penalises TOKENS tokens of one row
    row = tl.program_id(0).to(tl.int64)
    repetition = tl.load(repetition_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    presence = tl.load(presence_ptr + row)
    if (repetition == 1.0) & (frequency == 0.0) & (presence == 0.0):
        return
    state = tl.load(states_ptr + row).to(tl.int64) * vocab_size
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_token = tokens < vocab_size
    logits = tl.load(logits_ptr + row * stride_row + tokens, mask=is_token, other=0.0)
    counts = tl.load(counts_ptr + state + tokens, mask=is_token, other=0)
    in_prompt = tl.load(is_in_prompt_ptr + state + tokens, mask=is_token, other=0)
    penalty = tl.where((in_prompt != 0) | (counts > 0), repetition, 1.0)
    logits = tl.where(logits > 0, tl.div_rn(logits, penalty), logits * penalty)
    logits = tl.where(logits > _LARGEST, _LARGEST, logits)  # a penalty near 0 may overflow; NaN stays
    subtracted = (counts.to(tl.float64) * frequency + presence).to(tl.float32)
    logits -= tl.where(counts > 0, subtracted, 0.0)
    tl.store(logits_ptr + row * stride_row + tokens, logits, mask=is_token)


@triton.jit
def score_kernel(logits_ptr, tokens_ptr, logprobs_ptr, ranks_ptr, vocab_size, stride_row, TOKENS: tl.constexpr):
    # grid: [num_rows]; one program reads its row twice
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    maxima = tl.full([TOKENS], float("-inf"), tl.float32)
    for start in range(0, vocab_size, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        maxima = tl.maximum(maxima, tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf")))
    row_max = tl.max(maxima, 0)
    gap = row_max - tl.load(row_ptr + tl.load(tokens_ptr + row))
    totals = tl.zeros([TOKENS], tl.float64)
    num_above = tl.zeros([TOKENS], tl.int32)
    for start in range(0, vocab_size, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        gaps = row_max - tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf"))
        totals += tl.exp(-gaps).to(tl.float64)
        num_above += (gaps < gap).to(tl.int32)
    tl.store(logprobs_ptr + row, -gap.to(tl.float64) - tl.log(tl.sum(totals, 0)))
    tl.store(ranks_ptr + row, tl.sum(num_above, 0).to(tl.int64) + 1)
