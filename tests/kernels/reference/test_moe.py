"""Mixtures of experts against their formula, token by token in float64."""

import math

import pytest
import torch
from torch import Tensor

from kernels.reference.moe import mix_experts, route

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def formula(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    x, gate_up, down = x.double(), gate_up.double(), down.double()
    rows = []
    for token, shares, chosen in zip(x, weights.tolist(), experts.tolist(), strict=True):
        row = torch.zeros_like(token)
        for share, expert in zip(shares, chosen, strict=True):
            gate, up = (gate_up[expert] @ token).chunk(2)
            row += share * (down[expert] @ (gate * gate.sigmoid() * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 23])
def test_experts_are_mixed_by_their_shares(dtype: torch.dtype, num_tokens: int) -> None:
    x, gate_up, down = torch.randn(num_tokens, 12), 0.3 * torch.randn(7, 20, 12), 0.3 * torch.randn(7, 12, 10)
    x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    weights, experts = route(torch.randn(num_tokens, 7), 3, normalise=True)
    mixed = mix_experts(x, gate_up, down, weights, experts)
    assert mixed.dtype == dtype
    expected = formula(x, gate_up, down, weights, experts)
    torch.testing.assert_close(mixed.double(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


def test_experts_that_nobody_asks_for_are_not_read() -> None:
    x, gate_up, down = torch.randn(6, 12), torch.randn(5, 20, 12), torch.randn(5, 12, 10)
    experts = torch.tensor([[0, 3], [3, 0], [3, 4], [0, 4], [4, 3], [0, 3]])
    weights = torch.full((6, 2), 0.5)
    before = mix_experts(x, gate_up, down, weights, experts)
    gate_up[[1, 2]] = math.nan
    down[[1, 2]] = math.nan
    assert torch.equal(mix_experts(x, gate_up, down, weights, experts), before)


def test_no_tokens_mix_nothing() -> None:
    weights, experts = route(torch.randn(0, 5), 2, normalise=True)
    mixed = mix_experts(torch.randn(0, 12), torch.randn(5, 20, 12), torch.randn(5, 12, 10), weights, experts)
    assert mixed.shape == (0, 12)


def test_the_best_experts_are_chosen_and_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    shares, experts = route(logits, 2, normalise=False)
    assert experts.tolist() == [[1, 3], [0, 1]]
    torch.testing.assert_close(shares, logits.softmax(-1).gather(1, experts))
    shares, _ = route(logits, 2, normalise=True)
    torch.testing.assert_close(shares, torch.full((2, 2), 0.5))
