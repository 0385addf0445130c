"""A layer of experts: bound by the weights of the experts that a batch touches, or by their products."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import kernels.reference.moe
import kernels.triton.layers.moe
from loadtest.gpu.context import Context, Job
from loadtest.gpu.records import Record, Timing
from loadtest.gpu.stopwatch import Stopwatch, Work

SHAPES = {  # experts, of which are used, hidden size, size of an expert
    "Mixtral-8x7B": (8, 2, 4096, 14336),
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "OLMoE-1B-7B": (64, 8, 2048, 1024),
}


def jobs(context: Context) -> list[Job]:
    shapes = {"tiny": (4, 2, 16, 16)} if context.is_rehearsal else SHAPES
    rows = (3,) if context.is_rehearsal else (1, 32, 128, 2048)
    return [
        Job(f"moe, {name}, {num_tokens} tokens", partial(_time, context, name, shape, num_tokens))
        for name, shape in shapes.items()
        for num_tokens in rows
    ]


def _time(context: Context, name: str, shape: tuple[int, int, int, int], num_tokens: int) -> Iterator[Record]:
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
    num_touched = sum(int(experts.unique().numel()) for _, experts in chosen) / len(chosen)
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
