"""The noise: its definition in plain Python, and that it looks random in every direction."""

import math

import numpy as np
import pytest

from engine.sampling.noise import gumbel, noise_bits, noise_key, noise_keys, philox4x32, token_words

WORD = 0xFFFFFFFF


def _philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def _bits(seed: int, position: int, token: int) -> int:
    """The definition."""
    seed %= 1 << 64
    k0, k1, _, _ = _philox((position & WORD, position >> 32, 0, 0), (seed & WORD, seed >> 32))
    x = token
    x = (x ^ (x >> 16)) * 0x7FEB352D & WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & WORD
    x ^= k0
    x = (x ^ (x >> 16)) * 0x7FEB352D & WORD
    x = ((x ^ (x >> 15)) + k1) & WORD
    return x * 0x846CA68B & 0x7FFFFFFF


def _table(seeds: list[int], positions: list[int], vocab_size: int) -> np.ndarray:
    keys = noise_keys(np.array([seed % (1 << 64) for seed in seeds], dtype=np.uint64), np.array(positions))
    words = token_words(vocab_size)
    return np.stack([noise_bits(words, key) for key in keys])


def _chi_square(counts: np.ndarray) -> float:
    """How far counts of equally likely cells are from equal, in standard deviations."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    return (statistic - (counts.size - 1)) / math.sqrt(2 * (counts.size - 1))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that come with the authors' code
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected) -> None:
    words = [np.array([word], dtype=np.uint64) for word in (*counter, *key)]
    answer = philox4x32(tuple(words[:4]), tuple(words[4:]))
    assert tuple(int(word[0]) for word in answer) == expected == _philox(counter, key)


def test_bits_equal_their_definition_in_plain_python() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345]
    positions = [0, 1, 5, 2**31, 2**40, 77]
    bits = _table(seeds, positions, 3000)
    assert bits.dtype == np.uint32
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for token in [*range(50), *range(2900, 3000)]:
            assert bits[row, token] == _bits(seed, position, token)


def test_the_key_of_a_row_is_the_same_alone_and_among_others() -> None:
    positions = np.array([0, 1, 63, 64, 65, 1000, 2**31 + 5])
    for seed in (0, -1, 2**64 - 1, 77):
        keys = noise_keys(np.full(len(positions), seed % 2**64, dtype=np.uint64), positions)
        for position, key in zip(positions.tolist(), keys, strict=True):
            assert np.array_equal(noise_key(seed, position), key)


def test_gumbel_equals_its_definition_at_every_size_of_noise() -> None:
    bits = np.array([0, 1, 2, 1000, 2**20, 2**30, 2**31 - 2, 2**31 - 1], dtype=np.uint32)
    noise = gumbel(bits)
    assert noise.dtype == np.float32
    assert np.isfinite(noise).all()
    for bit, value in zip(bits.tolist(), noise.tolist(), strict=True):
        u = (2**32 - 2 * bit - 1) / 2**32
        assert value == np.float32(-math.log(-math.log(u)))
    assert (noise[:-1] > noise[1:]).all()


def test_noise_has_the_mean_and_variance_of_a_gumbel_distribution() -> None:
    noise = gumbel(_table(list(range(40)), list(range(40)), 10_000)).astype(np.float64)
    assert abs(noise.mean() - np.euler_gamma) < 4 * math.sqrt(math.pi**2 / 6 / noise.size)
    assert abs(noise.var() - math.pi**2 / 6) < 0.02


# Each of these cuts the noise along one direction; what varies along it is what must look independent.
SLICES = {
    "tokens of one row": lambda: _table([7], [3], 1 << 18).flatten(),
    "positions of one token": lambda: _table([7] * 50_000, list(range(50_000)), 3)[:, 2],
    "seeds of one token": lambda: _table(list(range(50_000)), [9] * 50_000, 3)[:, 1],
    "high seeds": lambda: _table([seed << 32 for seed in range(50_000)], [9] * 50_000, 3)[:, 1],
    "seed and position together": lambda: _table(list(range(50_000)), list(range(50_000)), 1)[:, 0],
    "rows and tokens": lambda: _table([3] * 64, list(range(64)), 2048).flatten(),
}


@pytest.mark.parametrize("name", SLICES)
def test_noise_is_uniform_and_neighbours_are_independent(name: str) -> None:
    bits = SLICES[name]().astype(np.int64)
    assert _chi_square(np.bincount(bits >> 23, minlength=256)) < 5
    assert _chi_square(np.bincount(bits & 0xFF, minlength=256)) < 5
    for lag in (1, 2, 3, 16, 256):
        first, second = bits[:-lag] >> 27, bits[lag:] >> 27
        assert _chi_square(np.bincount(first * 16 + second, minlength=256)) < 5, lag
    for bit in range(31):
        ones = int((bits >> bit & 1).sum())
        assert abs(ones - bits.size / 2) < 5 * math.sqrt(bits.size) / 2, bit


@pytest.mark.parametrize(("seed_step", "position_step"), [(1, 0), (0, 1), (1, -1), (1 << 32, 0), (0, 64)])
def test_rows_do_not_resemble_each_other(seed_step: int, position_step: int) -> None:
    """The same tokens in neighbouring rows, and the next tokens in neighbouring rows."""
    steps = range(40)
    seeds, positions = [5 + seed_step * i for i in steps], [4000 + position_step * i for i in steps]
    high = _table(seeds, positions, 5000) >> 27
    for shift in (0, 1, 2):
        pairs = high[:-1, : 5000 - shift].astype(np.int64) * 16 + high[1:, shift:]
        assert _chi_square(np.bincount(pairs.flatten(), minlength=256)) < 5


def test_the_tail_that_decides_among_many_tokens_is_as_long_as_it_should_be() -> None:
    """The largest noise of n tokens is Gumbel distributed around log(n): where sampling happens, for flat logits."""
    n = 4096
    largest = gumbel(_table(list(range(2000)), [11] * 2000, n).min(1)).astype(np.float64) - math.log(n)
    edges = [-math.log(-math.log(i / 20)) for i in range(1, 20)]
    counts = np.histogram(largest, bins=[-math.inf, *edges, math.inf])[0]
    assert _chi_square(counts) < 5
