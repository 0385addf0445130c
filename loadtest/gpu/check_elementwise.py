"""Norms, gated activations, and the way from projection to attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import kernels.reference.activation
import kernels.reference.norm
import kernels.reference.qkv
import kernels.triton.layers.activation
import kernels.triton.layers.norm
import kernels.triton.layers.qkv
from kernels.reference.rope import rope_factors
from loadtest.gpu.context import Context, Job
from loadtest.gpu.errors import BOUNDS, name_of, poisoned_memory, relative_error
from loadtest.gpu.records import Check, Record

_ACTIVATIONS = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")


def jobs(context: Context) -> list[Job]:
    dtypes = [torch.float32] if context.is_rehearsal else list(BOUNDS)
    checks = {"norm": _norms, "activation": _activations, "qkv": _rotations}
    return [
        Job(f"{name}, {name_of(dtype)}", partial(check, context, dtype))
        for name, check in checks.items()
        for dtype in dtypes
    ]


def _norms(context: Context, dtype: torch.dtype) -> Iterator[Record]:
    generator = context.generator(f"norm {dtype}")
    num_rows, widths = (3, (48,)) if context.is_rehearsal else (37, (576, 1024, 4096, 5120))
    for width in widths:
        x, residual = (3 * torch.randn(2, num_rows, width, device=context.device, generator=generator)).to(dtype)
        weight = torch.randn(width, device=context.device, generator=generator).to(dtype)
        with poisoned_memory():
            alone = kernels.triton.layers.norm.rms_norm(x, weight, 1e-5)
            normed, total = kernels.triton.layers.norm.add_rms_norm(x, residual, weight, 1e-5)
        name = f"norm, {width}, {name_of(dtype)}"
        wide = x.double(), residual.double(), weight.double()
        yield Check(name, relative_error(alone, kernels.reference.norm.rms_norm(wide[0], wide[2], 1e-5)), BOUNDS[dtype])
        expected, expected_total = kernels.reference.norm.add_rms_norm(*wide, 1e-5)
        yield Check(f"add and {name}", relative_error(normed, expected), BOUNDS[dtype])
        yield Check(f"sum of add and {name}", relative_error(total, expected_total), BOUNDS[dtype])


def _activations(context: Context, dtype: torch.dtype) -> Iterator[Record]:
    generator = context.generator(f"activation {dtype}")
    num_rows, sizes = (3, (40,)) if context.is_rehearsal else (33, (1100, 14336))
    for size in sizes:
        gate_up = (4 * torch.randn(num_rows, 2 * size, device=context.device, generator=generator)).to(dtype)
        for name in _ACTIVATIONS:
            with poisoned_memory():
                found = getattr(kernels.triton.layers.activation, name)(gate_up)
            expected = getattr(kernels.reference.activation, name)(gate_up.double())
            yield Check(f"{name}, {size}, {name_of(dtype)}", relative_error(found, expected), BOUNDS[dtype])


def _rotations(context: Context, dtype: torch.dtype) -> Iterator[Record]:
    generator, device = context.generator(f"qkv {dtype}"), context.device
    shapes = [(2, 1, 16, 16)] if context.is_rehearsal else [(32, 8, 128, 128), (16, 8, 128, 128), (32, 32, 80, 32)]
    num_rows = 3 if context.is_rehearsal else 21
    for num_heads, num_kv_heads, head_dim, width in shapes:
        for has_norm in (False, True):
            qkv = torch.randn(num_rows, num_heads + 2 * num_kv_heads, head_dim, device=device, generator=generator).to(
                dtype
            )
            angles = 9 * torch.randn(num_rows, width // 2, device=device, generator=generator)
            cos, sin = rope_factors(angles)
            slots = torch.randperm(64, device=device, generator=generator)[:num_rows]
            weights = torch.randn(2, head_dim, device=device, generator=generator).to(dtype)
            q_weight, k_weight = (weights[0], weights[1]) if has_norm else (None, None)
            options = {"num_heads": num_heads, "q_weight": q_weight, "k_weight": k_weight}
            shape = (2, 4, num_kv_heads, 16, head_dim)
            found, expected = (torch.zeros(shape, device=device, dtype=kind) for kind in (dtype, torch.float64))
            with poisoned_memory():
                q = kernels.triton.layers.qkv.rotate_and_store(qkv, cos, sin, found[0], found[1], slots, **options)
            wide = kernels.reference.qkv.rotate_and_store(
                qkv.double(), cos, sin, expected[0], expected[1], slots, **options
            )
            name = f"qkv{' with norms' if has_norm else ''}, {num_heads} heads of {head_dim}, {name_of(dtype)}"
            yield Check(name, relative_error(q, wide), BOUNDS[dtype])
            yield Check(f"cache after {name}", relative_error(found, expected), BOUNDS[dtype])
