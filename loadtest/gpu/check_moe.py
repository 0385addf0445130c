"""Mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import kernels.reference.moe
import kernels.triton.layers.moe
from loadtest.gpu.context import Context, Job
from loadtest.gpu.errors import BOUNDS, name_of, poisoned_memory, relative_error
from loadtest.gpu.records import Check, Record

_SHAPES = {  # experts, of which are used, hidden size, size of an expert
    "Mixtral": (8, 2, 1024, 3584),
    "Qwen3": (128, 8, 2048, 768),
    "OLMoE": (64, 8, 2048, 1024),
}


_NUM_SWAPPED = 4.0  # of some thousand: experts whose shares are equal but for rounding may change places


def jobs(context: Context) -> list[Job]:
    shapes = {"tiny": (4, 2, 16, 24)} if context.is_rehearsal else _SHAPES
    dtypes = [torch.float32] if context.is_rehearsal else list(BOUNDS)
    return [
        Job(f"moe, {name}, {name_of(dtype)}", partial(_check, context, name, shape, dtype))
        for name, shape in shapes.items()
        for dtype in dtypes
    ]


def _check(context: Context, name: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Iterator[Record]:
    num_experts, top_k, hidden_size, size = shape
    generator, device = context.generator(f"moe {name} {dtype}"), context.device
    gate_up = torch.randn(num_experts, 2 * size, hidden_size, device=device, generator=generator)
    down = torch.randn(num_experts, hidden_size, size, device=device, generator=generator)
    gate_up, down = (gate_up * hidden_size**-0.5).to(dtype), (down * size**-0.5).to(dtype)
    for num_tokens in (5,) if context.is_rehearsal else (1, 70, 1500):
        x = torch.randn(num_tokens, hidden_size, device=device, generator=generator).to(dtype)
        logits = 3 * torch.randn(num_tokens, num_experts, device=device, generator=generator)
        weights, experts = kernels.triton.layers.moe.route(logits, top_k, normalise=True)
        expected_weights, expected_experts = kernels.reference.moe.route(logits, top_k, normalise=True)
        title = f"{name}, {num_tokens} tokens, {name_of(dtype)}"
        num_others = float((experts != expected_experts).sum())
        yield Check(f"chosen experts, {title}", num_others, _NUM_SWAPPED)
        yield Check(f"their shares, {title}", relative_error(weights, expected_weights), 1e-5)
        with poisoned_memory():
            found = kernels.triton.layers.moe.mix_experts(x, gate_up, down, weights, experts)
        wide = (part.double() for part in (x, gate_up, down))
        expected = kernels.reference.moe.mix_experts(*wide, weights, experts)
        yield Check(f"experts, {title}", relative_error(found, expected), 2 * BOUNDS[dtype])
