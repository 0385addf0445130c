"""Norms, gated activations and the way from projection to attention, in Triton against their definitions."""

import pytest
import torch
from torch import Tensor

import kernels.reference.activation
import kernels.reference.norm
import kernels.reference.qkv
import kernels.triton.layers.activation
import kernels.triton.layers.norm
import kernels.triton.layers.qkv
from kernels.reference.rope import rope_factors

# the interpreter cuts bfloat16 off where a GPU rounds
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def check(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected.double(), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 7), (3, 576), (2, 3, 80)])
def test_norms(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual = (3 * torch.randn(2, *shape, device=device)).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    before = x.clone(), residual.clone()
    check(
        kernels.triton.layers.norm.rms_norm(x, weight, 1e-5),
        kernels.reference.norm.rms_norm(x.double(), weight, 1e-5),
        dtype,
    )
    normed, total = kernels.triton.layers.norm.add_rms_norm(x, residual, weight, 1e-5)
    wide = kernels.reference.norm.add_rms_norm(x.double(), residual.double(), weight.double(), 1e-5)
    check(normed, wide[0], dtype)
    check(total, wide[1], dtype)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_a_norm_of_some_heads_of_a_wider_tensor(device: torch.device) -> None:
    heads, weight = torch.randn(5, 6, 16, device=device), torch.randn(16, device=device)
    q = heads[:, 1:4]
    check(
        kernels.triton.layers.norm.rms_norm(q, weight, 1e-6),
        kernels.reference.norm.rms_norm(q, weight, 1e-6),
        torch.float32,
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # to infinity, as it should
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"])
def test_gated_activations(device: torch.device, dtype: torch.dtype, name: str) -> None:
    for size in (5, 1100):
        gate_up = (4 * torch.randn(2, 2 * size, device=device)).to(dtype)
        gate_up[0, :2] = torch.tensor([-300.0, 300.0])
        expected = getattr(kernels.reference.activation, name)(gate_up.double())
        check(getattr(kernels.triton.layers.activation, name)(gate_up), expected, dtype)


def check_rotation_and_store(
    device: torch.device, dtype: torch.dtype, norm: str, *, head_dim: int, width: int | None
) -> None:
    num_tokens, num_heads, num_kv_heads = 3, 3, 2
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=device).to(dtype)
    cos, sin = (None, None) if width is None else rope_factors(5 * torch.randn(num_tokens, width // 2, device=device))
    slots = torch.tensor([5, 0, 19], device=device)
    found, expected = (
        torch.zeros(2, 5, num_kv_heads, 4, head_dim, device=device, dtype=kind) for kind in (dtype, torch.float64)
    )
    num_normed = {"none": (0, 0), "head": (1, 1), "projection": (num_heads, num_kv_heads)}[norm]
    q_weight, k_weight = (torch.randn(n * head_dim, device=device).to(dtype) if n else None for n in num_normed)
    options = {"num_heads": num_heads, "q_weight": q_weight, "k_weight": k_weight, "eps": 1e-5}
    q = kernels.triton.layers.qkv.rotate_and_store(qkv, cos, sin, found[0], found[1], slots, **options)
    wide = kernels.reference.qkv.rotate_and_store(qkv.double(), cos, sin, expected[0], expected[1], slots, **options)
    check(q, wide, dtype)
    check(found, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("norm", ["none", "head", "projection"])
@pytest.mark.parametrize(("head_dim", "width"), [(16, 16), (80, 32)])
def test_rotation_and_store(device: torch.device, dtype: torch.dtype, norm: str, head_dim: int, width: int) -> None:
    check_rotation_and_store(device, dtype, norm, head_dim=head_dim, width=width)


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("norm", ["none", "head", "projection"])
def test_rotation_and_store_of_codes(device: torch.device, norm: str, codes: torch.dtype) -> None:
    """What the codes and their scales stand for is what a float cache has, within half a step."""
    num_heads, num_kv_heads, head_dim = 3, 2, 80
    qkv = torch.randn(3, num_heads + 2 * num_kv_heads, head_dim, device=device)
    cos, sin = rope_factors(5 * torch.randn(3, 16, device=device))
    num_normed = {"none": (0, 0), "head": (1, 1), "projection": (num_heads, num_kv_heads)}[norm]
    q_weight, k_weight = (torch.randn(n * head_dim, device=device) if n else None for n in num_normed)
    options = {"num_heads": num_heads, "q_weight": q_weight, "k_weight": k_weight, "eps": 1e-5}
    slots = torch.tensor([5, -1, 19], device=device)
    memory = torch.zeros(5, num_kv_heads, 2, 4 * (head_dim + 4), dtype=torch.uint8, device=device)
    elements = memory[..., : 4 * head_dim].view(codes).unflatten(-1, (4, head_dim)).unbind(2)
    scales = memory[..., 4 * head_dim :].view(torch.float32).unbind(2)
    named = dict(zip(("k_scales", "v_scales"), scales, strict=True))
    q = kernels.triton.layers.qkv.rotate_and_store(qkv, cos, sin, *elements, slots, **options, **named)
    expected = torch.zeros(2, 5, num_kv_heads, 4, head_dim, device=device)
    keep = [0, 2]  # the second token is padding
    factors = cos[keep], sin[keep]
    wide = kernels.reference.qkv.rotate_and_store(qkv[keep], *factors, *expected, slots[keep], **options)
    check(q[keep], wide.double(), torch.float32)
    for part, factor, numbers in zip(elements, scales, expected, strict=True):
        largest = numbers.abs().amax(-1, keepdim=True)
        bound = largest / 253 if codes == torch.int8 else 2**-4 * numbers.abs() + largest * 2**-18
        assert ((part.float() * factor[..., None] - numbers).abs() <= bound + 1e-6).all()


@pytest.mark.parametrize("norm", ["none", "head", "projection"])
def test_layers_without_positions_are_stored_as_they_are(device: torch.device, norm: str) -> None:
    check_rotation_and_store(device, torch.float32, norm, head_dim=16, width=None)
