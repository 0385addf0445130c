"""Norms, activations, and the way from projection to cache: bound by the bytes that they move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import kernels.reference.activation
import kernels.reference.norm
import kernels.reference.qkv
import kernels.triton.layers.activation
import kernels.triton.layers.norm
import kernels.triton.layers.qkv
import kernels.triton.layers.store_kv
from kernels.reference.attention import store_kv
from kernels.reference.rope import rope_factors
from loadtest.gpu.context import Context, Job
from loadtest.gpu.machine import l2_bytes
from loadtest.gpu.records import Record, Timing
from loadtest.gpu.shapes import LLAMA_8B, TINY, Shape
from loadtest.gpu.stopwatch import Stopwatch, Work, num_sets

_NUM_BLOCKS = 512


def jobs(context: Context) -> list[Job]:
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
        lambda index: store_kv(k[index], v[index], cache[0], cache[1], slots),
    )


def _cache(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_blocks = max(_NUM_BLOCKS, num_rows // 16)
    size = (num_blocks, shape.num_kv_heads, 2, 16, shape.head_dim)
    slots = torch.randperm(num_blocks * 16, device=generator.device, generator=generator)[:num_rows]
    return torch.zeros(size, dtype=dtype, device=generator.device).permute(2, 0, 1, 3, 4), slots
