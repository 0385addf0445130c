"""The two ceilings of the chip, on random data: zeros can be multiplied faster."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loadtest.gpu.context import Context, Job
from loadtest.gpu.records import Ceilings, Record
from loadtest.gpu.stopwatch import Stopwatch


def jobs(context: Context) -> list[Job]:
    return [Job("ceilings", lambda: _ceilings(context))]


def _ceilings(context: Context) -> Iterator[Record]:
    yield Ceilings(_bytes_per_second(context), _flops_per_second(context), l2_bytes(context.device))


def _bytes_per_second(context: Context) -> float:
    num_values = 1 << (16 if context.is_rehearsal else 31)  # 4 GiB in bfloat16
    source = torch.empty(num_values, device=context.device, dtype=torch.bfloat16)
    source.normal_(generator=context.generator("copy"))
    target = torch.empty_like(source)
    return 2 * source.nbytes / Stopwatch(context.device).time(lambda _: target.copy_(source))


def _flops_per_second(context: Context) -> float:
    width, generator = 64 if context.is_rehearsal else 8192, context.generator("product")
    a, b = (torch.randn(width, width, device=context.device, generator=generator).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    return 2 * width**3 / Stopwatch(context.device).time(lambda _: torch.mm(a, b, out=product))


def l2_bytes(device: torch.device) -> int:
    """Bytes of the device's second-level cache."""
    return 1 << 10 if device.type == "cpu" else torch.cuda.get_device_properties(device).L2_cache_size
