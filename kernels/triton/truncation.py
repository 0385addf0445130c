"""Min-p, top-k and top-p on the device: a search for the gap where a row is cut, instead of a sort.

Floats that are not negative are ordered as their bits are, so the cut is found among integers: every pass over the row
sums what lies below three thresholds and leaves a quarter of the range. Sums are of integers, and exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

_WEIGHT_UNIT = tl.constexpr(1099511627776.0)  # 2^40
_ROUNDER = tl.constexpr(4503599627370496.0)  # 2^52: adding it leaves no fraction
_INFINITE_BITS = tl.constexpr(0x7F800000)


@triton.jit
def gap_of(logits, peak, temperature):
    """Divided as IEEE 754 says, or the tokens would not be those of a CPU."""
    return tl.div_rn(peak - logits, temperature)


@triton.jit
def read_gaps(row_ptr, tokens, vocab_size, peak, temperature):
    """The gaps of tokens; infinity for ids past the vocabulary."""
    logits = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf"))
    return gap_of(logits, peak, temperature + tl.zeros_like(logits))


@triton.jit
def gap_bits(gaps):
    """An int32 per gap, in the gaps' order. Plus 0 makes a zero's sign positive."""
    return (gaps + 0.0).to(tl.int32, bitcast=True)


@triton.jit
def weights_of(gaps):
    """exp(-gap) in units of 2^-40, rounded to an integer."""
    return ((tl.exp(-gaps.to(tl.float64)) * _WEIGHT_UNIT + _ROUNDER) - _ROUNDER).to(tl.int64)


@triton.jit
def sums_up_to(
    row_ptr,
    vocab_size,
    peak,
    temperature,
    low,
    first,
    second,
    third,
    BY_WEIGHT: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """What the tokens above `low` and up to each of three rising thresholds count, or weigh, together. int64"""
    to_first = tl.zeros([TOKENS], tl.int64)
    to_second = tl.zeros([TOKENS], tl.int64)
    to_third = tl.zeros([TOKENS], tl.int64)
    for start in range(0, vocab_size, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        gaps = read_gaps(row_ptr, tokens, vocab_size, peak, temperature)
        bits = gap_bits(gaps)
        is_inside = (bits > low) & (bits <= third) & (tokens < vocab_size)
        if tl.max(is_inside.to(tl.int32), 0) > 0:  # exponentials in float64 are dear
            values = weights_of(gaps) if BY_WEIGHT else tl.full([TOKENS], 1, tl.int64)
            values = tl.where(is_inside, values, 0)
            to_third += values
            to_second += tl.where(bits <= second, values, 0)
            to_first += tl.where(bits <= first, values, 0)
    return tl.sum(to_first, 0), tl.sum(to_second, 0), tl.sum(to_third, 0)


@triton.jit
def search(row_ptr, vocab_size, peak, temperature, high, target, BY_WEIGHT: tl.constexpr, TOKENS: tl.constexpr):
    """The lowest bits up to which tokens reach the target, and what the tokens below them have. They do reach it by
    `high`."""
    low = tl.full([], -1, tl.int32)
    below = tl.full([], 0, tl.int64)
    while high - low > 1:
        quarter = (high - low + 3) // 4
        first = low + quarter
        second = tl.minimum(first + quarter, high)
        third = tl.minimum(second + quarter, high)
        to_first, to_second, to_third = sums_up_to(
            row_ptr, vocab_size, peak, temperature, low, first, second, third, BY_WEIGHT, TOKENS
        )
        if below + to_first >= target:
            high = first
        elif below + to_second >= target:
            low = first
            high = second
            below += to_first
        elif below + to_third >= target:
            low = second
            high = third
            below += to_second
        else:
            low = third
            below += to_third
    return high, below


@triton.jit
def last_of_level(row_ptr, vocab_size, peak, temperature, cut, num_level, TOKENS: tl.constexpr):
    """The id of the num_level-th of the tokens at the cut."""
    num_seen = tl.full([], 0, tl.int64)
    last = tl.full([], -1, tl.int32)
    for start in range(0, vocab_size, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        is_level = gap_bits(read_gaps(row_ptr, tokens, vocab_size, peak, temperature)) == cut
        is_level = is_level & (tokens < vocab_size)
        if tl.max(is_level.to(tl.int32), 0) > 0:
            rank = num_seen + tl.cumsum(is_level.to(tl.int32), 0)
            is_kept = is_level & (rank <= num_level)
            last = tl.maximum(last, tl.max(tl.where(is_kept, tokens, -1), 0))
            num_seen += tl.sum(is_level.to(tl.int32), 0)
    return last


@triton.jit
def truncate(row_ptr, vocab_size, peak, temperature, max_gap, top_k, top_p, TOKENS: tl.constexpr):
    """The bits where the row is cut, and the last token id that is kept at the cut."""
    cut = gap_bits(max_gap)
    num_level = tl.full([], 1, tl.int64) << 40  # all of them
    is_cut = tl.full([], 0, tl.int32)
    if top_k < vocab_size:
        _, _, num_left = sums_up_to(row_ptr, vocab_size, peak, temperature, -1, cut, cut, cut, False, TOKENS)
        if num_left > top_k:
            cut, num_below = search(row_ptr, vocab_size, peak, temperature, cut, top_k, False, TOKENS)
            num_level = top_k - num_below
            is_cut = tl.full([], 1, tl.int32)
    if top_p < 1.0:
        # what min-p and top-k left, less what top-k cut off at its level
        _, below, total = sums_up_to(row_ptr, vocab_size, peak, temperature, -1, -1, cut - 1, cut, True, TOKENS)
        level_weight = tl.maximum(weights_of((cut + tl.zeros([1], tl.int32)).to(tl.float32, bitcast=True)), 1)
        total = tl.where(is_cut > 0, tl.minimum(total, below + num_level * tl.max(level_weight, 0)), total)
        limit = tl.maximum(tl.ceil(total.to(tl.float64) * top_p).to(tl.int64), 1)
        old_cut = cut
        cut, below = search(row_ptr, vocab_size, peak, temperature, cut, limit, True, TOKENS)
        level_weight = tl.maximum(weights_of((cut + tl.zeros([1], tl.int32)).to(tl.float32, bitcast=True)), 1)
        num_needed = tl.cdiv(limit - below, tl.max(level_weight, 0))
        num_level = tl.where(cut == old_cut, tl.minimum(num_level, num_needed), num_needed)
        is_cut = tl.full([], 1, tl.int32)
    last_level = tl.full([], 0x7FFFFFFF, tl.int32)
    if is_cut > 0:
        last_level = last_of_level(row_ptr, vocab_size, peak, temperature, cut, num_level, TOKENS)
    return cut, last_level
