"""Norms, gated activations, and the way from projection to cache: their results, and what they move per second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import kernels.reference.activation
import kernels.reference.attention
import kernels.reference.norm
import kernels.reference.qkv
import kernels.triton.layers.activation
import kernels.triton.layers.norm
import kernels.triton.layers.qkv
import kernels.triton.layers.store_kv
from kernels.reference.rope import rope_factors
from loadtest.gpu.context import Context, Job
from loadtest.gpu.errors import BOUNDS, name_of, poisoned_memory, relative_error
from loadtest.gpu.machine import l2_bytes
from loadtest.gpu.records import Check, Record, Timing
from loadtest.gpu.shapes import LLAMA_8B, TINY
from loadtest.gpu.stopwatch import Stopwatch, Work, num_sets
from loadtest.micro.shapes import Shape

_ACTIVATIONS = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")
_NUM_BLOCKS = 512


def checks(context: Context) -> list[Job]:
    dtypes = [torch.float32] if context.is_rehearsal else list(BOUNDS)
    parts = {"norm": _norms, "activation": _activations, "qkv": _rotations}
    return [
        Job(f"{name}, {name_of(dtype)}", partial(check, context, dtype))
        for name, check in parts.items()
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
            shape = (2, 4, num_kv_heads, 16, head_dim)
            found, expected = (torch.zeros(shape, device=device, dtype=kind) for kind in (dtype, torch.float64))
            with poisoned_memory():
                q = kernels.triton.layers.qkv.rotate_and_store(
                    qkv, cos, sin, found[0], found[1], slots, num_heads=num_heads, q_weight=q_weight, k_weight=k_weight
                )
            wide = kernels.reference.qkv.rotate_and_store(
                qkv.double(), cos, sin, expected[0], expected[1], slots,
                num_heads=num_heads, q_weight=q_weight, k_weight=k_weight,
            )  # fmt: skip
            name = f"qkv{' with norms' if has_norm else ''}, {num_heads} heads of {head_dim}, {name_of(dtype)}"
            yield Check(name, relative_error(q, wide), BOUNDS[dtype])
            yield Check(f"cache after {name}", relative_error(found, expected), BOUNDS[dtype])


def timings(context: Context) -> list[Job]:
    rows = (3,) if context.is_rehearsal else (1, 32, 128, 4096)
    parts = {"add and norm": _norm, "silu and mul": _activation, "qkv": _rotation, "store": _store}
    return [
        Job(f"{name}, {num_rows} rows", partial(_time, context, f"{name}, {num_rows} rows", make, num_rows))
        for name, make in parts.items()
        for num_rows in rows
    ]


def _time(context: Context, name: str, make: Callable[..., tuple[int, Work, Work]], num_rows: int) -> Iterator[Record]:
    shape, dtype = (TINY, torch.float32) if context.is_rehearsal else (LLAMA_8B, torch.bfloat16)
    generator = context.generator(name)
    num_bytes, _, _ = make(shape, dtype, generator, num_rows, 1)
    count = num_sets(num_bytes, l2_bytes(context.device))
    _, ours, torchs = make(shape, dtype, generator, num_rows, count)
    seconds = Stopwatch(context.device).compare({"": ours, "torch, eager": torchs}, num_sets=count)
    yield Timing(name, seconds.pop(""), context.floor(num_bytes=num_bytes), peers=seconds)


def _norm(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator, num_rows: int, count: int
) -> tuple[int, Work, Work]:
    x, residual = torch.empty(2, count, num_rows, shape.hidden_size, dtype=dtype, device=generator.device).normal_(
        generator=generator
    )
    weight = torch.ones(shape.hidden_size, dtype=dtype, device=generator.device)
    return (
        4 * x[0].nbytes,
        lambda index: kernels.triton.layers.norm.add_rms_norm(x[index], residual[index], weight, 1e-5),
        lambda index: kernels.reference.norm.add_rms_norm(x[index], residual[index], weight, 1e-5),
    )


def _activation(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator, num_rows: int, count: int
) -> tuple[int, Work, Work]:
    size = (count, num_rows, 2 * shape.intermediate_size)
    gate_up = torch.empty(size, dtype=dtype, device=generator.device).normal_(generator=generator)
    return (
        gate_up[0].nbytes * 3 // 2,
        lambda index: kernels.triton.layers.activation.silu_and_mul(gate_up[index]),
        lambda index: kernels.reference.activation.silu_and_mul(gate_up[index]),
    )


def _rotation(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator, num_rows: int, count: int
) -> tuple[int, Work, Work]:
    device, num_all = generator.device, shape.num_heads + 2 * shape.num_kv_heads
    size = (count, num_rows, num_all, shape.head_dim)
    qkv = torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)
    cos, sin = rope_factors(torch.randn(num_rows, shape.head_dim // 2, device=device, generator=generator))
    cache, slots = _cache(shape, dtype, generator, num_rows)

    def call(rotate_and_store: Callable[..., object]) -> Work:
        return lambda index: rotate_and_store(
            qkv[index], cos, sin, cache[0], cache[1], slots, num_heads=shape.num_heads
        )

    num_bytes = 2 * qkv[0].nbytes + cos.nbytes + sin.nbytes
    return num_bytes, call(kernels.triton.layers.qkv.rotate_and_store), call(kernels.reference.qkv.rotate_and_store)


def _store(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator, num_rows: int, count: int
) -> tuple[int, Work, Work]:
    size = (2, count, num_rows, shape.num_kv_heads, shape.head_dim)
    k, v = torch.empty(size, dtype=dtype, device=generator.device).normal_(generator=generator)
    cache, slots = _cache(shape, dtype, generator, num_rows)
    return (
        4 * k[0].nbytes,
        lambda index: kernels.triton.layers.store_kv.store_kv(k[index], v[index], cache[0], cache[1], slots),
        lambda index: kernels.reference.attention.store_kv(k[index], v[index], cache[0], cache[1], slots),
    )


def _cache(shape: Shape, dtype: torch.dtype, generator: torch.Generator, num_rows: int) -> tuple[Tensor, Tensor]:
    num_blocks = max(_NUM_BLOCKS, num_rows // 16)
    size = (num_blocks, shape.num_kv_heads, 2, 16, shape.head_dim)
    slots = torch.randperm(num_blocks * 16, device=generator.device, generator=generator)[:num_rows]
    return torch.zeros(size, dtype=dtype, device=generator.device).permute(2, 0, 1, 3, 4), slots
