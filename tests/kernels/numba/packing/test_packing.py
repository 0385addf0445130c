"""Which matrices a format holds exactly, and how far off it is where it does not."""

from __future__ import annotations

import random

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.numba.core.formats import BFLOAT16, FLOAT16, FLOAT32, FORMAT_OF, IN_QUADS, INT4, INT8
from kernels.numba.core.lanes import GROUP
from kernels.numba.packing.packing import SMALLEST_FIRST, fits_float16, in_quads, pack, pack_exactly, unpack

SHAPES = ((1, 32), (16, 64), (50, 96), (129, 576))
BLOCKS = {"Q4_0": INT4, "Q4_1": INT4, "Q8_0": INT8}


def as_in_a_file(weight: Tensor, block: str) -> Tensor:
    """The matrix that a GGUF file with such blocks gives back."""
    kind = gguf.GGMLQuantizationType[block]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind).copy())


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


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gguf_blocks_get_their_integers_back(shape: tuple[int, int], block: str) -> None:
    for scale in (1e-3, 0.02, 1.0, 40.0):
        weight = torch.randn(shape) * scale
        weight[1:2, :GROUP] = 0.0
        stored = as_in_a_file(weight, block)
        packed = pack_exactly(stored, among=SMALLEST_FIRST)
        assert packed is not None
        assert packed.kind == BLOCKS[block]
        assert torch.equal(unpack(packed), stored)


@pytest.mark.parametrize("block", BLOCKS)
def test_groups_that_are_no_noise_are_given_back_too(block: str) -> None:
    rng = random.Random(7)
    for _ in range(40):
        rows = [
            torch.full((GROUP,), rng.uniform(-3, 3)),  # constant
            torch.randint(0, 2, (GROUP,)) * rng.uniform(-1, 1),  # two levels
            -torch.rand(GROUP),  # all negative
            torch.rand(GROUP) + 1,
            torch.eye(GROUP)[rng.randrange(GROUP)] * -1e3,  # one large negative
            torch.randn(GROUP) * 1e-6,  # scales among float16's subnormal numbers
        ]
        stored = as_in_a_file(torch.stack(rows), block)
        packed = pack_exactly(stored, among=SMALLEST_FIRST)
        if packed is not None:
            assert torch.equal(unpack(packed), stored)
        for row in stored[[0, 2, 3, 4]]:  # what real files hold
            alone = pack_exactly(row[None], among=SMALLEST_FIRST)
            assert alone is not None
            assert torch.equal(unpack(alone)[0], row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_stay_as_they_are(dtype: torch.dtype) -> None:
    for shape in (*SHAPES, (40, 34)):  # 34: no groups
        weight = (torch.randn(shape) * torch.logspace(-3, 1, shape[1])).to(dtype).float()
        packed = pack_exactly(weight, among=SMALLEST_FIRST)
        assert packed is not None
        assert packed.kind == FORMAT_OF[dtype]
        assert torch.equal(unpack(packed), weight)


def test_float32_noise_fits_no_smaller_format() -> None:
    for shape in SHAPES:
        assert pack_exactly(torch.randn(shape), among=SMALLEST_FIRST) is None


def test_one_weight_of_another_value_decides() -> None:
    for block in BLOCKS:
        weight = as_in_a_file(torch.randn(40, 64), block)
        row, column = random.Random(1).randrange(40), 50
        weight[row, column] = torch.nextafter(weight[row, column], torch.tensor(10.0))
        packed = pack_exactly(weight, among=SMALLEST_FIRST)
        assert packed is None


@pytest.mark.parametrize("outlier", [torch.nan, torch.inf, -torch.inf, 3e38, 1e-45])
def test_no_format_is_said_to_hold_what_it_does_not(outlier: float) -> None:
    for block in (*BLOCKS, ""):
        weight = torch.randn(20, 64)
        weight = as_in_a_file(weight, block) if block else weight.bfloat16().float()
        weight[17, 40] = outlier
        for among in (SMALLEST_FIRST, (INT4,), (INT8,), (BFLOAT16,), (FLOAT16,)):
            packed = pack_exactly(weight, among=among)
            if packed is not None:
                assert torch.equal(unpack(packed), weight)  # bfloat16 does have infinities
                assert not weight.isnan().any()


@pytest.mark.parametrize("shape", SHAPES)
def test_integers_in_quads_are_the_same_in_as_many_bytes(shape: tuple[int, int]) -> None:
    for kind in (FLOAT32, BFLOAT16, FLOAT16, INT8, INT4):
        packed = pack(torch.randn(shape), kind)
        quads = in_quads(packed)
        assert quads.kind == IN_QUADS.get(kind, kind)
        assert torch.equal(unpack(quads), unpack(packed))
        assert quads.num_bytes == packed.num_bytes
        assert quads.num_panels == packed.num_panels
        assert (quads is packed) == (kind not in IN_QUADS)


def test_only_what_is_asked_for_is_tried() -> None:
    weight = as_in_a_file(torch.randn(16, 64), "Q8_0")
    assert pack_exactly(weight, among=(INT4,)) is None
    assert pack_exactly(weight, among=(INT4, INT8)).kind == INT8
    narrow = torch.randint(-4, 4, (16, 64)).float()  # whole numbers: many formats hold them
    for kind in (FLOAT16, BFLOAT16):
        assert pack_exactly(narrow, among=(kind,)).kind == kind


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
