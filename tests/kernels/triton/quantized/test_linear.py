"""Products with quantised matrices in Triton against their definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.reference.quantized import E2M1, round_to_groups
from kernels.triton.configs import QuantizedConfig, strict_quantized_config
from kernels.triton.quantized.linear import num_splits, quantized_linear
from kernels.triton.quantized.matrix import QuantizedMatrix, make_matrix

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


def check(
    x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None = None, config: QuantizedConfig | None = None
) -> None:
    found = quantized_linear(x, matrix, bias, config=config)
    assert found.dtype == x.dtype
    expected = x.double() @ matrix.dense().double().T + (0 if bias is None else bias.double())
    assert found.shape == expected.shape
    if found.numel():
        error = (found.double() - expected).norm() / expected.norm()
        assert float(error) < TOLERANCES[x.dtype], f"off by {float(error):.2g}"


def matrix_of(
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    **others: Any,
) -> QuantizedMatrix:
    weight = torch.randn(shape, device=device) + 0.3 * torch.randn(shape[0], 1, device=device)
    codes, scales, zeros = round_to_groups(
        weight, bits=max(bits, 2), group_size=group_size, is_symmetric=False, scale_dtype=torch.bfloat16
    )
    codes, zeros = codes.clamp(max=2**bits - 1), zeros.clamp(max=2**bits - 1)
    return make_matrix(codes, scales.to(dtype), zeros, bits=bits, group_size=group_size, **others)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_any_number_of_bits(device: torch.device, bits: int, dtype: torch.dtype) -> None:
    matrix = matrix_of((40, 256), bits, 128, device)
    check(torch.randn(3, 256, device=device).to(dtype), matrix, torch.randn(40, device=device).to(dtype))


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 384])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_any_groups_and_scales(
    device: torch.device, group_size: int, scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    matrix = matrix_of((33, 384), 4, group_size, device, dtype=scale_dtype)
    check(torch.randn(2, 384, device=device).to(dtype), matrix)


@pytest.mark.parametrize("shape", [(1, 16), (70, 48), (5, 208), (129, 576), (32, 33)])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("num_rows", [0, 1, 17])
def test_shapes_that_fill_no_tile(device: torch.device, shape: tuple[int, int], bits: int, num_rows: int) -> None:
    group_size = 16 if shape[1] % 16 == 0 else shape[1]
    matrix = matrix_of(shape, bits, group_size, device)
    check(torch.randn(num_rows, shape[1], device=device), matrix, torch.randn(shape[0], device=device))


def test_zeros_that_are_no_codes(device: torch.device) -> None:
    """As Q4_K has them, and HQQ: any number."""
    codes, scales = torch.randint(16, (20, 256), device=device), torch.rand(20, 4, device=device)
    zeros, x = 15 * torch.rand(20, 4, device=device), torch.randn(2, 256, device=device)
    check(x, make_matrix(codes, scales, zeros, bits=4, group_size=64))
    check(x, make_matrix(codes, scales, offsets=-zeros * scales, bits=4, group_size=64))
    check(x, make_matrix(codes, scales[:, :2], zeros[:, :2], bits=4, group_size=128))
    check(x.bfloat16(), make_matrix(codes, scales[:, :2], zeros[:, :2], bits=4, group_size=128))
    check(x, make_matrix(codes, scales[:, :1], zeros[:, :1], bits=4, group_size=256))


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_zero_may_be_one_more_than_the_largest_code(device: torch.device, bits: int, dtype: torch.dtype) -> None:
    """As GPTQ's first format has it, which stores one less."""
    codes, zeros = torch.randint(2**bits, (16, 128), device=device), torch.full((16, 1), 2**bits, device=device)
    zeros[:5] = 0
    matrix = make_matrix(codes, torch.ones(16, 1, device=device).half(), zeros, bits=bits, group_size=128)
    check(torch.randn(2, 128, device=device).to(dtype), matrix)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("group_size", "scale_dtype"), [(16, torch.float8_e4m3fn), (32, torch.float8_e8m0fnu)])
def test_floats_of_4_bits(device: torch.device, dtype: torch.dtype, group_size: int, scale_dtype: torch.dtype) -> None:
    """NVFP4 and MXFP4. Weights are exact in bfloat16 and float16, so that only the result is rounded."""
    codes = torch.randint(16, (24, 256), dtype=torch.uint8, device=device)
    scales = (2.0 ** torch.randint(-6, 7, (24, 256 // group_size), device=device)).to(scale_dtype)
    scale = torch.tensor(0.01, device=device)
    matrix = make_matrix(codes, scales, bits=4, group_size=group_size, values="e2m1", channel_scales=scale)
    check(torch.randn(3, 256, device=device).to(dtype), matrix)


def test_every_float_of_4_bits_is_what_the_table_says(device: torch.device) -> None:
    codes = torch.zeros(16, 32, dtype=torch.uint8, device=device)
    codes[:, 0] = codes[:, 5] = torch.arange(16, device=device)
    ones, x = torch.ones(16, 1, device=device), torch.zeros(1, 32, device=device)
    x[0, 0] = x[0, 5] = 1
    for dtype in TOLERANCES:
        plain = make_matrix(codes, ones, bits=4, group_size=32, values="e2m1")
        table = make_matrix(codes, ones, bits=4, group_size=32, values=torch.tensor(E2M1))
        for matrix in (plain, table):
            assert quantized_linear(x.to(dtype), matrix)[0].tolist() == [2 * value for value in E2M1]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("group_size", [128, 256])
def test_floats_of_8_bits(device: torch.device, dtype: torch.dtype, group_size: int) -> None:
    """All that are finite, each times each of its row's places."""
    finite = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8, device=device)
    codes = finite[torch.randint(len(finite), (24, 256), device=device)]
    scales = torch.rand(24, 256 // group_size, device=device)
    check(
        torch.randn(3, 256, device=device).to(dtype),
        make_matrix(codes, scales, bits=8, group_size=group_size, values="e4m3"),
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("group_size", [64, 256])
def test_a_table_of_16_values(device: torch.device, dtype: torch.dtype, group_size: int) -> None:
    codes = torch.randint(16, (24, 256), dtype=torch.uint8, device=device)
    scales = torch.rand(24, 256 // group_size, device=device).half()
    matrix = make_matrix(codes, scales, bits=4, group_size=group_size, values=torch.tensor(NF4, device=device))
    check(torch.randn(3, 256, device=device).to(dtype), matrix)


def test_inputs_in_the_order_of_their_importance(device: torch.device) -> None:
    matrix = matrix_of((20, 256), 4, 128, device, order=torch.randperm(256, device=device))
    check(torch.randn(3, 256, device=device), matrix)


@pytest.mark.parametrize("group_size", [64, 128, 1280])
def test_inputs_are_split_and_added_up(device: torch.device, group_size: int) -> None:
    matrix = matrix_of((40, 1280), 4, group_size, device)
    config = QuantizedConfig(rows=16, columns=32, stages=2, programs=8)
    assert num_splits(40, 1280, config) == 4
    check(torch.randn(3, 1280, device=device), matrix, torch.randn(40, device=device), config)


def test_with_one_config_a_row_depends_on_the_row_alone(device: torch.device) -> None:
    matrix = matrix_of((40, 640), 4, 128, device)
    x = torch.randn(70, 640, device=device)
    config = strict_quantized_config(x.dtype, chip="default")
    whole = quantized_linear(x, matrix, config=config)
    for rows in (slice(0, 1), slice(3, 5), slice(40, 70)):
        found = quantized_linear(x[rows], matrix, config=config)
        if device.type == "cuda":
            assert torch.equal(found, whole[rows])
        else:  # the host's BLAS adds up, in an order of its own
            torch.testing.assert_close(found, whole[rows])


def test_a_row_that_is_no_number_spoils_no_other(device: torch.device) -> None:
    matrix = matrix_of((40, 200), 4, 200, device)
    x = torch.randn(3, 200, device=device)
    expected = quantized_linear(x, matrix)
    x[1, 7] = torch.nan
    found = quantized_linear(x, matrix)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert found[1].isnan().all()


def test_the_number_of_splits_never_leaves_a_program_idle() -> None:
    for num_inputs in range(128, 20_000, 128):
        for programs in (1, 132, 512, 5000):
            config = QuantizedConfig(programs=programs)
            splits, num_steps = num_splits(4096, num_inputs, config), num_inputs // 128
            assert (splits - 1) * -(-num_steps // splits) < num_steps
            assert splits == 1 or 64 * splits <= programs
