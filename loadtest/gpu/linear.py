"""The dense products of Llama-3.1-8B, which are torch's, against their floor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from loadtest.gpu.context import Context, Job
from loadtest.gpu.machine import l2_bytes
from loadtest.gpu.records import Record, Timing
from loadtest.gpu.shapes import LLAMA_8B, TINY
from loadtest.gpu.stopwatch import Stopwatch, num_sets


def timings(context: Context) -> list[Job]:
    shape, rows = (TINY, (2,)) if context.is_rehearsal else (LLAMA_8B, (1, 32, 128, 4096))
    width = shape.hidden_size
    sizes = {
        "qkv": ((shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, width),
        "attention output": (width, shape.num_heads * shape.head_dim),
        "gate and up": (2 * shape.intermediate_size, width),
        "down": (width, shape.intermediate_size),
        "logits": (shape.vocab_size, width),
    }
    found = []
    for name, size in sizes.items():
        for num_rows in rows if name != "logits" else rows[:3]:
            title = f"linear, {name}, {num_rows} rows"
            found.append(Job(title, partial(_time, context, title, size, num_rows)))
    return found


def _time(context: Context, name: str, size: tuple[int, int], num_rows: int) -> Iterator[Record]:
    dtype = torch.float32 if context.is_rehearsal else torch.bfloat16
    generator, device = context.generator(name), context.device
    num_weights = size[0] * size[1]
    count = num_sets(num_weights * dtype.itemsize, l2_bytes(device))
    weights = torch.empty(count, *size, dtype=dtype, device=device).normal_(generator=generator)
    x = torch.empty(num_rows, size[1], dtype=dtype, device=device).normal_(generator=generator)
    seconds = Stopwatch(device).time(lambda index: F.linear(x, weights[index]), num_sets=count)
    num_bytes = 2 * (num_weights + num_rows * (size[0] + size[1]))
    floor = context.floor(num_bytes=num_bytes, num_flops=2 * num_rows * num_weights)
    yield Timing(name, seconds, floor, note="torch's product")
