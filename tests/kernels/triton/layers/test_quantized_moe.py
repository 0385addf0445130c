"""Mixtures of quantised experts in Triton against the definition with the floats that their codes stand for."""

import pytest
import torch

import kernels.reference.moe
from kernels.reference.quantized import round_to_groups
from kernels.triton.configs import MoeConfig
from kernels.triton.layers.quantized_moe import mix_quantized_experts
from kernels.triton.quantized.matrix import QuantizedMatrix, make_matrix

TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-2}
SMALL = MoeConfig(rows=16, columns=32, stages=2)


def random_experts(
    num_experts: int, shape: tuple[int, int], bits: int, group_size: int, device: torch.device
) -> QuantizedMatrix:
    options = {"bits": bits, "group_size": group_size, "is_symmetric": False, "scale_dtype": torch.bfloat16}
    weight, order = 0.3 * torch.randn(num_experts * shape[0], shape[1], device=device), torch.randperm(shape[1])
    codes = round_to_groups(weight, **options)
    return make_matrix(*codes, bits=bits, group_size=group_size, order=order.to(device) if bits == 8 else None)


def dense(experts: QuantizedMatrix, num_experts: int) -> torch.Tensor:
    return experts.dense().unflatten(0, (num_experts, -1))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, 128), (8, 64)])
def test_experts_are_mixed_as_defined(device: torch.device, dtype: torch.dtype, bits: int, group_size: int) -> None:
    num_tokens, hidden_size, size, num_experts = 11, 256, 64 if group_size < 128 else 128, 4
    x = torch.randn(num_tokens, hidden_size, device=device).to(dtype)
    gate_up = random_experts(num_experts, (2 * size, hidden_size), bits, group_size, device)
    down = random_experts(num_experts, (hidden_size, size), bits, group_size, device)
    logits = torch.randn(num_tokens, num_experts, device=device)
    logits[:, 3] = -9.0  # an expert that nobody asks for
    weights, experts = kernels.reference.moe.route(logits, 2, normalise=True)
    found = mix_quantized_experts(x, gate_up, down, weights, experts, config=SMALL)
    assert found.dtype == dtype
    expected = kernels.reference.moe.mix_experts(
        x.double(), dense(gate_up, 4).double(), dense(down, 4).double(), weights, experts
    )
    error = (found.double() - expected).norm() / expected.norm()
    assert float(error) < TOLERANCES[dtype]


def test_floats_of_4_bits_with_scales_of_their_own(device: torch.device) -> None:
    """As gpt-oss has its experts, and NVFP4's global scale of each."""

    def draw(num_outputs: int, num_inputs: int) -> QuantizedMatrix:
        codes = torch.randint(16, (num_outputs, num_inputs), dtype=torch.uint8, device=device)
        scales = (2.0 ** torch.randint(-4, 1, (num_outputs, num_inputs // 32), device=device)).to(torch.float8_e8m0fnu)
        scale = (0.1 * torch.rand(3, device=device)).repeat_interleave(num_outputs // 3)
        return make_matrix(codes, scales, bits=4, group_size=32, values="e2m1", channel_scales=scale)

    gate_up, down = draw(3 * 64, 64), draw(3 * 64, 32)
    x = torch.randn(5, 64, device=device)
    weights, experts = kernels.reference.moe.route(torch.randn(5, 3, device=device), 2, normalise=False)
    found = mix_quantized_experts(x, gate_up, down, weights, experts, config=SMALL)
    expected = kernels.reference.moe.mix_experts(x, dense(gate_up, 3), dense(down, 3), weights, experts)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_no_token_and_one_token(device: torch.device) -> None:
    gate_up, down = random_experts(3, (32, 64), 4, 32, device), random_experts(3, (64, 16), 4, 16, device)
    weights, experts = kernels.reference.moe.route(torch.randn(1, 3, device=device), 2, normalise=True)
    x = torch.randn(1, 64, device=device)
    found = mix_quantized_experts(x, gate_up, down, weights, experts)
    expected = kernels.reference.moe.mix_experts(x, dense(gate_up, 3), dense(down, 3), weights, experts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert mix_quantized_experts(x[:0], gate_up, down, weights[:0], experts[:0]).shape == (0, 64)
