"""Normalisation, rotary embedding and gated activations against their formulas in float64."""

import math

import pytest
import torch
from torch import Tensor

from kernels.reference.activation import gelu_and_mul, gelu_tanh_and_mul, silu_and_mul
from kernels.reference.norm import add_rms_norm, rms_norm
from kernels.reference.rope import apply_rope, rope_factors

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_its_formula(dtype: torch.dtype) -> None:
    for num_tokens, dim in ((1, 7), (5, 64), (33, 576)):
        x, weight = 4 * random(num_tokens, dim, dtype=dtype), random(dim, dtype=dtype)
        wide = x.double()
        expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        normed = rms_norm(x, weight, 1e-5)
        assert normed.dtype == dtype
        torch.testing.assert_close(normed.double(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


def test_add_rms_norm_returns_the_sum_and_its_norm_and_leaves_its_inputs() -> None:
    x, residual, weight = random(5, 48), random(5, 48), random(48)
    before = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(x + residual, weight, 1e-6))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("rotated", [16, 8, 4])
def test_rope_turns_each_pair_by_its_angle(rotated: int) -> None:
    q, k, angles = random(6, 3, 16), random(6, 1, 16), 10 * random(6, rotated // 2)
    for x, turned in zip((q, k), apply_rope(q, k, *rope_factors(angles)), strict=True):
        half = rotated // 2
        pairs = torch.complex(x[..., :half].double(), x[..., half:rotated].double())
        pairs = pairs * torch.polar(torch.ones_like(angles).double(), angles.double())[:, None]
        expected = torch.cat((pairs.real, pairs.imag, x[..., rotated:].double()), dim=-1)
        torch.testing.assert_close(turned.double(), expected, rtol=1e-4, atol=1e-5)


def test_rope_makes_scores_depend_on_distance_alone() -> None:
    q, k, frequencies = random(1, 1, 8), random(1, 1, 8), torch.tensor([1.0, 0.3, 0.1, 0.01])

    def score(query_position: int, key_position: int) -> float:
        turned_q, _ = apply_rope(q, k, *rope_factors(query_position * frequencies[None]))
        _, turned_k = apply_rope(q, k, *rope_factors(key_position * frequencies[None]))
        return float((turned_q * turned_k).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_rope_scale_multiplies_queries_and_keys() -> None:
    q, k, angles = random(2, 2, 8), random(2, 2, 8), random(2, 4)
    plain, scaled = (apply_rope(q, k, *rope_factors(angles, scale=scale)) for scale in (1.0, 1.25))
    torch.testing.assert_close(scaled[0], 1.25 * plain[0])
    torch.testing.assert_close(scaled[1], 1.25 * plain[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activations_are_their_formulas(dtype: torch.dtype) -> None:
    gate_up = 3 * random(5, 2 * 48, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    cubic = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    expected = {
        silu_and_mul: gate / (1 + (-gate).exp()) * up,
        gelu_and_mul: gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up,
        gelu_tanh_and_mul: gate * 0.5 * (1 + cubic.tanh()) * up,
    }
    before = gate_up.clone()
    for function, wanted in expected.items():
        torch.testing.assert_close(function(gate_up).double(), wanted, rtol=DTYPES[dtype], atol=DTYPES[dtype])
    assert torch.equal(gate_up, before)
