"""Min-p, top-k and top-p on the device, without a sort: the gap at which a row is truncated, by a radix search.

Floats that are not negative have the order of their bits, so the cut is an integer. A histogram over the leading bits
of the gaps gives the bin that the cut is in; the tokens up to that bin are collected, and a search among them gives the
cut: each iteration sums the tokens below three thresholds, and keeps a quarter of the range. Sums are of integers, and
thus exact: the order of atomic additions, and of the collected tokens, does not change them.
"""

from __future__ import annotations

import triton
import triton.language as tl

NUM_BINS = tl.constexpr(256)
_BIN_BITS = tl.constexpr(19)  # leaves sixteen bins between a power of two and the next
_FIRST_BIN = tl.constexpr(0x3C800000 >> 19)  # of the gap 2^-6; smaller ones are in bin 0 too
_FAR_BITS = tl.constexpr(0x41800000)  # of the gap 16; all larger gaps are in the last bin
_WEIGHT_UNIT = tl.constexpr(1099511627776.0)  # 2^40
_ROUNDER = tl.constexpr(4503599627370496.0)  # 2^52: adding it leaves no fraction
_INFINITE_BITS = tl.constexpr(0x7F800000)


@triton.jit
def gap_of(logits, row_max, temperature):
    """(row_max - logits) / temperature, rounded as IEEE 754 demands, as on a CPU, which must sample the same tokens."""
    return tl.div_rn(row_max - logits, temperature)


@triton.jit
def gap_bits(gaps):
    """The bits of each gap as an int32, in the order of the gaps. Adding 0 makes a negative zero positive."""
    return (gaps + 0.0).to(tl.int32, bitcast=True)


@triton.jit
def weights_of(gaps):
    """exp(-gap) in units of 2^-40, rounded to an integer."""
    return ((tl.exp(-gaps.to(tl.float64)) * _WEIGHT_UNIT + _ROUNDER) - _ROUNDER).to(tl.int64)


@triton.jit
def bins_of(bits):
    bins = tl.maximum((bits >> _BIN_BITS) - _FIRST_BIN, 0)
    return tl.where(bits < _FAR_BITS, bins, NUM_BINS - 1)


@triton.jit
def before_bin(bin):
    """The largest bits below those of the bin."""
    start = tl.where(bin == NUM_BINS - 1, _FAR_BITS, (bin + _FIRST_BIN) << _BIN_BITS)
    return tl.where(bin == 0, -1, start - 1)


@triton.jit
def add_to_histogram(counts_ptr, weights_ptr, gaps, is_left, has_top_p):
    """Adds the tokens of a tile that min-p keeps to the bins of their row."""
    bits = gap_bits(gaps)
    bins = bins_of(bits)
    is_near = is_left & (bits < _FAR_BITS)
    is_far = is_left & (bits >= _FAR_BITS)
    tl.atomic_add(counts_ptr + bins, 1, mask=is_near)
    tl.atomic_add(counts_ptr + NUM_BINS - 1, tl.sum(is_far.to(tl.int32), 0))
    if has_top_p:
        weights = weights_of(gaps)
        tl.atomic_add(weights_ptr + bins, weights, mask=is_near)
        tl.atomic_add(weights_ptr + NUM_BINS - 1, tl.sum(tl.where(is_far, weights, 0), 0))


@triton.jit
def limit_of(total, top_p):
    """Top-p as a sum of weights: a token is kept while those before it sum to less."""
    return tl.maximum(tl.ceil(total.to(tl.float64) * top_p).to(tl.int64), 1)


@triton.jit
def read_bins(counts_ptr, weights_ptr, top_k, top_p):
    """(has_top_k, total, last_bin, before) of a row's histogram: whether top-k removes any token, the weight of all
    tokens, the bin of the last token that may be kept, and the count (with top-k) or weight of the bins before it."""
    bins = tl.arange(0, NUM_BINS)
    counts = tl.load(counts_ptr + bins).to(tl.int64)
    weights = tl.load(weights_ptr + bins)
    has_top_k = tl.sum(counts, 0) > top_k
    total = tl.sum(weights, 0)
    target = tl.where(has_top_k, top_k, limit_of(total, top_p))
    values = tl.where(has_top_k, counts, weights)
    last_bin = tl.sum((tl.cumsum(values, 0) < target).to(tl.int32), 0)
    last_bin = tl.where(has_top_k | (top_p < 1.0), last_bin, NUM_BINS - 1)
    before = tl.sum(tl.where(bins < last_bin, values, 0), 0)
    return has_top_k, total, last_bin, before


@triton.jit
def read_tokens(row_ptr, list_ptr, is_list, start, num, row_max, temperature, TOKENS: tl.constexpr):
    """Tokens start..start + TOKENS of a row, or of a list of its tokens, and their gaps. Beyond `num`: token -1."""
    indices = start + tl.arange(0, TOKENS)
    is_token = indices < num
    listed = tl.load(list_ptr + indices, mask=indices < tl.where(is_list, num, 0), other=0)
    tokens = tl.where(is_list, listed, indices)
    logits = tl.load(row_ptr + tokens, mask=is_token, other=float("-inf"))
    return tl.where(is_token, tokens, -1), is_token, gap_of(logits, row_max, temperature + tl.zeros_like(logits))


@triton.jit
def sums_up_to(
    row_ptr,
    list_ptr,
    is_list,
    num,
    row_max,
    temperature,
    low,
    first,
    second,
    third,
    BY_WEIGHT: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The number, or the weight, of the tokens with bits above `low` up to each of three ascending thresholds. int64"""
    to_first = tl.zeros([TOKENS], tl.int64)
    to_second = tl.zeros([TOKENS], tl.int64)
    to_third = tl.zeros([TOKENS], tl.int64)
    for start in range(0, num, TOKENS):
        _, is_token, gaps = read_tokens(row_ptr, list_ptr, is_list, start, num, row_max, temperature, TOKENS)
        bits = gap_bits(gaps)
        is_inside = (bits > low) & (bits <= third) & is_token
        if tl.max(is_inside.to(tl.int32), 0) > 0:  # spares exponentials in float64
            values = weights_of(gaps) if BY_WEIGHT else tl.full([TOKENS], 1, tl.int64)
            values = tl.where(is_inside, values, 0)
            to_third += values
            to_second += tl.where(bits <= second, values, 0)
            to_first += tl.where(bits <= first, values, 0)
    return tl.sum(to_first, 0), tl.sum(to_second, 0), tl.sum(to_third, 0)


@triton.jit
def search(
    row_ptr,
    list_ptr,
    is_list,
    num,
    row_max,
    temperature,
    low,
    high,
    below,
    target,
    BY_WEIGHT: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The smallest bits for which the tokens up to them reach the target, and the sum of the tokens below them.

    On entry, the tokens up to `low` sum to `below`, less than the target, and those up to `high` reach it.
    """
    while high - low > 1:
        quarter = (high - low + 3) // 4
        first = low + quarter
        second = tl.minimum(first + quarter, high)
        third = tl.minimum(second + quarter, high)
        to_first, to_second, to_third = sums_up_to(
            row_ptr, list_ptr, is_list, num, row_max, temperature, low, first, second, third, BY_WEIGHT, TOKENS
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
def last_of_level(
    row_ptr, list_ptr, is_list, num, vocab_size, row_max, temperature, cut, num_kept, TOKENS: tl.constexpr
):
    """The num_kept-th lowest id of the tokens at the cut, or, where there are no more, the vocabulary's highest id."""
    low = tl.full([], -1, tl.int32)
    high = tl.full([], 0, tl.int32) + vocab_size - 1
    middle = high  # the first iteration counts all tokens at the cut; mostly there is one
    while high - low > 1:
        num_found = tl.full([], 0, tl.int64)
        for start in range(0, num, TOKENS):
            tokens, is_token, gaps = read_tokens(row_ptr, list_ptr, is_list, start, num, row_max, temperature, TOKENS)
            is_level = is_token & (gap_bits(gaps) == cut) & (tokens <= middle)
            num_found += tl.sum(is_level.to(tl.int32), 0)
        if num_found <= num_kept and middle == vocab_size - 1:
            low = high  # all are kept
        elif num_found >= num_kept:
            high = middle
        else:
            low = middle
        middle = (low + high) // 2
    return high


@triton.jit
def truncate(
    row_ptr,
    list_ptr,
    is_list,
    num,
    vocab_size,
    row_max,
    temperature,
    max_gap,
    top_k,
    top_p,
    counts_ptr,
    weights_ptr,
    TOKENS: tl.constexpr,
):
    """(cut, last_level): the bits of the largest kept gap, and the highest token id that is kept among those at it.

    Needs the histogram of the row. The tokens must include all up to the last bin of `read_bins`.
    """
    has_top_k, total, last_bin, before = read_bins(counts_ptr, weights_ptr, top_k, top_p)
    cut = gap_bits(max_gap)
    num_level = tl.full([], 1, tl.int64) << 40  # tokens kept at the cut: all
    low = before_bin(last_bin)
    end = tl.minimum(before_bin(tl.minimum(last_bin + 1, NUM_BINS - 1)), cut)
    high = tl.where(last_bin == NUM_BINS - 1, cut, end)
    if has_top_k:
        cut, below = search(
            row_ptr, list_ptr, is_list, num, row_max, temperature, low, high, before, top_k, False, TOKENS
        )
        num_level = top_k - below
        low = tl.full([], -1, tl.int32)
        high = cut
        before = tl.full([], 0, tl.int64)
    if top_p < 1.0:
        if has_top_k:  # top-p is of what top-k keeps
            _, below, total = sums_up_to(
                row_ptr, list_ptr, is_list, num, row_max, temperature, -1, -1, cut - 1, cut, True, TOKENS
            )
            total = tl.minimum(total, below + num_level * weight_at(cut))
        limit = limit_of(total, top_p)
        old_cut = cut
        cut, below = search(
            row_ptr, list_ptr, is_list, num, row_max, temperature, low, high, before, limit, True, TOKENS
        )
        num_needed = tl.cdiv(limit - below, weight_at(cut))
        num_level = tl.where(cut == old_cut, tl.minimum(num_level, num_needed), num_needed)
    last_level = tl.full([], 0x7FFFFFFF, tl.int32)
    if has_top_k | (top_p < 1.0):
        last_level = last_of_level(
            row_ptr, list_ptr, is_list, num, vocab_size, row_max, temperature, cut, num_level, TOKENS
        )
    return cut, last_level


@triton.jit
def weight_at(bits):
    """The weight of a token whose gap has these bits, and at least 1, since callers divide by it."""
    weights = weights_of((bits + tl.zeros([1], tl.int32)).to(tl.float32, bitcast=True))
    return tl.maximum(tl.max(weights, 0), 1)
