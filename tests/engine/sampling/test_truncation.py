"""The short cuts of sampling against what they replace: sorting, and evaluating every token."""

from collections.abc import Iterator

import numpy as np
import pytest

from engine.sampling.gumbel import GumbelRace
from engine.sampling.noise import gumbel, noise_bits, noise_key, token_words
from engine.sampling.numba_sampler import NumbaRace
from engine.sampling.truncation import Limits, Nucleus, first_tokens, most_likely

KINDS = ["flat", "level", "normal", "steep", "rounded", "sparse", "heavy tail"]
RACES = [GumbelRace, NumbaRace]
OFF = Limits(np.float32(np.inf), 1 << 30, 1.0)


@pytest.fixture(autouse=True)
def _infinities() -> Iterator[None]:
    with np.errstate(over="ignore"):
        yield


def _gaps(kind: str, num_rows: int, vocab_size: int) -> np.ndarray:
    random = np.random.default_rng(vocab_size)
    logits = random.standard_normal((num_rows, vocab_size), dtype=np.float32)
    if kind == "flat":
        logits *= 0.01
    elif kind == "level":
        logits *= 0.0
    elif kind == "steep":
        logits *= 300.0
    elif kind == "rounded":
        logits = np.rint(3 * logits)
    elif kind == "sparse":
        logits[random.random(logits.shape) < 0.99] = -np.inf
        logits[:, -1] = 0.0
    elif kind == "heavy tail":
        logits = (-1.1 * np.log(logits.argsort(-1) + 1)).astype(np.float32)
    return logits.max(-1, keepdims=True) - logits


def _scores(gaps: np.ndarray, row: int) -> np.ndarray:
    return gumbel(noise_bits(token_words(len(gaps)), noise_key(row, row))) - gaps


def _is_kept(gaps: np.ndarray, limits: Limits) -> np.ndarray:
    """The definition: sort the row, and count."""
    order = np.argsort(gaps, kind="stable")
    order = order[gaps[order] <= limits.max_gap][: limits.top_k]
    weights = np.rint(np.exp(-gaps[order].astype(np.float64)) * 2.0**40).astype(np.int64)
    if limits.top_p < 1.0:
        order = order[(weights.cumsum() - weights) < max(1, np.ceil(float(weights.sum()) * limits.top_p))]
    is_kept = np.zeros(len(gaps), dtype=bool)
    is_kept[order] = True
    return is_kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 5003])
def test_the_most_likely_tokens_are_the_first_of_the_sorted(kind: str, vocab_size: int) -> None:
    for gaps in _gaps(kind, 5, vocab_size):
        order = np.argsort(gaps, kind="stable")
        for num_tokens in {1, min(5, vocab_size), min(300, vocab_size), vocab_size}:
            expected = order[:num_tokens]
            assert np.array_equal(most_likely(gaps, num_tokens), expected[np.isfinite(gaps[expected])])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 63, 1000, 20_011])
@pytest.mark.parametrize("race_class", RACES)
def test_the_winner_of_the_race_is_that_of_evaluating_every_token(
    kind: str, vocab_size: int, race_class: type[GumbelRace]
) -> None:
    race = race_class(vocab_size)
    for row, gaps in enumerate(_gaps(kind, 60, vocab_size)):
        assert race.winner(gaps, noise_key(row, row)) == _scores(gaps, row).argmax()
        gaps[(np.random.default_rng(row).random(vocab_size) < 0.5) & (gaps > 0)] = np.inf
        assert race.winner(gaps, noise_key(row, row)) == _scores(gaps, row).argmax()
        tokens = np.flatnonzero(gaps < np.inf)
        assert race.winner_among(tokens, gaps[tokens], noise_key(row, row)) == _scores(gaps, row).argmax()


def _key_for(word: int, bits: int) -> np.ndarray:
    """A key under which a token's word gives certain bits: the second half of the hash is undone."""
    first = 5
    x = word ^ first
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    second = (bits * pow(0x846CA68B, -1, 1 << 32) - x) % (1 << 32)
    return np.array([first, second], dtype=np.uint32)


@pytest.mark.parametrize("bits", [0, 1, 2, 2**31 - 1])
@pytest.mark.parametrize("race_class", RACES)
def test_the_rarest_noise_counts_as_its_score_says(bits: int, race_class: type[GumbelRace]) -> None:
    """Zero bits have no logarithm; the token may win with them from far behind, or even so not."""
    race, words, token = race_class(50), token_words(50), 17
    key = _key_for(int(words[token]), bits)
    assert noise_bits(words, key)[token] == bits
    for gap in (0.0, 5.0, 17.0, 19.0, 21.0, 23.0, 60.0, np.inf):
        gaps = np.linspace(0.0, 3.0, 50, dtype=np.float32)
        gaps[token] = gap
        assert race.winner(gaps, key) == (gumbel(noise_bits(words, key)) - gaps).argmax()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_p", [1e-12, 0.01, 0.25, 0.5, 0.9, 0.99999, 1.0 - 2**-53])
@pytest.mark.parametrize("max_gap", [np.inf, 4.6])
@pytest.mark.parametrize("race_class", RACES)
def test_a_nucleus_that_is_never_built_holds_the_tokens_of_the_sorted(
    kind: str, top_p: float, max_gap: float, race_class: type[GumbelRace]
) -> None:
    for gaps in _gaps(kind, 10, 700):
        gaps[gaps > np.float32(max_gap)] = np.inf
        nucleus = Nucleus(gaps, top_p, total=race_class(len(gaps)).total_weight(gaps))
        is_kept = _is_kept(gaps, OFF._replace(top_p=top_p, max_gap=np.float32(max_gap)))
        tokens = np.flatnonzero(gaps < np.inf)
        assert [nucleus.holds(nucleus.before(token)) for token in tokens] == is_kept[tokens].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_keeps_what_sorting_keeps(kind: str) -> None:
    for gaps in _gaps(kind, 20, 3000):
        for top_k in (1, 10, 700, 2999):
            for top_p, max_gap in ((1.0, np.inf), (0.9, np.inf), (0.5, 3.0), (0.001, 3.0)):
                limits = Limits(np.float32(max_gap), top_k, top_p)
                is_kept = _is_kept(gaps, limits) & np.isfinite(gaps)
                assert np.array_equal(first_tokens(gaps, limits), np.flatnonzero(is_kept))


@pytest.mark.parametrize("race_class", RACES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_total_of_a_row_is_close_enough_to_decide_by(kind: str, race_class: type[GumbelRace]) -> None:
    for gaps in _gaps(kind, 5, 20_011):
        exact = np.exp(-gaps.astype(np.float64)).sum()
        assert race_class(len(gaps)).total_weight(gaps) == pytest.approx(exact, rel=5e-6)


@pytest.mark.parametrize("race_class", RACES)
def test_the_rounding_of_equal_gaps_does_not_add_up_in_the_total(race_class: type[GumbelRace]) -> None:
    """Each is rounded to the same side, and a vocabulary may have many."""
    race = race_class(1 << 18)
    for gap in np.linspace(0.01, 20.0, 50, dtype=np.float32):
        gaps = np.full(1 << 18, gap)
        gaps[0] = 0.0
        exact = np.exp(-gaps.astype(np.float64)).sum()
        assert race.total_weight(gaps) == pytest.approx(exact, rel=5e-6)


def test_a_nucleus_keeps_the_token_that_reaches_p_and_none_after_it() -> None:
    gaps = np.zeros(8, dtype=np.float32)
    for num_kept, top_p in ((1, 0.125), (2, 0.1250001), (4, 0.5), (5, 0.500001), (8, 0.9)):
        assert first_tokens(gaps, Limits(np.float32(np.inf), 8, top_p)).tolist() == list(range(num_kept))
        nucleus = Nucleus(gaps, top_p, total=8.0)
        assert [nucleus.holds(nucleus.before(token)) for token in range(8)] == [token < num_kept for token in range(8)]
