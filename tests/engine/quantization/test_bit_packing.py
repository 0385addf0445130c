"""Integers out of words, against a stream of single bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.quantization import bit_packing
from engine.quantization.bit_packing import num_padded_words, num_words, unpack_bits, unpack_padded_bits
from tests.support.quantizers import pack_bits, pack_padded_bits

SIZES = {"bits": st.integers(1, 8), "count": st.integers(1, 200), "num_rows": st.integers(1, 3), "seed": st.integers(0)}


@given(**SIZES)
def test_words_without_gaps_give_their_integers_back(bits: int, count: int, num_rows: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (num_rows, count))
    words = torch.from_numpy(pack_bits(values, bits))
    assert words.shape[1] == num_words(count, bits)
    assert torch.equal(unpack_bits(words, bits, count).long(), torch.from_numpy(values))


@given(**SIZES)
def test_integers_become_the_words_that_a_stream_of_bits_makes(bits: int, count: int, num_rows: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (num_rows, count))
    words = bit_packing.pack_bits(torch.from_numpy(values).to(torch.uint8), bits)
    assert torch.equal(words, torch.from_numpy(pack_bits(values, bits)))


@given(**SIZES)
def test_words_of_whole_integers_give_them_back(bits: int, count: int, num_rows: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (num_rows, count))
    words = torch.from_numpy(pack_padded_bits(values, bits))
    assert words.shape[1] == num_padded_words(count, bits)
    assert torch.equal(unpack_padded_bits(words, bits, count).long(), torch.from_numpy(values))


@pytest.mark.parametrize("bits", range(1, 9))
def test_columns_of_a_larger_tensor_are_read_too(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (7, 64))
    words = torch.from_numpy(pack_bits(values, bits)).T.contiguous().T
    assert torch.equal(unpack_bits(words, bits, 64).long(), torch.from_numpy(values))
