"""Packed masks of allowed tokens applied to logits, on the device: a bit per token goes there, not a logit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS_AT_ONCE = 4096


def apply_masks(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """As `kernels.reference.sampling.apply_masks`."""
    vocab_size = logits.shape[1]
    num_masked, num_words = words.shape
    assert rows.shape == (num_masked,), f"{tuple(rows.shape)} rows for {num_masked} masks"
    assert words.dtype == torch.int32, f"{words.dtype} words"
    assert words.is_contiguous(), "masks lie one behind the other"
    assert num_words * 32 >= vocab_size, f"{num_words} words are no mask of {vocab_size} tokens"
    assert logits.stride(1) == 1, "rows are contiguous"
    if num_masked:
        apply_masks_kernel[(num_masked, triton.cdiv(vocab_size, _TOKENS_AT_ONCE))](
            logits, rows, words, vocab_size, num_words, logits.stride(0), TOKENS=_TOKENS_AT_ONCE, num_warps=8
        )


@triton.jit
def apply_masks_kernel(logits_ptr, rows_ptr, words_ptr, vocab_size, num_words, stride_row, TOKENS: tl.constexpr):
    # grid: [num_masked, cdiv(vocab_size, TOKENS)]; one program masks TOKENS tokens of one row
    mask = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + mask)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_token = tokens < vocab_size
    words = tl.load(words_ptr + mask * num_words + (tokens >> 5), mask=is_token, other=-1)
    is_forbidden = is_token & (((words >> (tokens & 31)) & 1) == 0)
    tl.store(logits_ptr + row * stride_row + tokens, float("-inf"), mask=is_forbidden)
