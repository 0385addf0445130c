"""Quantised matrices and rows against their formulas."""

import pytest
import torch

from kernels.reference.quantized import E2M1, dequantize, quantize_rows, round_to_groups, scaled_linear


@pytest.fixture(autouse=True)
def _reproducible(one_thread_and_seed: None) -> None:
    """Every test begins with the same seed."""


def test_a_code_is_its_distance_from_the_zero_in_steps_and_the_offset() -> None:
    codes = torch.tensor([[0, 3, 15, 8]], dtype=torch.uint8)
    scales, zeros = torch.tensor([[0.5, 2.0]]), torch.tensor([[1, 8]])
    assert dequantize(codes, scales, zeros).tolist() == [[-0.5, 1.0, 14.0, 0.0]]
    offsets = torch.tensor([[10.0, -1.0]])
    assert dequantize(codes, scales, offsets=offsets).tolist() == [[10.0, 11.5, 29.0, 15.0]]
    assert dequantize(codes, scales, table=torch.tensor(E2M1)).tolist() == [[0.0, 0.75, -12.0, -0.0]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_stays_within_its_bound(bits: int, is_symmetric: bool, scale_dtype: torch.dtype) -> None:
    weight = torch.randn(20, 96) * torch.logspace(-2, 2, 20)[:, None]
    weight[3, :32] = 0
    weight[4, :32] = weight[4, :32].abs()
    options = {"bits": bits, "group_size": 32, "is_symmetric": is_symmetric, "scale_dtype": scale_dtype}
    codes, scales, zeros = round_to_groups(weight, **options)
    assert (scales.dtype, int(codes.max()) < 2**bits) == (scale_dtype, True)
    steps = scales.float().repeat_interleave(32, 1)
    rounding = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-23}[scale_dtype] * 2**bits
    error = (dequantize(codes, scales, zeros) - weight).abs() / steps
    assert float(error.max()) <= (0.5 if is_symmetric else 1.0) + rounding
    assert not dequantize(codes, scales, zeros)[3, :32].any()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 2.0**-4)])
def test_a_row_is_quantised_by_its_own_largest_magnitude(dtype: torch.dtype, bound: float) -> None:
    x = torch.randn(9, 40) * torch.logspace(-3, 3, 9)[:, None]
    x[2] = 0
    values, scales = quantize_rows(x, dtype)
    assert (values.dtype, scales.dtype, scales.shape) == (dtype, torch.float32, (9,))
    error = (values.float() * scales[:, None] - x).abs()
    assert (error <= bound * 1.001 * x.abs().amax(1, keepdim=True)).all()
    assert not values[2].float().any()


@pytest.mark.parametrize("blocks", [(1, 1), (200, 1), (2, 3)])
def test_a_scaled_product_is_that_of_the_floats(blocks: tuple[int, int]) -> None:
    values, row_scales = quantize_rows(torch.randn(4, 300), torch.int8)
    weight, scales = torch.randint(-127, 128, (200, 300), dtype=torch.int8), torch.rand(blocks)
    sizes = {1: 200, 200: 1, 2: 128}[blocks[0]], {1: 300, 3: 128}[blocks[1]]
    dense = torch.empty(200, 300, dtype=torch.float64)
    for n in range(200):
        for k in range(300):
            dense[n, k] = float(weight[n, k]) * float(scales[n // sizes[0], k // sizes[1]])
    expected = (values.double() * row_scales.double()[:, None]) @ dense.T
    torch.testing.assert_close(scaled_linear(values, row_scales, weight, scales), expected)
