"""Blocks of GGUF files stay integers: what they stand for is what the gguf package says, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Format

from engine.loading.gguf.blocks import KINDS, Blocks
from kernels.numba.core.formats import INTEGERS, SIZES
from kernels.numba.packing.packing import pack_levels, unpack
from tests.support.gguf_files import BLOCKS, random_blocks
from tests.support.quantised import weights_of

FORMATS = pytest.mark.parametrize("format", BLOCKS, ids=lambda format: format.name)


def blocks_of(raw: np.ndarray, format: Format) -> Blocks:
    num_elements, num_bytes = gguf.GGML_QUANT_SIZES[format]
    shape = (raw.shape[0], raw.shape[1] // num_bytes * num_elements)
    return Blocks.of(torch.from_numpy(raw.copy()).flatten(), format, shape, "m.gguf: tensor 'a'")


@FORMATS
def test_weights_are_the_package_s_bit_for_bit(format: Format) -> None:
    raw = random_blocks(np.random.default_rng(int(format)), (37, 768), format)
    expected = torch.from_numpy(gguf.dequantize(raw, format))
    blocks = blocks_of(raw, format)
    assert expected.square().mean().sqrt() < 1
    assert torch.equal(weights_of(blocks.levels(0, 37)), expected)
    assert torch.equal(weights_of(blocks.levels(5, 9)), expected[5:9])
    assert torch.equal(blocks.dense(5, 9), expected[5:9])
    assert torch.equal(unpack(pack_levels(blocks.levels(0, 37), blocks.kind)), expected)


@FORMATS
def test_any_bits_with_finite_scales_are_weights(format: Format) -> None:
    raw = np.random.default_rng(1).integers(0, 256, (64, 4 * gguf.GGML_QUANT_SIZES[format][1]), np.uint8)
    cells = raw.reshape(-1, gguf.GGML_QUANT_SIZES[format][1])
    for place in BLOCKS[format]:
        cells[:, place + 1] &= 0xBF  # of the exponent, so that it is neither infinite nor no number
    blocks = blocks_of(raw, format)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = torch.from_numpy(gguf.dequantize(raw, format))
    assert torch.equal(weights_of(blocks.levels(0, 64)), expected)
    assert torch.equal(unpack(pack_levels(blocks.levels(0, 64), blocks.kind)), expected)


@pytest.mark.parametrize("format", [format for format in BLOCKS if BLOCKS[format]], ids=lambda format: format.name)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_scales_that_are_no_numbers_are_refused(format: Format, bad: float) -> None:
    raw = random_blocks(np.random.default_rng(0), (8, 256), format)
    place = BLOCKS[format][-1]
    raw[5, place : place + 2] = np.array([bad], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match=r"tensor 'a' has scales that are no numbers; the file is damaged"):
        blocks_of(raw, format).levels(0, 8)


@FORMATS
def test_levels_take_as_many_bytes_as_their_blocks_or_little_more(format: Format) -> None:
    num_elements, num_bytes = gguf.GGML_QUANT_SIZES[format]
    size, in_file = SIZES[KINDS[format]], num_bytes / num_elements
    more = {Format.Q2_K: 0.063, Format.MXFP4: 0.032}.get(format, 0.016)  # scales in bytes, an exponent in two
    assert in_file <= size <= in_file + more
    assert INTEGERS[KINDS[format]].bits <= 8
