"""Sampling of rows of logits on a CPU: the loops over a vocabulary.

Each kernel computes its rows on the thread that calls it, without the interpreter's lock. The tokens are defined by
`kernels.reference.sampling.sample_tokens`; `engine.sampling.gumbel` says how few of them need a logarithm.
"""

from __future__ import annotations

import math

import numpy as np
from numba import float32, int64, njit, types, uint32

from kernels.numba.kernel_cache import kernel
from kernels.numba.ops.elementwise import REORDERED

BLOCK_TOKENS = 256  # whose lowest time is noted, so that most of them are looked at once
# in place of a token: a row whose first tokens are listed, a row for others, and one whose logits are no numbers
LISTED, NOT_DECIDED, NOT_FINITE = -4, -3, -2
MAX_LISTED = 512  # tokens of a row
SLACK = 1.0 / 256  # of `engine.sampling.gumbel`

_FLOATS, _WORDS = types.Array(float32, 1, "C"), types.Array(uint32, 1, "C")
_ROWS, _KEYS = types.Array(float32, 2, "C"), types.Array(uint32, 2, "C")
_TOKENS, _LISTS = types.Array(int64, 1, "C"), types.Array(int64, 2, "C")
_LOG2E = np.float32(1.4426950408889634)
_SMALLEST_EXPONENT = np.float32(-126.0)  # below it, float32 loses its bits
_LOG2 = math.log(2.0)


@njit
def _noise_bits(word, first_key, second_key):
    """The noise bits of one token (`engine.sampling.noise`)."""
    x = np.uint32(word ^ first_key)  # Numba widens integers to 64 bits unless each result is cast
    x = np.uint32(x ^ np.uint32(x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ np.uint32(x >> np.uint32(15)))
    x = np.uint32(x + second_key)
    return np.uint32(np.uint32(x * np.uint32(0x846CA68B)) & np.uint32(0x7FFFFFFF))


@njit
def _time(bits, gap, time_of_gap):
    """The time of a token (`engine.sampling.gumbel`)."""
    return gap * time_of_gap + np.float32(np.float32(np.int32(bits)).view(np.int32))


@njit
def _score(bits, gap):
    """Gumbel noise less the gap, rounded as `engine.sampling.noise.gumbel` is."""
    v = (np.float64(bits) + 0.5) * 2.0**-31
    return np.float32(np.float32(-math.log(-math.log(1.0 - v))) - gap)


@njit
def _weight(gap):
    """exp(-gap), to about 2e-6 of it; 1e-38 for an infinite gap."""
    power = max(gap * -_LOG2E, _SMALLEST_EXPONENT)
    whole = np.int32(power)  # towards zero: the fraction lies in (-1, 0]
    x = np.float32(power - np.float32(whole))
    # 2^x, the series of exp(x * ln 2): the next term is below 2e-6
    y = np.float32(1.5252734e-5)
    y = y * x + np.float32(1.5403530e-4)
    y = y * x + np.float32(1.3333558e-3)
    y = y * x + np.float32(9.6181291e-3)
    y = y * x + np.float32(5.5504109e-2)
    y = y * x + np.float32(2.4022651e-1)
    y = y * x + np.float32(6.9314718e-1)
    y = y * x + np.float32(1.0)
    return y * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)


@kernel(types.void(_FLOATS, _WORDS, uint32, uint32, float32, _WORDS, _FLOATS), nogil=True)
def draw_noise(gaps, words, first_key, second_key, time_of_gap, bits, times):
    """Fills the noise bits (`engine.sampling.noise.noise_bits`) and the times (`engine.sampling.gumbel`) of all tokens.

    Both are in the order of the token ids, as `words`, of `engine.sampling.noise.token_words`.
    """
    for i in range(len(gaps)):
        bits[i] = _noise_bits(words[i], first_key, second_key)
        times[i] = _time(bits[i], gaps[i], time_of_gap)


@njit(fastmath=REORDERED)
def _sum_block(gaps):
    """The weight of a block of tokens: over more, float32 rounds equal gaps to one side, and that adds up."""
    total = np.float32(0.0)
    for i in range(len(gaps)):
        total += _weight(gaps[i])
    return total


@kernel(types.float32(_FLOATS), nogil=True)
def sum_weights(gaps):
    """The sum of exp(-gap), to about 5e-6 of it. Infinite gaps weigh 1e-38."""
    total = 0.0
    for start in range(0, len(gaps), BLOCK_TOKENS):
        total += _sum_block(gaps[start : start + BLOCK_TOKENS])
    return np.float32(total)


@njit
def _time_block(logits, words, gaps, times, row_max, facts, keys, time_of_gap):
    """Fills the gaps and times of some tokens, and returns the lowest time.

    The minimum is taken over integers of the same order as the times, since LLVM does not vectorise that of floats.
    """
    temperature, max_gap, first_key, second_key = facts[0], facts[1], keys[0], keys[1]
    low = np.int32(0x7FFFFFFF)
    for i in range(len(logits)):
        gap = np.float32(np.float32(row_max - logits[i]) / temperature)
        gap = gap if gap <= max_gap else np.float32(np.inf)
        gaps[i] = gap
        times[i] = time = np.float32(_time(_noise_bits(words[i], first_key, second_key), gap, time_of_gap))
        bits = np.float32(time).view(np.int32)
        low = min(low, np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return np.int32(low ^ ((low >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@njit
def _find_winner(logits, words, gaps, times, lows, row_max, facts, keys, time_of_gap):
    """The token with the largest score of a row, as `engine.sampling.gumbel.GumbelRace.winner`."""
    size = len(logits)
    for block in range(len(lows)):
        part = slice(block * BLOCK_TOKENS, min((block + 1) * BLOCK_TOKENS, size))
        lows[block] = _time_block(logits[part], words[part], gaps[part], times[part], row_max, facts, keys, time_of_gap)
    start = lows.argmin() * BLOCK_TOKENS
    first = start + times[start : min(start + BLOCK_TOKENS, size)].argmin()
    reached = np.float64(_score(_noise_bits(words[first], keys[0], keys[1]), gaps[first]))
    bound = np.float32((127.0 + 31.0 + SLACK - reached / _LOG2) * (1 << 23))
    winner, best = first, np.float32(-np.inf)
    for block in range(len(lows)):
        if lows[block] <= bound:
            for i in range(block * BLOCK_TOKENS, min((block + 1) * BLOCK_TOKENS, size)):
                if times[i] <= bound:
                    score = _score(_noise_bits(words[i], keys[0], keys[1]), gaps[i])
                    if score > best:
                        winner, best = i, score
    return winner


@njit(fastmath=REORDERED)
def _block_before(gaps, limit, token):
    """As `_weights_before`, of a block of tokens. limit: the gap of `token`, which counts from the first of them"""
    before, total = np.float32(0.0), np.float32(0.0)
    for i in range(len(gaps)):
        weight = _weight(gaps[i])
        total += weight
        before += weight if gaps[i] < limit or (gaps[i] == limit and i < token) else np.float32(0.0)
    return before, total


@njit
def _weights_before(gaps, token):
    """(before, total): the weights of the tokens before `token` in the order (gap, token id), and of all tokens."""
    before, total = 0.0, 0.0
    for start in range(0, len(gaps), BLOCK_TOKENS):
        parts = _block_before(gaps[start : start + BLOCK_TOKENS], gaps[token], token - start)
        before += parts[0]
        total += parts[1]
    return before, total


@njit
def _gap_block(logits, gaps, row_max, temperature):
    """Fills the gaps of some tokens; returns the lowest. (Gaps are not negative: their bits have their order.)"""
    low = np.int32(0x7FFFFFFF)
    for i in range(len(logits)):
        gaps[i] = gap = np.float32(np.float32(row_max - logits[i]) / temperature)
        low = min(low, np.float32(gap).view(np.int32))
    return np.int32(low).view(np.float32)


@njit
def _find_kth_lowest(values, k):
    """The k-th lowest, from 1 on, of floats that are not negative, whose bits have their order: a bit at a time, the
    largest number with fewer than k below it. (numpy's partition would take longer to compile than all else here.)
    """
    found = np.int32(0)
    for bit in range(30, -1, -1):
        tried, below = np.int32(found | np.int32(1 << bit)), 0
        for i in range(len(values)):
            if np.float32(values[i]).view(np.int32) < tried:
                below += 1
        if below < k:
            found = tried
    return np.int32(found).view(np.float32)


@njit
def _list_first(logits, gaps, lows, row_max, temperature, top_k, listed):
    """Lists every token whose gap is within the top_k-th lowest gap of a block, in ascending order: the first top_k in
    the order (gap, token id) are among them. Returns how many, or 0 for more than there is room for.
    """
    size, count = len(logits), 0
    for block in range(len(lows)):
        part = slice(block * BLOCK_TOKENS, min((block + 1) * BLOCK_TOKENS, size))
        lows[block] = _gap_block(logits[part], gaps[part], row_max, temperature)
    bound = _find_kth_lowest(lows, top_k)
    for block in range(len(lows)):
        if lows[block] <= bound:
            for i in range(block * BLOCK_TOKENS, min((block + 1) * BLOCK_TOKENS, size)):
                if gaps[i] <= bound:
                    if count == len(listed):
                        return 0
                    listed[count] = i
                    count += 1
    return count


@kernel(
    types.void(
        int64, int64, _ROWS, _TOKENS, _WORDS, _KEYS, _ROWS, float32, _ROWS, _FLOATS, _TOKENS, _ROWS, _LISTS, _TOKENS
    ),
    nogil=True,
)
def sample_rows(
    first, last, logits, best, words, keys, facts, time_of_gap, scratch, lows, tokens, weights, lists, counts
):
    """Samples rows first to last without top-p, or lists what top-k leaves of them; not those that are NOT_DECIDED.

    logits: [rows, vocab_size]; best: [rows] of each, the first of its largest; words: [vocab_size], keys: [rows, 2] of
    the noise; facts: [rows, 4] temperature (0 is greedy), largest gap, whether weights are wanted, top-k (0 is off, at
    most half of the blocks)
    scratch: [2, vocab_size], lows: one for each BLOCK_TOKENS, of this thread
    weights: [rows, 2] what `_weights_before` says of the winner; lists: [rows, MAX_LISTED] tokens, counts of which
    """
    for row in range(first, last):
        if tokens[row] == NOT_DECIDED:
            continue
        row_max = logits[row, best[row]]
        if not np.isfinite(row_max):
            tokens[row] = NOT_FINITE
        elif facts[row, 0] == 0.0:
            tokens[row] = best[row]
        elif facts[row, 3] != 0.0:
            top_k = int64(facts[row, 3])
            counts[row] = _list_first(logits[row], scratch[0], lows, row_max, facts[row, 0], top_k, lists[row])
            tokens[row] = LISTED if counts[row] > 0 else NOT_DECIDED
        else:
            gaps, times = scratch[0], scratch[1]
            winner = _find_winner(logits[row], words, gaps, times, lows, row_max, facts[row], keys[row], time_of_gap)
            if facts[row, 2] != 0.0:
                weights[row, 0], weights[row, 1] = _weights_before(gaps, winner)
            tokens[row] = winner


@njit
def _mask_block(logits, word, masked):
    """Masks up to 32 tokens. Returns whether any is no number or plus infinity, and whether any is possible."""
    is_broken, is_possible = False, False
    for i in range(len(logits)):
        value = logits[i]
        is_broken |= not (value < np.float32(np.inf))
        is_possible |= value > np.float32(-np.inf)
        masked[i] = value if (word >> np.uint32(i)) & np.uint32(1) else np.float32(-np.inf)
    return is_broken, is_possible


@kernel(types.void(int64, int64, _ROWS, _TOKENS, _KEYS, _ROWS, _TOKENS), nogil=True)
def mask_rows(first, last, logits, masks, words, masked, are_finite):
    """Copies rows first to last of logits, with minus infinity for the tokens that their masks do not allow.

    logits, masked: [rows, vocab_size]; masks: [rows] of each the row of its mask, or -1
    words: [masks, at least vocab_size / 32] bit i of word j says whether token 32 j + i is allowed
    are_finite: [masks] whether the largest logit was a finite number
    """
    size = logits.shape[1]
    for row in range(first, last):
        mask = masks[row]
        if mask < 0:
            masked[row] = logits[row]
            continue
        is_broken, is_possible = False, False
        for word in range((size + 31) // 32):
            part = slice(word * 32, min(word * 32 + 32, size))
            found = _mask_block(logits[row, part], words[mask, word], masked[row, part])
            is_broken |= found[0]
            is_possible |= found[1]
        are_finite[mask] = 1 if is_possible and not is_broken else 0
