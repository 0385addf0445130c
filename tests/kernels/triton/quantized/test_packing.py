"""Codes packed into words, and what a matrix may be made of."""

from typing import Any

import pytest
import torch

from kernels.reference.quantized import E2M1, dequantize
from kernels.triton.quantized.matrix import make_matrix
from kernels.triton.quantized.packing import PLANES, pack_codes, planes_of, unit_of, unpack_codes, words_shape


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("shape", [(1, 1), (37, 200), (8, 256)])
def test_codes_come_out_as_they_went_in(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(2**bits, shape, dtype=torch.uint8)
    words = pack_codes(codes, bits)
    assert words.shape == words_shape(*shape, bits)
    assert torch.equal(unpack_codes(words, shape[1], bits), codes)
    assert torch.equal(unpack_codes(words, shape[1], bits, slice(1, 9)), codes[1:9])


@pytest.mark.parametrize("bits", PLANES)
def test_no_bit_is_wasted(bits: int) -> None:
    num_units, num_blocks, _, _ = words_shape(5, 1024, bits)
    assert num_units * unit_of(bits) == 1024
    assert num_units * num_blocks * 4 * 32 == 1024 * bits
    assert sum(plane.width for plane in planes_of(bits)) == bits
    assert sum(plane.num_blocks for plane in planes_of(bits)) == num_blocks


def test_a_word_has_what_a_lane_multiplies_with() -> None:
    """The page's own words: of a block of 32 inputs, word c has inputs 8m + 2c + h at bits 4m + 16h."""
    words = pack_codes(torch.arange(32, dtype=torch.uint8)[None] % 16, 4)[0, 0, 0].tolist()
    for lane, word in enumerate(words):
        for pair in range(4):
            for half in range(2):
                assert (word >> (4 * pair + 16 * half)) & 15 == (8 * pair + 2 * lane + half) % 16


def random_parts(bits: int, group_size: int, shape: tuple[int, int] = (24, 256)) -> dict[str, Any]:
    groups = shape[0], shape[1] // group_size
    return {
        "codes": torch.randint(2**bits, shape, dtype=torch.uint8),
        "scales": torch.rand(groups) + 0.5,
        "zeros": torch.randint(2**bits + 1, groups),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_a_matrix_is_what_its_parts_stand_for(dtype: torch.dtype, has_zeros: bool) -> None:
    parts = random_parts(5, 64)
    parts["scales"] = parts["scales"].to(dtype)
    if not has_zeros:
        parts["zeros"] = None
    zeros = torch.full(parts["scales"].shape, 16) if parts["zeros"] is None else parts["zeros"]
    channels = torch.rand(24)
    order = torch.randperm(256)
    matrix = make_matrix(**parts, bits=5, group_size=64, order=order, channel_scales=channels)
    expected = torch.empty(24, 256)
    expected[:, order] = dequantize(parts["codes"], parts["scales"], zeros) * channels[:, None]
    torch.testing.assert_close(matrix.dense(), expected, rtol=0 if dtype.itemsize == 2 else 1e-6, atol=1e-5)
    assert torch.equal(matrix.dense(slice(3, 7)), matrix.dense()[3:7])
    assert matrix.nbytes == 24 * 256 * 5 // 8 + matrix.scales.nbytes + 24 * 4 + 256 * 8 + (
        0 if matrix.offsets is None else matrix.offsets.nbytes
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_floats_of_4_bits_with_scales_of_8_bits(dtype: torch.dtype) -> None:
    parts = random_parts(4, 16)
    scales = torch.tensor([0.25, 0.5, 1.0, 2.0])[torch.randint(4, parts["scales"].shape)].to(dtype)
    matrix = make_matrix(parts["codes"], scales, bits=4, group_size=16, values="e2m1", channel_scales=torch.tensor(3.0))
    assert torch.equal(matrix.dense(), 3 * dequantize(parts["codes"], scales, table=torch.tensor(E2M1)))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 9}, "codes of 9 bits"),
    "group": ({"group_size": 48}, "groups of 48 inputs; there are kernels for 16, 32, 64, 128 and all inputs"),
    "inputs": ({"codes": torch.zeros(24, 250, dtype=torch.uint8)}, "250 inputs is not made of groups of 64"),
    "scales": ({"scales": torch.ones(24, 3)}, r"scales have shape \(24, 3\), but \(24, 4\) groups"),
    "zeros": ({"zeros": torch.ones(4, 24)}, r"zeros have shape \(4, 24\)"),
    "codes": ({"codes": torch.full((24, 256), 16)}, "codes of 4 bits reach from 16 to 16"),
    "no codes": ({"codes": torch.zeros(0, 256)}, "a matrix"),
    "infinite": ({"scales": torch.full((24, 4), torch.inf)}, "scales are infinite"),
    "zero too large": ({"zeros": torch.full((24, 4), 17)}, "zeros of codes of 4 bits reach from 17 to 17"),
    "fraction": (
        {"scales": torch.ones(24, 4).half(), "zeros": torch.full((24, 4), 7.5)},
        "zeros that are no integers come with scales in float32",
    ),
    "dtype": ({"scales": torch.ones(24, 4).double()}, "scales are torch.float64"),
    "order": ({"order": torch.zeros(256)}, "no permutation of 256"),
    "order too short": ({"order": torch.arange(255)}, "no permutation of 256"),
    "offsets": ({"offsets": torch.ones(24, 4)}, "offsets come with scales in float32 and without zeros"),
    "floats": ({"values": "e2m1"}, "with zeros are no e2m1"),
    "table": ({"values": torch.ones(15), "zeros": None}, "a table of"),
    "no number": ({"codes": torch.full((24, 256), 255), "bits": 8, "zeros": None, "values": "e4m3"}, "no numbers"),
    "channels": ({"channel_scales": torch.ones(23)}, "23 scales for 24 rows"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_together_is_said_at_once(mistake: str) -> None:
    change, text = MISTAKES[mistake]
    with pytest.raises(ValueError, match=text):
        make_matrix(**{**random_parts(4, 64), "bits": 4, "group_size": 64, **change})
