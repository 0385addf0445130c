"""The dense products of Llama-3.1-8B, which are torch's, and what 4-bit weights would bring (gemlite)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from loadtest.gpu.context import Context, Job
from loadtest.gpu.errors import relative_error
from loadtest.gpu.machine import l2_bytes
from loadtest.gpu.records import Problem, Record, Timing
from loadtest.gpu.shapes import LLAMA_8B, TINY
from loadtest.gpu.stopwatch import Stopwatch, Work, num_sets

_GROUP = 128  # weights that share a scale
_AGREEMENT = 0.02  # relative error between two products in bfloat16


def jobs(context: Context) -> list[Job]:
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


def late_jobs(context: Context) -> list[Job]:
    """With a peer that tunes itself, for as long as it likes."""
    size = 2 * LLAMA_8B.intermediate_size, LLAMA_8B.hidden_size
    return [
        Job(title, partial(_time_four_bits, context, title, size, num_rows))
        for num_rows in (() if context.is_rehearsal else (1, 16))
        for title in [f"linear in 4 bits, gate and up, {num_rows} rows"]
    ]


def _time(context: Context, name: str, size: tuple[int, int], num_rows: int) -> Iterator[Record]:
    dtype = torch.float32 if context.is_rehearsal else torch.bfloat16
    generator, device = context.generator(name), context.device
    num_weights = size[0] * size[1]
    count = num_sets(num_weights * dtype.itemsize, l2_bytes(device))
    weights = torch.empty(count, *size, dtype=dtype, device=device).normal_(generator=generator)
    x = torch.empty(num_rows, size[1], dtype=dtype, device=device).normal_(generator=generator)
    seconds = Stopwatch(device).time(lambda index: F.linear(x, weights[index]), num_sets=count)
    yield Timing(name, seconds, _floor(context, size, num_rows, bits=16), note="torch's product")


def _time_four_bits(context: Context, name: str, size: tuple[int, int], num_rows: int) -> Iterator[Record]:
    try:
        from gemlite.helper import A16W4_HQQ_INT
    except ImportError as error:
        yield Problem(name, f"gemlite was not carried along ({error})")
        return
    generator, device = context.generator(name), context.device
    num_groups = size[0] * size[1] // _GROUP
    count = num_sets(size[0] * size[1] // 2, l2_bytes(device))
    layers, weights = [], []
    for _ in range(count):
        levels = torch.randint(0, 16, (num_groups, _GROUP), device=device, generator=generator)
        scales = torch.rand(num_groups, 1, device=device, generator=generator).bfloat16() * 0.01
        zeros = torch.full_like(scales, 7.5)
        weights.append(((levels - zeros) * scales).view(size).bfloat16())
        packed = A16W4_HQQ_INT(device=device, dtype=torch.bfloat16)
        layers.append(packed.from_weights(levels.to(torch.uint8).view(size), scales, zeros))
    x = torch.empty(num_rows, size[1], dtype=torch.bfloat16, device=device).normal_(generator=generator)
    works: dict[str, Work] = {"": lambda index: F.linear(x, weights[index])}
    error = relative_error(layers[0](x), F.linear(x, weights[0]))
    if error <= _AGREEMENT:
        works["gemlite, 4-bit weights"] = lambda index: layers[index](x)
    else:
        yield Problem(f"gemlite, {name}", f"it disagrees: relative error {error:.2g}")
    seconds = Stopwatch(device).compare(works, num_sets=count)
    floor = _floor(context, size, num_rows, bits=4.25)
    yield Timing(name, seconds.pop(""), floor, peers=seconds, note="torch's product in 16 bits, the floor of 4")


def _floor(context: Context, size: tuple[int, int], num_rows: int, *, bits: float) -> float | None:
    num_weights = size[0] * size[1]
    num_bytes = num_weights * bits / 8 + 2 * num_rows * (size[0] + size[1])
    return context.floor(num_bytes=num_bytes, num_flops=2 * num_rows * num_weights)
