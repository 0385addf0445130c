"""The short cuts of sampling against what they replace: sorting, and evaluating every token."""

import numpy as np
import pytest
import torch

from engine.candidates import block_minima, block_tokens, most_likely
from engine.gumbel import float_weights, largest_score, largest_score_listed
from engine.noise import gumbel, noise_bits, noise_keys, token_words
from engine.nucleus import largest_score_in_nucleus
from engine.truncation import Limits, is_kept_sorted, truncated_list

CPU = torch.device("cpu")
KINDS = ["flat", "level", "normal", "steep", "rounded", "sparse", "heavy tail"]


def _gaps(kind: str, num_rows: int, vocab_size: int) -> torch.Tensor:
    torch.manual_seed(vocab_size)
    logits = torch.randn(num_rows, vocab_size)
    if kind == "flat":
        logits *= 0.01
    elif kind == "level":
        logits *= 0.0
    elif kind == "steep":
        logits *= 300.0
    elif kind == "rounded":
        logits = (3 * logits).round()
    elif kind == "sparse":
        logits[torch.rand_like(logits) < 0.99] = -torch.inf
        logits[:, -1] = 0.0
    elif kind == "heavy tail":
        logits = -1.1 * torch.rand_like(logits).argsort(-1).add(1).log()
    return logits.amax(-1, keepdim=True) + 0.0 - logits


def _keys(num_rows: int) -> torch.Tensor:
    return noise_keys(np.arange(num_rows, dtype=np.uint64), np.arange(num_rows), CPU)


def _every_score(gaps: torch.Tensor) -> torch.Tensor:
    return gumbel(noise_bits(token_words(gaps.shape[1], CPU)[None], _keys(len(gaps)))) - gaps


def _limits(num_rows: int, *, min_p: float = 0.0, top_k: int, top_p: float = 1.0) -> Limits:
    return Limits(
        torch.full((num_rows, 1), -np.log(min_p) if min_p else np.inf),
        torch.full((num_rows, 1), top_k),
        torch.full((num_rows, 1), top_p, dtype=torch.float64),
    )


@pytest.mark.parametrize(("vocab_size", "num_blocks"), [(10, 10), (10, 4), (64, 8), (65, 8), (1000, 37)])
def test_blocks_share_the_vocabulary_out(vocab_size: int, num_blocks: int) -> None:
    values = torch.randn(3, vocab_size)
    minima = block_minima(values, num_blocks)
    tokens = block_tokens(torch.arange(num_blocks), num_blocks=num_blocks, vocab_size=vocab_size)
    real = [[token for token in block if token < vocab_size] for block in tokens.tolist()]
    assert sorted(token for block in real for token in block) == list(range(vocab_size))
    assert torch.equal(minima, torch.stack([values[:, block].amin(1) for block in real], dim=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 5003])
def test_the_most_likely_tokens_are_the_first_of_the_sorted(kind: str, vocab_size: int) -> None:
    gaps = _gaps(kind, 5, vocab_size)
    for num_tokens in {1, min(5, vocab_size), min(300, vocab_size), vocab_size}:
        found, tokens = most_likely(gaps, num_tokens)
        expected, order = gaps.sort(dim=-1, stable=True)
        assert torch.equal(found, expected[:, :num_tokens])
        finite = found.isfinite()
        assert torch.equal(tokens[finite], order[:, :num_tokens][finite])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 63, 1000, 20_011])
def test_the_largest_score_is_that_of_evaluating_every_token(kind: str, vocab_size: int) -> None:
    gaps = _gaps(kind, 60, vocab_size)
    words = token_words(vocab_size, CPU)
    assert torch.equal(largest_score(gaps, float_weights(gaps), _keys(60), words), _every_score(gaps).argmax(-1))
    excluded = (torch.rand_like(gaps) < 0.5) & (gaps > 0)
    score = _every_score(gaps).masked_fill(excluded, -torch.inf)
    assert torch.equal(largest_score(gaps, float_weights(gaps) * ~excluded, _keys(60), words), score.argmax(-1))


def test_rows_in_several_passes_give_the_same() -> None:
    gaps = _gaps("normal", 60, 40_000)  # more than one pass of a million logits
    words = token_words(40_000, CPU)
    assert torch.equal(largest_score(gaps, float_weights(gaps), _keys(60), words), _every_score(gaps).argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_p", [1e-12, 0.01, 0.25, 0.5, 0.9, 0.99999, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.01])
def test_a_nucleus_that_is_never_built_gives_the_tokens_of_the_sorted(kind: str, top_p: float, min_p: float) -> None:
    vocab_size, num_rows = 4096, 40
    gaps = _gaps(kind, num_rows, vocab_size)
    limits = _limits(num_rows, min_p=min_p, top_k=vocab_size, top_p=top_p)
    is_kept = is_kept_sorted(gaps, limits)
    found = largest_score_in_nucleus(gaps, _keys(num_rows), token_words(vocab_size, CPU), limits)
    assert torch.equal(found, _every_score(gaps).masked_fill(~is_kept, -torch.inf).argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_keeps_what_sorting_keeps(kind: str) -> None:
    vocab_size, num_rows = 3000, 20
    gaps = _gaps(kind, num_rows, vocab_size)
    for top_k in (1, 10, 700):
        for top_p, min_p in ((1.0, 0.0), (0.9, 0.0), (0.5, 0.05)):
            limits = _limits(num_rows, min_p=min_p, top_k=top_k, top_p=top_p)
            listed, tokens = truncated_list(gaps, limits)
            is_kept = is_kept_sorted(gaps, limits) & gaps.isfinite()
            assert torch.equal(listed.isfinite().sum(-1), is_kept.sum(-1))
            assert is_kept.gather(1, tokens.clamp_max(vocab_size - 1))[listed.isfinite()].all()
            found = largest_score_listed(listed, tokens, _keys(num_rows), token_words(vocab_size, CPU))
            assert torch.equal(found, _every_score(gaps).masked_fill(~is_kept, -torch.inf).argmax(-1))


def test_a_nucleus_keeps_the_token_that_reaches_p_and_none_after_it() -> None:
    gaps = torch.zeros(1, 8)
    for num_kept, top_p in ((1, 0.125), (2, 0.1250001), (4, 0.5), (5, 0.500001), (8, 0.9)):
        kept = is_kept_sorted(gaps, _limits(1, top_k=8, top_p=top_p))
        assert kept[0].tolist() == [True] * num_kept + [False] * (8 - num_kept)
