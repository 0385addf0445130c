"""Sampling one token per row on the device: Gumbel-max, without sorting and without a synchronisation.

A row of logits is divided into chunks that fit into the registers of a program, so that many programs read it. One
kernel finds the maximum of each chunk. For rows with top-k or top-p, a second adds the gaps to a histogram, and a third
collects the tokens that may be kept; for other rows, the third finds the best token of each chunk. The last kernel
reduces the chunks of each row to one token. All are launched in the current stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.sampling import GREEDY_BELOW, NO_TOKEN
from kernels.triton.compat import next_power_of_2
from kernels.triton.sampling.truncate import (
    NUM_BINS,
    add_to_histogram,
    bins_of,
    gap_bits,
    gap_of,
    read_bins,
    read_tokens,
    truncate,
)

_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_TWO_31 = tl.constexpr(2147483648.0)
_SLACK = tl.constexpr(1.0001)  # far more than the rounding of noise and scores, in float32
_COUNTS_STRIDE = tl.constexpr(NUM_BINS.value + 4)  # the bins, then the number of collected tokens, then padding
_TOKENS_AT_ONCE = 2048  # in a chunk
_MAX_COLLECTED = 8192  # tokens of a row; one with more candidates is searched as a whole, by one program, slowly


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
    """As `kernels.reference.sampling.sample_tokens`, and exactly the same tokens.

    is_random, is_truncated: False skips the kernels that only such rows need
    """
    num_rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32, f"{logits.dtype} logits"
    assert logits.stride(1) == 1, "rows are contiguous"
    assert keys.shape == (num_rows, 2), f"{tuple(keys.shape)} keys for {num_rows} rows"
    for column in (temperatures, max_gaps, top_ks, top_ps):
        assert column.shape == (num_rows,), f"{tuple(column.shape)} for {num_rows} rows"
    assert top_ps.dtype == torch.float64, f"{top_ps.dtype} loses bits of top_p"
    device = logits.device
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    if not num_rows:
        return tokens
    chunk = min(_TOKENS_AT_ONCE, next_power_of_2(vocab_size))
    num_chunks = triton.cdiv(vocab_size, chunk)
    chunk_maxima, scores = torch.empty(2, num_rows, num_chunks, dtype=torch.float32, device=device).unbind()
    firsts, winners = torch.empty(2, num_rows, num_chunks, dtype=torch.int32, device=device).unbind()
    counts = torch.empty(num_rows, _COUNTS_STRIDE.value, dtype=torch.int32, device=device)
    weights = torch.empty(num_rows, NUM_BINS.value, dtype=torch.int64, device=device)
    max_collected = min(_MAX_COLLECTED, num_chunks * chunk)
    collected = torch.empty(num_rows, max_collected, dtype=torch.int32, device=device)
    row = (logits, vocab_size, logits.stride(0), num_chunks)
    columns = (temperatures, max_gaps, top_ks, top_ps)
    sizes = {"TOKENS": chunk, "CHUNKS": next_power_of_2(num_chunks), "num_warps": 8}
    grid = (num_rows, num_chunks)
    chunk_max_kernel[grid](*row, chunk_maxima, firsts, counts, weights, TOKENS=chunk, num_warps=8)
    if is_random and is_truncated:
        histogram_kernel[grid](*row, *columns, chunk_maxima, counts, weights, **sizes)
    if is_random:
        chunk_kernel[grid](
            *row, *columns, keys.contiguous(), chunk_maxima, counts, weights, collected, scores, winners,
            MAX_COLLECTED=max_collected, **sizes,
        )  # fmt: skip
    reduce_kernel[(num_rows,)](
        *row, *columns, keys.contiguous(), chunk_maxima, firsts, counts, weights, collected, scores, winners, tokens,
        none, MAX_COLLECTED=max_collected, **sizes,
    )  # fmt: skip
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
def read_keys(keys_ptr, row):
    first = tl.load(keys_ptr + 2 * row).to(tl.uint32, bitcast=True)
    second = tl.load(keys_ptr + 2 * row + 1).to(tl.uint32, bitcast=True)
    return first, second


@triton.jit
def chunk_max_kernel(
    logits_ptr,
    vocab_size,
    stride_row,
    num_chunks,
    chunk_max_ptr,
    firsts_ptr,
    counts_ptr,
    weights_ptr,
    TOKENS: tl.constexpr,
):
    """The largest logit of each chunk, NaN where any is NaN, and the first token that has it."""
    # grid: [num_rows, num_chunks]; the program of a row's first chunk also clears the row's histogram
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    tokens = chunk * TOKENS + tl.arange(0, TOKENS)
    logits = tl.load(logits_ptr + row * stride_row + tokens, mask=tokens < vocab_size, other=float("-inf"))
    is_nan = logits != logits
    row_max = tl.max(tl.where(is_nan, float("-inf"), logits), 0)
    first = tl.min(tl.where(logits == row_max, tokens, vocab_size), 0)
    has_nan = tl.max(is_nan.to(tl.int32), 0) > 0
    tl.store(chunk_max_ptr + row * num_chunks + chunk, tl.where(has_nan, float("nan"), row_max))
    tl.store(firsts_ptr + row * num_chunks + chunk, first)
    if chunk == 0:
        bins = tl.arange(0, NUM_BINS)
        tl.store(counts_ptr + row * _COUNTS_STRIDE + bins, tl.zeros([NUM_BINS], tl.int32))
        tl.store(counts_ptr + row * _COUNTS_STRIDE + NUM_BINS, 0)
        tl.store(weights_ptr + row * NUM_BINS + bins, tl.zeros([NUM_BINS], tl.int64))


@triton.jit
def read_row_max(chunk_max_ptr, row, num_chunks, CHUNKS: tl.constexpr):
    """The row's largest logit, and whether it is finite, without which no token can be sampled."""
    chunks = tl.arange(0, CHUNKS)
    chunk_maxima = tl.load(chunk_max_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
    has_nan = tl.max((chunk_maxima != chunk_maxima).to(tl.int32), 0)
    row_max = tl.max(tl.where(chunk_maxima != chunk_maxima, float("-inf"), chunk_maxima), 0)
    return row_max, (has_nan == 0) & (row_max > float("-inf")) & (row_max < float("inf"))


@triton.jit
def read_chunk(row_ptr, chunk, vocab_size, row_max, temperature, max_gap, TOKENS: tl.constexpr):
    """The tokens of a chunk, their gaps, and which of them min-p keeps."""
    tokens = chunk * TOKENS + tl.arange(0, TOKENS)
    is_token = tokens < vocab_size
    logits = tl.load(row_ptr + tokens, mask=is_token, other=float("-inf"))
    gaps = gap_of(logits, row_max, temperature + tl.zeros_like(logits))
    return tokens, gaps, is_token & (gap_bits(gaps) <= gap_bits(max_gap))


@triton.jit
def histogram_kernel(
    logits_ptr,
    vocab_size,
    stride_row,
    num_chunks,
    temperatures_ptr,
    max_gaps_ptr,
    top_ks_ptr,
    top_ps_ptr,
    chunk_max_ptr,
    counts_ptr,
    weights_ptr,
    TOKENS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Adds the chunks of rows with top-k or top-p to the histograms of the rows."""
    # grid: [num_rows, num_chunks]
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row)
    top_p = tl.load(top_ps_ptr + row)
    if (temperature < _GREEDY_BELOW) | ((tl.load(top_ks_ptr + row) >= vocab_size) & (top_p >= 1.0)):
        return
    row_max, is_usable = read_row_max(chunk_max_ptr, row, num_chunks, CHUNKS)
    if not is_usable:
        return
    max_gap = tl.load(max_gaps_ptr + row)
    row_ptr = logits_ptr + row * stride_row
    _, gaps, is_left = read_chunk(row_ptr, tl.program_id(1), vocab_size, row_max, temperature, max_gap, TOKENS)
    add_to_histogram(
        counts_ptr + row * _COUNTS_STRIDE, weights_ptr + row * NUM_BINS, gaps, is_left, top_p < 1.0
    )  # fmt: skip


@triton.jit
def best_of(tokens, gaps, is_kept, first_key, second_key, vocab_size):
    """The best score of the kept tokens of a tile, and the lowest token that has it; minus infinity if none is kept.

    A score, noise - gap, is at most -log(v * exp(gap)), because noise never exceeds -log(v). So tokens are scored,
    which takes logarithms in float64, in ascending order of that product, until none that is left can exceed the best:
    one or two tokens, mostly.
    """
    products = (noise_bits(tokens, first_key, second_key).to(tl.float32) + 0.5) * tl.exp(gaps)
    products = tl.where(is_kept, products, float("inf"))
    smallest = tl.min(products, 0)
    bound = smallest
    best = tl.full([], float("-inf"), tl.float32)
    winner = tl.full([], 0, tl.int32) + vocab_size
    while (smallest <= bound) & (smallest < float("inf")):
        token = tl.min(tl.where(products == smallest, tokens, vocab_size), 0)
        gap = tl.max(tl.where(tokens == token, gaps, float("-inf")), 0)
        score = gumbel(noise_bits(token, first_key, second_key)) - gap
        winner = tl.where(score > best, token, tl.where(score == best, tl.minimum(winner, token), winner))
        best = tl.maximum(best, score)
        bound = tl.exp(-best) * (_SLACK * _TWO_31)
        products = tl.where(tokens == token, float("inf"), products)
        smallest = tl.min(products, 0)
    return best, winner


@triton.jit
def chunk_kernel(
    logits_ptr,
    vocab_size,
    stride_row,
    num_chunks,
    temperatures_ptr,
    max_gaps_ptr,
    top_ks_ptr,
    top_ps_ptr,
    keys_ptr,
    chunk_max_ptr,
    counts_ptr,
    weights_ptr,
    collected_ptr,
    scores_ptr,
    winners_ptr,
    TOKENS: tl.constexpr,
    CHUNKS: tl.constexpr,
    MAX_COLLECTED: tl.constexpr,
):
    """Collects the tokens of a chunk that top-k or top-p may keep; in rows with neither, finds its best token."""
    # grid: [num_rows, num_chunks]
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperatures_ptr + row)
    if temperature < _GREEDY_BELOW:
        return
    row_max, is_usable = read_row_max(chunk_max_ptr, row, num_chunks, CHUNKS)
    if not is_usable:
        return
    max_gap = tl.load(max_gaps_ptr + row)
    row_ptr = logits_ptr + row * stride_row
    tokens, gaps, is_left = read_chunk(row_ptr, chunk, vocab_size, row_max, temperature, max_gap, TOKENS)
    top_k = tl.load(top_ks_ptr + row).to(tl.int64)
    top_p = tl.load(top_ps_ptr + row)
    if (top_k >= vocab_size) & (top_p >= 1.0):
        first_key, second_key = read_keys(keys_ptr, row)
        score, winner = best_of(tokens, gaps, is_left, first_key, second_key, vocab_size)
        tl.store(scores_ptr + row * num_chunks + chunk, score)
        tl.store(winners_ptr + row * num_chunks + chunk, winner)
    else:
        counts_row = counts_ptr + row * _COUNTS_STRIDE
        _, _, last_bin, _ = read_bins(counts_row, weights_ptr + row * NUM_BINS, top_k, top_p)
        is_wanted = (is_left & (bins_of(gap_bits(gaps)) <= last_bin)).to(tl.int32)
        num_wanted = tl.sum(is_wanted, 0)
        if num_wanted > 0:
            first = tl.atomic_add(counts_row + NUM_BINS, num_wanted)
            indices = first + tl.cumsum(is_wanted, 0) - 1
            fits = (is_wanted > 0) & (indices < MAX_COLLECTED)
            tl.store(collected_ptr + row * MAX_COLLECTED + indices, tokens, mask=fits)


@triton.jit
def reduce_kernel(
    logits_ptr,
    vocab_size,
    stride_row,
    num_chunks,
    temperatures_ptr,
    max_gaps_ptr,
    top_ks_ptr,
    top_ps_ptr,
    keys_ptr,
    chunk_max_ptr,
    firsts_ptr,
    counts_ptr,
    weights_ptr,
    collected_ptr,
    scores_ptr,
    winners_ptr,
    tokens_ptr,
    none,
    TOKENS: tl.constexpr,
    CHUNKS: tl.constexpr,
    MAX_COLLECTED: tl.constexpr,
):
    """The sampled token of each row."""
    # grid: [num_rows]
    row = tl.program_id(0).to(tl.int64)
    row_max, is_usable = read_row_max(chunk_max_ptr, row, num_chunks, CHUNKS)
    if not is_usable:
        tl.store(tokens_ptr + row, none)
        return
    chunks = tl.arange(0, CHUNKS)
    is_chunk = chunks < num_chunks
    temperature = tl.load(temperatures_ptr + row)
    if temperature < _GREEDY_BELOW:
        chunk_maxima = tl.load(chunk_max_ptr + row * num_chunks + chunks, mask=is_chunk, other=float("-inf"))
        firsts = tl.load(firsts_ptr + row * num_chunks + chunks, mask=is_chunk, other=0)
        tl.store(
            tokens_ptr + row, tl.min(tl.where(is_chunk & (chunk_maxima == row_max), firsts, vocab_size), 0).to(tl.int64)
        )
        return
    top_k = tl.load(top_ks_ptr + row).to(tl.int64)
    top_p = tl.load(top_ps_ptr + row)
    if (top_k >= vocab_size) & (top_p >= 1.0):
        scores = tl.load(scores_ptr + row * num_chunks + chunks, mask=is_chunk, other=float("-inf"))
        winners = tl.load(winners_ptr + row * num_chunks + chunks, mask=is_chunk, other=0)
        is_best = is_chunk & (scores == tl.max(scores, 0))
        tl.store(tokens_ptr + row, tl.min(tl.where(is_best, winners, vocab_size), 0).to(tl.int64))
        return

    # kept: tokens whose gap is below the cut, and those at the cut with ids up to last_level
    row_ptr = logits_ptr + row * stride_row
    list_ptr = collected_ptr + row * MAX_COLLECTED
    counts_row = counts_ptr + row * _COUNTS_STRIDE
    num_collected = tl.load(counts_row + NUM_BINS)
    is_list = num_collected <= MAX_COLLECTED
    num = tl.where(is_list, num_collected, vocab_size)
    cut, last_level = truncate(
        row_ptr,
        list_ptr,
        is_list,
        num,
        vocab_size,
        row_max,
        temperature,
        tl.load(max_gaps_ptr + row),
        top_k,
        top_p,
        counts_row,
        weights_ptr + row * NUM_BINS,
        TOKENS,
    )
    first_key, second_key = read_keys(keys_ptr, row)
    best = float("-inf")
    winner = vocab_size
    for start in range(0, num, TOKENS):
        tokens, is_token, gaps = read_tokens(row_ptr, list_ptr, is_list, start, num, row_max, temperature, TOKENS)
        bits = gap_bits(gaps)
        is_kept = is_token & ((bits < cut) | ((bits == cut) & (tokens <= last_level)))
        score, token = best_of(tokens, gaps, is_kept, first_key, second_key, vocab_size)
        if score > best:
            best = score
            winner = token
        elif score == best:
            winner = tl.minimum(winner, token)
    tl.store(tokens_ptr + row, winner.to(tl.int64))
