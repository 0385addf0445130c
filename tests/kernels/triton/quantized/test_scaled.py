"""Products of quantised rows with quantised matrices in Triton against their definition."""

import pytest
import torch
from torch import Tensor

import kernels.reference.quantized as reference
from kernels.triton.configs import QuantizedConfig
from kernels.triton.quantized.linear import quantized_linear
from kernels.triton.quantized.rows import quantize_rows
from kernels.triton.quantized.scaled import scaled_linear
from kernels.triton.quantized.scaled_matrix import ScaledMatrix, make_scaled_matrix, with_rows_as_they_are

FORMATS = [torch.int8, torch.float8_e4m3fn]


def random_matrix(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, blocks: tuple[int, int]
) -> ScaledMatrix:
    values, _ = reference.quantize_rows(torch.randn(shape, device=device), dtype)
    return make_scaled_matrix(values, torch.rand(blocks, device=device) + 0.1)


def dense_rows(x: Tensor, dtype: torch.dtype, *, in_groups: bool) -> Tensor:
    """The numbers that quantised rows stand for, by the definition, in float64."""
    groups = x.split(128, 1) if in_groups else [x]
    parts = [reference.quantize_rows(group, dtype) for group in groups]
    return torch.cat([values.double() * scales.double()[:, None] for values, scales in parts], 1)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("in_groups", [False, True])
def test_rows_are_quantised_as_defined(
    device: torch.device, dtype: torch.dtype, x_dtype: torch.dtype, in_groups: bool
) -> None:
    """All but what lies in the middle between two numbers, which goes to either."""
    x = (torch.randn(5, 2400, device=device) * torch.logspace(-2, 2, 5, device=device)[:, None]).to(x_dtype)
    x[3] = 0
    values, scales = quantize_rows(x, dtype, in_groups=in_groups)
    assert scales.shape == (5, 19 if in_groups else 1)
    spread = scales.double().repeat_interleave(128 if in_groups else 2400, 1)[:, :2400]
    found, expected = values.double() * spread, dense_rows(x, dtype, in_groups=in_groups)
    differs = (found - expected).abs() > 1e-6 * expected.abs()
    assert float(differs.double().mean()) < 0.01
    largest = 127.0 if dtype == torch.int8 else 448.0
    step = spread * (1 if dtype == torch.int8 else 32)
    assert ((found - expected).abs() <= step * 1.001).all()
    assert float(values.float().abs().max()) == largest


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("blocks", [(1, 1), (150, 1), (2, 3)])
@pytest.mark.parametrize("num_rows", [0, 1, 20])
def test_products_are_those_of_the_numbers(
    device: torch.device, dtype: torch.dtype, blocks: tuple[int, int], num_rows: int
) -> None:
    matrix, bias = random_matrix((150, 300), dtype, device, blocks), torch.randn(150, device=device)
    assert matrix.is_blocked == (blocks == (2, 3))
    x = torch.randn(num_rows, 300, device=device)
    expected = dense_rows(x, dtype, in_groups=matrix.is_blocked) @ matrix.dense().double().T + bias.double()
    tolerance = 1e-4 if dtype == torch.int8 else 2e-2  # of FP8: numbers in the middle
    for config in (None, QuantizedConfig(rows=16, columns=32, stages=2, programs=10)):
        found = scaled_linear(x, matrix, bias, config=config)
        assert found.dtype == x.dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * 30)


def test_the_matrix_of_the_definition_is_the_same() -> None:
    device = torch.device("cpu")
    for blocks in ((1, 1), (150, 1), (2, 3)):
        matrix = random_matrix((150, 300), torch.int8, device, blocks)
        eye = torch.eye(300)
        expected = reference.scaled_linear(eye, torch.ones(300), matrix.values, matrix.scales).T
        torch.testing.assert_close(matrix.dense().double(), expected)
        assert torch.equal(matrix.dense(slice(3, 140)), matrix.dense()[3:140])


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("blocks", [(1, 1), (150, 1), (2, 2)])
def test_the_same_numbers_meet_rows_that_are_not_quantised(
    device: torch.device, dtype: torch.dtype, blocks: tuple[int, int]
) -> None:
    matrix = random_matrix((150, 256), dtype, device, blocks)
    plain = with_rows_as_they_are(matrix)
    assert torch.equal(plain.dense(), matrix.dense())
    x = torch.randn(3, 256, device=device)
    expected = x.double() @ matrix.dense().double().T
    torch.testing.assert_close(quantized_linear(x, plain).double(), expected, rtol=1e-4, atol=1e-3)


def test_a_row_that_is_no_number_stays_none_and_spoils_no_other(device: torch.device) -> None:
    matrix, x = random_matrix((40, 200), torch.int8, device, (40, 1)), torch.randn(3, 200, device=device)
    expected = scaled_linear(x, matrix)
    x[1, 7] = torch.nan
    found = scaled_linear(x, matrix)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert found[1].isnan().all()


def test_what_does_not_fit_together_is_said_at_once() -> None:
    values = torch.zeros(150, 300, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"scales have shape \(2, 2\); a matrix of 150 x 300 has one"):
        make_scaled_matrix(values, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"values of torch\.float32"):
        make_scaled_matrix(values.float(), torch.ones(1))
    with pytest.raises(ValueError, match="infinite or no numbers"):
        make_scaled_matrix(values, torch.tensor(torch.nan))
    with pytest.raises(ValueError, match="infinite or no numbers"):
        make_scaled_matrix(torch.full((4, 4), torch.nan).to(torch.float8_e4m3fn), torch.ones(1))
