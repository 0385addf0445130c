"""The relative error of a result, and memory that shows elements that were never written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# |found - expected| / |expected| where products are summed in float32 and stored in this dtype
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64, over all elements; NaN if one is NaN, such as one never written."""
    expected = expected.double().to(found.device)
    assert found.shape == expected.shape, f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
    return float((found.double() - expected).norm() / expected.norm())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, new memory is NaN (or the largest integer), so that an element that nobody writes is noticed."""
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import torch's compiler: seconds
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
