"""Mixtures of experts: against the definition, and against the weights of the experts that a batch touches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import kernels.reference.moe
import kernels.triton.layers.moe
from loadtest.gpu.context import Context, Job
from loadtest.gpu.errors import BOUNDS, name_of, poisoned_memory, relative_error
from loadtest.gpu.records import Check, Record, Timing
from loadtest.gpu.stopwatch import Stopwatch, Work

Sizes = tuple[int, int, int, int]  # experts, of which are used, hidden size, size of an expert
_CHECKED: dict[str, Sizes] = {"Mixtral": (8, 2, 1024, 3584), "Qwen3": (128, 8, 2048, 768), "OLMoE": (64, 8, 2048, 1024)}
_TIMED: dict[str, Sizes] = {
    "Mixtral-8x7B": (8, 2, 4096, 14336),
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "OLMoE-1B-7B": (64, 8, 2048, 1024),
}
_NUM_SWAPPED = 4.0  # of some thousand: experts whose shares are equal but for rounding may change places


def checks(context: Context) -> list[Job]:
    shapes = {"tiny": (4, 2, 16, 24)} if context.is_rehearsal else _CHECKED
    dtypes = [torch.float32] if context.is_rehearsal else list(BOUNDS)
    return [
        Job(f"moe, {name}, {name_of(dtype)}", partial(_check, context, name, shape, dtype))
        for name, shape in shapes.items()
        for dtype in dtypes
    ]


def _check(context: Context, name: str, shape: Sizes, dtype: torch.dtype) -> Iterator[Record]:
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
        expected = kernels.reference.moe.mix_experts(x.double(), gate_up.double(), down.double(), weights, experts)
        yield Check(f"experts, {title}", relative_error(found, expected), 2 * BOUNDS[dtype])


def timings(context: Context) -> list[Job]:
    shapes = {"tiny": (4, 2, 16, 16)} if context.is_rehearsal else _TIMED
    rows = (3,) if context.is_rehearsal else (1, 32, 128, 2048)
    return [
        Job(f"moe, {name}, {num_tokens} tokens", partial(_time, context, name, shape, num_tokens))
        for name, shape in shapes.items()
        for num_tokens in rows
    ]


def _time(context: Context, name: str, shape: Sizes, num_tokens: int) -> Iterator[Record]:
    num_experts, top_k, hidden_size, size = shape
    title = f"moe, {name}, {num_tokens} tokens"
    dtype = torch.float32 if context.is_rehearsal else torch.bfloat16
    generator, device = context.generator(title), context.device

    def draw(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=device).normal_(std=sizes[-1] ** -0.5, generator=generator)

    # all experts of a layer are more than the caches hold, but for a single token's few
    gate_up, down = draw(num_experts, 2 * size, hidden_size), draw(num_experts, hidden_size, size)
    x, logits = draw(8, num_tokens, hidden_size), draw(8, num_tokens, num_experts).float()
    chosen = [kernels.triton.layers.moe.route(part, top_k, normalise=True) for part in logits]
    num_touched = sum(len(set(experts.flatten().tolist())) for _, experts in chosen) / len(chosen)
    works: dict[str, Work] = {
        "": lambda index: kernels.triton.layers.moe.mix_experts(x[index], gate_up, down, *chosen[index]),
        "torch, by expert": lambda index: kernels.reference.moe.mix_experts(x[index], gate_up, down, *chosen[index]),
    }
    seconds = Stopwatch(device, num_rounds=5).compare(works, num_sets=8, launched={"torch, by expert"})
    floor = context.floor(
        num_bytes=num_touched * 3 * size * hidden_size * dtype.itemsize,
        num_flops=2 * num_tokens * top_k * 3 * size * hidden_size,
    )
    yield Timing(title, seconds.pop(""), floor, peers=seconds)
