"""Sampling one token per row on the device, without sorting and without a copy to the host in between."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling import GREEDY_BELOW, NO_TOKEN
from kernels.triton.compat import next_power_of_2
from kernels.triton.truncation import gap_bits, gap_of, read_gaps, truncate

_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_TWO_31 = tl.constexpr(2147483648.0)
_SLACK = tl.constexpr(1.0001)  # far more than the rounding of noise and scores, in float32
_TOKENS_AT_ONCE = 2048


def sample_tokens(
    logits: Tensor,
    temperatures: Tensor,
    keys: Tensor,
    max_gaps: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    *,
    none: int = NO_TOKEN,
) -> Tensor:
    """One token per row. [num_rows] int64; the lowest id among equals; `none` where the largest is not finite.

    The same tokens as the definition in `kernels.sampling`: the noise has the same bits, and what is kept is decided
    by exact sums.

    logits: [num_rows, vocab_size] float32; keys: [num_rows, 2] int32
    temperatures: [num_rows] float32; max_gaps: [num_rows] float32, infinity is off
    top_ks: [num_rows] int64, the vocabulary's size is off; top_ps: [num_rows] float64, 1 is off
    """
    num_rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32, f"{logits.dtype} logits"
    assert logits.stride(1) == 1, "rows are contiguous"
    assert keys.shape == (num_rows, 2), f"{tuple(keys.shape)} keys for {num_rows} rows"
    for column in (temperatures, max_gaps, top_ks, top_ps):
        assert column.shape == (num_rows,), f"{tuple(column.shape)} for {num_rows} rows"
    assert top_ps.dtype == torch.float64, f"{top_ps.dtype} loses bits of top_p"
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        sample_kernel[(num_rows,)](
            logits,
            temperatures,
            keys.contiguous(),
            max_gaps,
            top_ks,
            top_ps,
            tokens,
            vocab_size,
            logits.stride(0),
            none,
            TOKENS=min(_TOKENS_AT_ONCE, next_power_of_2(vocab_size)),
            num_warps=16,
        )
    return tokens


@triton.jit
def noise_bits(tokens, first_key, second_key):
    """31 bits per token, a hash of the token id and the row's key. tokens: int32; keys: uint32"""
    words = tokens.to(tl.uint32)
    words ^= words >> 16
    words *= 0x7FEB352D
    words ^= words >> 15
    words *= 0x846CA68B
    words ^= first_key
    words ^= words >> 16
    words *= 0x7FEB352D
    words ^= words >> 15
    words += second_key
    words *= 0x846CA68B
    return words & 0x7FFFFFFF


@triton.jit
def gumbel(bits):
    """Logarithms in float64, where 1 - v is exact; rounded to float32."""
    v = (bits.to(tl.float64) + 0.5) * (1.0 / _TWO_31)
    return (-tl.log(-tl.log(1.0 - v))).to(tl.float32)


@triton.jit
def sample_kernel(
    logits_ptr,
    temperatures_ptr,
    keys_ptr,
    max_gaps_ptr,
    top_ks_ptr,
    top_ps_ptr,
    tokens_ptr,
    vocab_size,
    stride_row,
    none,
    TOKENS: tl.constexpr,
):
    # grid: [num_rows]; one program reads its row a few dozen times, from the second-level cache but for the first
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    temperature = tl.load(temperatures_ptr + row)

    peaks = tl.full([TOKENS], float("-inf"), tl.float32)
    firsts = tl.zeros([TOKENS], tl.int32)
    has_nan = tl.zeros([TOKENS], tl.int32)
    for start in range(0, vocab_size, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        logits = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf"))
        has_nan |= (logits != logits).to(tl.int32)
        firsts = tl.where(logits > peaks, tokens, firsts)
        peaks = tl.where(logits > peaks, logits, peaks)
    peak = tl.max(peaks, 0)
    is_usable = (tl.max(has_nan, 0) == 0) & (peak > float("-inf")) & (peak < float("inf"))
    if not is_usable:
        tl.store(tokens_ptr + row, none)
        return
    if temperature < _GREEDY_BELOW:
        tl.store(tokens_ptr + row, tl.min(tl.where(peaks == peak, firsts, vocab_size), 0).to(tl.int64))
        return

    # a token is kept if its gap is below the cut, or at the cut and the token's id not above last_level
    cut, last_level = truncate(
        row_ptr,
        vocab_size,
        peak,
        temperature,
        tl.load(max_gaps_ptr + row),
        tl.load(top_ks_ptr + row).to(tl.int64),
        tl.load(top_ps_ptr + row),
        TOKENS,
    )
    first_key = tl.load(keys_ptr + 2 * row).to(tl.uint32, bitcast=True)
    second_key = tl.load(keys_ptr + 2 * row + 1).to(tl.uint32, bitcast=True)

    # noise never exceeds -log(v), so only tokens whose race v * exp(gap) is about the smallest can have the best score
    races = tl.full([TOKENS], float("inf"), tl.float32)
    runners = tl.zeros([TOKENS], tl.int32)
    for start in range(0, vocab_size, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        gaps = read_gaps(row_ptr, tokens, vocab_size, peak, temperature)
        bits = gap_bits(gaps)
        is_kept = (bits < cut) | ((bits == cut) & (tokens <= last_level))
        race = (noise_bits(tokens, first_key, second_key).to(tl.float32) + 0.5) * tl.exp(gaps)
        is_ahead = is_kept & (race < races)
        runners = tl.where(is_ahead, tokens, runners)
        races = tl.where(is_ahead, race, races)
    runner = tl.min(tl.where(races == tl.min(races, 0), runners, vocab_size), 0)
    runner_gap = gap_of(tl.load(row_ptr + runner), peak, temperature)
    reached = gumbel(noise_bits(runner, first_key, second_key)) - runner_gap
    bound = tl.exp(-reached) * (_SLACK * _TWO_31)

    best = float("-inf")
    winner = 0
    for start in range(0, vocab_size, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        gaps = read_gaps(row_ptr, tokens, vocab_size, peak, temperature)
        bits = gap_bits(gaps)
        noise = noise_bits(tokens, first_key, second_key)
        is_kept = (bits < cut) | ((bits == cut) & (tokens <= last_level))
        is_close = is_kept & ((noise.to(tl.float32) + 0.5) * tl.exp(gaps) <= bound)
        if tl.max(is_close.to(tl.int32), 0) > 0:
            scores = tl.where(is_close, gumbel(noise) - gaps, float("-inf"))
            top = tl.max(scores, 0)
            if top > best:
                best = top
                winner = tl.min(tl.where(scores == top, tokens, vocab_size), 0)
    tl.store(tokens_ptr + row, winner.to(tl.int64))
