"""Which matrices a format holds exactly, and how far off it is where it does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.numba.core.formats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FORMAT_OF,
    GROUP,
    IN_QUADS,
    INT4,
    INT8,
    INTEGERS,
    QUADS,
    SIZES,
    concatenate,
)
from kernels.numba.packing.packing import (
    Stack,
    fits_float16,
    pack,
    pack_exactly,
    pack_levels,
    unpack,
    unpack_rows,
)
from tests.support.quantised import random_levels, weights_of

SHAPES = ((1, 32), (16, 64), (50, 96), (129, 576))
FORMATS = pytest.mark.parametrize("kind", INTEGERS, ids=(one.name for one in INTEGERS.values()))


def half_step(size: Tensor) -> Tensor:
    """How far rounding to float16 may be off: half of its last place, which is 2^-24 at the smallest."""
    return (size.abs() * 2**-11).clamp(min=2**-25)


def groups_of(weight: Tensor) -> Tensor:
    return weight.double().view(weight.shape[0], -1, GROUP)


@pytest.mark.parametrize("shape", SHAPES)
def test_float_formats_round_once(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape) * torch.logspace(-9, 3, shape[1])
    assert torch.equal(unpack(pack(weight, FLOAT32)), weight)
    assert torch.equal(unpack(pack(weight, BFLOAT16)), weight.bfloat16().float())
    half = unpack(pack(weight, FLOAT16))
    assert torch.equal(half, weight.half().float())
    assert ((half - weight).abs() <= half_step(weight)).all()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step_of_every_element(shape: tuple[int, int], scale: float) -> None:
    weight = scale * torch.randn(shape) * torch.logspace(-1, 1, shape[1])
    weight[0, :GROUP] = 0.0
    packed = pack(weight, INT8)
    assert packed.num_bytes == packed.num_panels * 16 * shape[1] * 34 // 32
    largest = groups_of(weight).abs().amax(-1, keepdim=True)
    step = largest / 127 + 2 * half_step(largest / 127)  # the scale is rounded up: by a whole step of float16
    error = (groups_of(unpack(packed)) - groups_of(weight)).abs()
    assert (error <= step / 2 * (1 + 1e-6)).all()
    assert (unpack(packed)[0, :GROUP] == 0).all()


@pytest.mark.parametrize("offset", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_within_half_a_step_or_the_rounding_of_its_offset(shape: tuple[int, int], offset: float) -> None:
    weight = torch.randn(shape) * torch.logspace(-1, 1, shape[1]) + offset
    weight[0, :GROUP] = 0.0
    packed = pack(weight, INT4)
    assert packed.num_bytes == packed.num_panels * 16 * shape[1] * 20 // 32
    low, high = (extreme.unsqueeze(-1) for extreme in groups_of(weight).aminmax(dim=-1))
    span = (high - low + half_step(low)) / 15
    step = span + 2 * half_step(span)
    error = (groups_of(unpack(packed)) - groups_of(weight)).abs()
    # what lies below an offset that was rounded up is held at it
    assert (error <= torch.maximum(step / 2, half_step(low)) * (1 + 1e-6)).all()
    assert (unpack(packed)[0, :GROUP] == 0).all()


@FORMATS
def test_levels_come_back_as_the_weights_they_stand_for(kind: int) -> None:
    step = INTEGERS[kind].depth_multiple
    for num_rows, depth in ((1, step), (16, 3 * step), (50, 2 * step), (129, 5 * step)):
        rows = random_levels(kind, num_rows, depth)
        packed, expected = pack_levels(rows, kind), weights_of(rows)
        assert packed.num_bytes == packed.num_panels * 16 * depth * SIZES[kind]
        assert torch.equal(unpack(packed), expected)
        chosen = torch.randint(0, num_rows, (7,))
        assert torch.equal(unpack_rows(packed, chosen), expected[chosen])


@FORMATS
def test_every_bit_of_a_level_has_a_place_of_its_own(kind: int) -> None:
    """One level after the other that is not like the rest."""
    weights, depth = INTEGERS[kind], 256
    rows = random_levels(kind, 16, depth)
    for element in range(GROUP):
        for bit in range(weights.bits):
            levels = torch.zeros_like(rows.levels)
            levels[:, element::GROUP] = (1 << bit) if bit < 7 else -128
            one = replace(rows, levels=levels)
            assert torch.equal(unpack(pack_levels(one, kind)), weights_of(one))


def test_a_stack_is_its_parts_from_top_to_bottom() -> None:
    kinds = [kind for kind in INTEGERS if kind < QUADS]
    pieces = [random_levels(kind, 16 * (1 + i % 3), 256) for i, kind in enumerate(kinds)]
    stack = Stack(tuple(pack_levels(piece, piece.kind) for piece in pieces))
    expected = torch.cat([weights_of(piece) for piece in pieces])
    assert stack.num_rows == len(expected)
    for start, stop in ((0, len(expected)), (5, 6), (15, 40), (16, 16), (100, len(expected))):
        assert torch.equal(stack.dense(start, stop), expected[start:stop])
    halves = random_levels(kinds[0], 5, 64), random_levels(kinds[0], 3, 64)
    assert torch.equal(weights_of(concatenate(halves)), torch.cat([weights_of(half) for half in halves]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_stay_as_they_are(dtype: torch.dtype) -> None:
    for shape in (*SHAPES, (40, 34)):  # 34: no groups
        weight = (torch.randn(shape) * torch.logspace(-3, 1, shape[1])).to(dtype).float()
        packed = pack_exactly(weight, FORMAT_OF[dtype])
        assert packed is not None
        assert packed.kind == FORMAT_OF[dtype]
        assert torch.equal(unpack(packed), weight)


def test_float32_noise_fits_no_smaller_format() -> None:
    for shape in SHAPES:
        for kind in (BFLOAT16, FLOAT16):
            assert pack_exactly(torch.randn(shape), kind) is None


@pytest.mark.parametrize("outlier", [torch.nan, torch.inf, -torch.inf, 3e38, 1e-45])
def test_no_format_is_said_to_hold_what_it_does_not(outlier: float) -> None:
    weight = torch.randn(20, 64).bfloat16().float()
    weight[17, 40] = outlier
    for kind in (BFLOAT16, FLOAT16):
        packed = pack_exactly(weight, kind)
        if packed is not None:
            assert torch.equal(unpack(packed), weight)  # bfloat16 does have infinities
            assert not weight.isnan().any()


@pytest.mark.parametrize("shape", SHAPES)
def test_integers_in_quads_are_the_same_in_as_many_bytes(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    for kind in (INT8, INT4):
        packed, quads = pack(weight, kind), pack(weight, IN_QUADS[kind])
        assert quads.kind == IN_QUADS[kind]
        assert torch.equal(unpack(quads), unpack(packed))
        assert quads.num_bytes == packed.num_bytes
        assert quads.num_panels == packed.num_panels


def test_a_matrix_beyond_float16_is_recognised() -> None:
    weight = torch.randn(8, 8)
    assert fits_float16(weight)
    for outlier in (7e4, -7e4, torch.inf, torch.nan):
        weight[3, 4] = outlier
        assert not fits_float16(weight)


def test_packing_is_the_same_for_a_view_and_for_half_precision() -> None:
    weight = torch.randn(40, 64, dtype=torch.float64).to(torch.bfloat16)
    view = weight[::2]
    for kind in (FLOAT32, BFLOAT16, FLOAT16, INT8, INT4):
        assert np.array_equal(unpack(pack(view, kind)), unpack(pack(view.float().contiguous(), kind)))


def test_a_matrix_in_an_order_of_its_own_is_given_back_as_rows_have_it() -> None:
    weight, order = torch.randn(50, 96), torch.randperm(96)
    for kind in (FLOAT16, INT8, INT4, QUADS + INT4):
        in_order = pack(weight[:, order], kind)
        packed = replace(in_order, order=order)
        assert torch.equal(unpack(packed)[:, order], unpack(in_order))
        assert torch.equal(Stack((packed,)).dense(17, 40), unpack(packed)[17:40])
