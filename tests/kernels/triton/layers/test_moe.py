"""Mixtures of experts in Triton against their definition."""

import pytest
import torch

import kernels.reference.moe
import kernels.triton.layers.moe
from kernels.triton.configs import MoeConfig

TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-2}
SMALL = MoeConfig(rows=16, columns=32, step=16, stages=2)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (10, 3), (8, 8)])
def test_every_token_goes_to_its_best_experts(
    device: torch.device, num_experts: int, top_k: int, normalise: bool
) -> None:
    logits = 3 * torch.randn(5, num_experts, device=device)
    logits[0, :] = 1.0  # the lowest numbers among equals
    found = kernels.triton.layers.moe.route(logits, top_k, normalise=normalise)
    expected = kernels.reference.moe.route(logits, top_k, normalise=normalise)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_experts_are_mixed_as_defined(device: torch.device, dtype: torch.dtype) -> None:
    num_tokens, hidden_size, size, num_experts = 21, 24, 40, 5
    x = torch.randn(num_tokens, hidden_size, device=device).to(dtype)
    gate_up = (0.3 * torch.randn(num_experts, 2 * size, hidden_size, device=device)).to(dtype)
    down = (0.3 * torch.randn(num_experts, hidden_size, size, device=device)).to(dtype)
    logits = torch.randn(num_tokens, num_experts, device=device)
    logits[:, 3] = -9.0  # an expert that nobody asks for
    weights, experts = kernels.reference.moe.route(logits, 2, normalise=True)
    assert 3 not in experts
    found = kernels.triton.layers.moe.mix_experts(x, gate_up, down, weights, experts, config=SMALL)
    expected = kernels.reference.moe.mix_experts(x.double(), gate_up.double(), down.double(), weights, experts)
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_one_token_and_many_experts(device: torch.device) -> None:
    x, gate_up = torch.randn(1, 16, device=device), torch.randn(40, 32, 16, device=device)
    down = torch.randn(40, 16, 16, device=device)
    weights, experts = kernels.reference.moe.route(torch.randn(1, 40, device=device), 4, normalise=False)
    found = kernels.triton.layers.moe.mix_experts(x, gate_up, down, weights, experts)
    torch.testing.assert_close(
        found, kernels.reference.moe.mix_experts(x, gate_up, down, weights, experts), rtol=1e-4, atol=1e-4
    )
