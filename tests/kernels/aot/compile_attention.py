"""Compiles paged attention for one chip: `python compile_attention.py 90 short|long` prints JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import numpy as np
import torch
from offline_compiler import Compiled, compile_for

from kernels.triton.attention.paged_attention import Prepared, paged_attention
from kernels.triton.attention.work_partition import Workspace, partition_attention
from kernels.triton.configs import attention_config
from kernels.triton.layers.store_kv import store_kv


@dataclasses.dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    soft_cap: float | None = None
    has_tree: bool = False
    has_sinks: bool = False
    block_size: int = 16
    codes: torch.dtype | None = None  # of the cache; None: as the queries


SHORT = {
    "llama-8b": Shape(32, 8, 128),
    "llama-8b tree": Shape(32, 8, 128, has_tree=True),
    "llama-8b int8": Shape(32, 8, 128, codes=torch.int8),
    "llama-8b fp8": Shape(32, 8, 128, codes=torch.float8_e4m3fn),
}
LONG = {
    "gemma2-9b": Shape(16, 8, 256, window=4096, soft_cap=50.0),
    "falcon-7b": Shape(71, 1, 64),
    "smollm2": Shape(9, 3, 64),
    "smollm2 float32": Shape(9, 3, 64, torch.float32),
    "llama-8b float16": Shape(32, 8, 128, torch.float16),
    "llama-8b float32": Shape(32, 8, 128, torch.float32),
    "llama-8b window tree": Shape(32, 8, 128, window=512, has_tree=True),
    "llama-8b block 64": Shape(32, 8, 128, block_size=64),
    "qwen2-7b": Shape(28, 4, 128),
    "phi2": Shape(32, 32, 80, torch.float16),
    "phi3": Shape(32, 32, 96),
    "gpt-oss": Shape(64, 8, 64, window=128, has_sinks=True),
    "gemma-7b": Shape(16, 16, 256),
    "gemma2-9b float32": Shape(16, 8, 256, torch.float32, soft_cap=50.0),
    "llama-8b tree int8": Shape(32, 8, 128, has_tree=True, codes=torch.int8),
    "llama-8b window tree fp8": Shape(32, 8, 128, window=512, has_tree=True, codes=torch.float8_e4m3fn),
    "gemma2-9b int8": Shape(16, 8, 256, window=4096, soft_cap=50.0, codes=torch.int8),
    "gemma2-9b fp8": Shape(16, 8, 256, window=4096, soft_cap=50.0, codes=torch.float8_e4m3fn),
    "smollm2 float32 int8": Shape(9, 3, 64, torch.float32, codes=torch.int8),
    "llama-8b float16 int8": Shape(32, 8, 128, torch.float16, codes=torch.int8),
    "falcon-7b int8": Shape(71, 1, 64, codes=torch.int8),
    "qwen2-7b fp8": Shape(28, 4, 128, codes=torch.float8_e4m3fn),
    "phi2 int8": Shape(32, 32, 80, torch.float16, codes=torch.int8),
    "gpt-oss int8": Shape(64, 8, 64, window=128, has_sinks=True, codes=torch.int8),
}
FIRST_WITH_FP8 = 89  # chips before it have no 8-bit floats, and `kv_cache.dtype: fp8` is refused there


def make_cache(shape: Shape) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """A layer's keys and values where all layers of a block are one piece, and their scales."""
    dtype, sizes = shape.codes or shape.dtype, (shape.block_size, shape.head_dim)
    num_bytes = math.prod(sizes) * dtype.itemsize
    of_scales = 4 * shape.block_size if shape.codes else 0
    memory = torch.empty(64, 32, shape.num_kv_heads, 2, num_bytes + of_scales, dtype=torch.uint8)[:, 5]
    elements, scales = memory.split([num_bytes, of_scales], dim=-1)
    parts = elements.view(dtype).unflatten(-1, sizes).unbind(2)
    named = zip(("k_scales", "v_scales"), scales.view(torch.float32).unbind(2), strict=True)
    return list(parts), dict(named) if shape.codes else {}


def compile_shape(arch: int, name: str, shape: Shape, compiled: list[Compiled]) -> None:
    query_lens, seq_lens = np.array([1, 33]), np.array([600, 700])
    group = shape.num_heads // shape.num_kv_heads
    has_codes = shape.codes is not None
    config = attention_config(shape.head_dim, group, shape.dtype, chip=f"sm_{arch}", has_codes=has_codes)
    partition = partition_attention(
        query_lens,
        seq_lens,
        group=group,
        num_kv_heads=shape.num_kv_heads,
        config=config,
        device=torch.device("cpu"),
    )
    q = torch.empty(34, shape.num_heads, shape.head_dim, dtype=shape.dtype)
    (k_cache, v_cache), scales = make_cache(shape)
    integers = torch.zeros(64, dtype=torch.int64)
    with compile_for(arch, name, compiled):
        paged_attention(
            q,
            k_cache,
            v_cache,
            torch.zeros(2, 64, dtype=torch.int64),
            integers[:3],
            integers[:2],
            shape.head_dim**-0.5,
            window=shape.window,
            soft_cap=shape.soft_cap,
            tree_mask=torch.zeros(34, 48, dtype=torch.bool) if shape.has_tree else None,
            positions=integers[:34],
            sinks=torch.zeros(shape.num_heads) if shape.has_sinks else None,
            **scales,
            prepared=Prepared(partition, config, Workspace(0, 0, q.device)),
        )
        k, v = torch.empty(34, 2 * shape.num_kv_heads, shape.head_dim, dtype=shape.dtype).chunk(2, dim=1)
        store_kv(k, v, k_cache, v_cache, integers[:34], **scales)


if __name__ == "__main__":
    results: list[Compiled] = []
    for case_name, case_shape in (SHORT if sys.argv[2] == "short" else LONG).items():
        if case_shape.codes != torch.float8_e4m3fn or int(sys.argv[1]) >= FIRST_WITH_FP8:
            compile_shape(int(sys.argv[1]), case_name, case_shape, results)
    print(json.dumps([dataclasses.asdict(result) for result in results]))
